"""From what a user types to a directory: a local path as it is, a hub id through the hub's cache.

Only the files that a runtime reads are fetched (weights in one format, configuration, tokenizer).
When the server cannot be reached the cache serves, so a model that was fetched once runs offline;
a first contact that gets no answer within seconds is given up with one sentence instead of
hanging in retries. ``HF_HUB_OFFLINE``, ``HF_HOME`` and ``HF_TOKEN`` are honoured by
``huggingface_hub`` itself.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sparsert.checkpoint.reader import WEIGHT_FILES
from sparsert.errors import CheckpointError, first_line

#: Files beside the weights: configuration, generation defaults, tokenizer, chat template, licence.
SMALL_FILE_PATTERNS = ("*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt", "LICENSE*", "README.md")

#: Seconds for the first answer of the server; a reachable hub answers in well under one.
FIRST_CONTACT_SECONDS = 5.0

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def resolve_checkpoint(model: str) -> Path:
    """Directory of a model.

    Args:
        model: a local directory, or a hub id ``owner/name``.

    Returns:
        The directory. A path that exists is returned as it is, whatever it holds.

    Raises:
        CheckpointError: neither a directory nor a hub id, or the hub cannot deliver it.
    """
    directory = Path(model).expanduser()
    if directory.exists():
        return directory
    if not _HUB_ID.fullmatch(model):
        raise CheckpointError(f"{model}: no such directory, and no hub id either (owner/name); check the path")
    return fetch_from_hub(model)


def fetch_from_hub(repository: str) -> Path:
    """Fetch a model repository into the hub's cache, or find it there when the hub cannot be reached.

    Raises:
        CheckpointError: unknown or gated repository, nothing in a readable format, or no network and
            nothing cached.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        answer = HfApi().model_info(repository, timeout=FIRST_CONTACT_SECONDS)
        wanted = files_to_fetch(repository, [sibling.rfilename for sibling in answer.siblings or ()])
        return Path(snapshot_download(repository, allow_patterns=wanted, tqdm_class=_terminal_bar()))
    except CheckpointError:
        raise
    except GatedRepoError as error:
        raise CheckpointError(
            f"{repository}: the hub gives this model only to accounts that accepted its licence; "
            "accept it on the model's page, then set HF_TOKEN"
        ) from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{repository}: no such directory here and no such public model on the hub; "
            "check the spelling, or set HF_TOKEN for a private one"
        ) from error
    # The HTTP library behind huggingface_hub has changed more than once and its errors share no base class but this.
    except Exception as error:
        cached = cached_snapshot(repository)
        if cached is not None:
            return cached
        raise CheckpointError(
            f"{repository}: no such directory here, not in the hub's cache, and the hub cannot be reached "
            f"({first_line(error)}); connect to the network, or give a local model directory"
        ) from error


def cached_snapshot(repository: str) -> Path | None:
    """Directory of a repository that the hub's cache holds with weights, or None; never uses the network."""
    from huggingface_hub import snapshot_download

    try:
        directory = Path(snapshot_download(repository, local_files_only=True))
    except (OSError, ValueError):
        return None
    whole = (directory / "config.json").is_file() and any((directory / name).is_file() for name in WEIGHT_FILES)
    return directory if whole else None


def files_to_fetch(repository: str, files: Iterable[str]) -> list[str]:
    """Which files of a repository to fetch: weights in the preferred format, and the small files at its root.

    Raises:
        CheckpointError: the repository has no weights in a readable format.
    """
    at_root = [file for file in files if "/" not in file]
    for weights in ("model*.safetensors", "pytorch_model*.bin"):
        chosen = fnmatch.filter(at_root, weights)
        if chosen:
            break
    else:
        raise CheckpointError(
            f"{repository}: the hub repository has neither model*.safetensors nor pytorch_model*.bin; "
            "choose a repository in Hugging Face format (GGUF, ONNX and adapters are not read)"
        )
    small = [file for file in at_root if any(fnmatch.fnmatch(file, pattern) for pattern in SMALL_FILE_PATTERNS)]
    return chosen + small


def _terminal_bar() -> type[Any]:
    """The hub's progress bar, silent when standard error is no terminal."""
    from huggingface_hub.utils import tqdm

    class TerminalBar(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "disable": options.get("disable") or None})

    return TerminalBar
