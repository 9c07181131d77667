"""JSON of a checkpoint, parsed with limits: its files come from strangers.

What Python's parser would do with a damaged or hostile file is not an answer to its reader: the last of two equal keys
wins in silence, deep nesting ends in a ``RecursionError``, an integer of thousands of digits in a ``ValueError``.
Here each is refused with one sentence.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sparsert.errors import CheckpointError

#: Largest configuration or index that is read; the index of a model of a trillion parameters stays below 20 MB.
_MAX_JSON_BYTES = 64_000_000


def read_json(file: Path) -> dict[str, Any]:
    """Content of a JSON object file.

    Raises:
        CheckpointError: missing, unreadable, too large, no JSON object, or a key that stands twice.
    """
    try:
        size_bytes = file.stat().st_size
        if size_bytes > _MAX_JSON_BYTES:
            raise CheckpointError(
                f"{file}: has {size_bytes} bytes, a configuration or index at most {_MAX_JSON_BYTES}; fetch it again"
            )
        content = file.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"{file}: no such file; give a model directory in Hugging Face format") from None
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror or error}); check its permissions") from error
    return parse_object(content, str(file))


def parse_object(content: bytes, where: str) -> dict[str, Any]:
    """The JSON object in some bytes.

    Args:
        content: UTF-8 text.
        where: what holds it, for messages.

    Raises:
        CheckpointError: no JSON object, a key that stands twice, or nested too deep.
    """
    try:
        parsed = json.loads(content.decode("utf-8"), object_pairs_hook=unique_keys)
    except DuplicateKeyError as error:
        raise CheckpointError(f"{where}: the key {error.args[0]!r} stands twice; fetch the file again") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: is no JSON ({error}); fetch the file again") from error
    if not isinstance(parsed, dict):
        raise CheckpointError(f"{where}: holds a JSON {type(parsed).__name__}, need an object; fetch the file again")
    return parsed


class DuplicateKeyError(Exception):
    """A key stands twice in one object."""


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For ``json.loads(object_pairs_hook=...)``: a dictionary, or :class:`DuplicateKeyError`."""
    content = dict(pairs)
    if len(content) < len(pairs):
        seen: set[str] = set()
        raise DuplicateKeyError(next(key for key, _ in pairs if key in seen or seen.add(key)))  # type: ignore[func-returns-value]
    return content
