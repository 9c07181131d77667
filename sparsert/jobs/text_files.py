"""Text files -> windows of token ids.

Plain text is one document a file; ``.jsonl`` one a line, under ``text``; both may be compressed (``.gz``, ``.xz``). A
``.npy`` file holds token ids already, of the same tokenizer, as integers in one dimension.
"""

from __future__ import annotations

import gzip
import json
import lzma
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from sparsert.compress.text import TextWindows, tokenize_texts
from sparsert.errors import InputError, first_line
from sparsert.jobs.training_options import TextOptions


def load_windows(options: TextOptions, tokenizer: Any, *, vocabulary: int | None = None) -> TextWindows:
    """The windows that a job's options ask for.

    Args:
        options: files, window, separator, BOS.
        tokenizer: of transformers; None if all files hold token ids.
        vocabulary: token ids must be below it.

    Raises:
        InputError: a file that cannot be read or is empty, a text shorter than one window, or token ids of another
            vocabulary.
    """
    bos = None
    if options.bos:
        bos = getattr(tokenizer, "bos_token_id", None)
        if bos is None:
            raise InputError("--bos: this model's tokenizer has no BOS token; leave the option out")
    tokens = load_tokens(options.text, tokenizer, separator=options.separator)
    highest, lowest = int(tokens.max()), int(tokens.min())
    if lowest < 0 or (vocabulary is not None and highest >= vocabulary):
        raise InputError(
            f"{', '.join(options.text)}: holds token ids from {lowest} to {highest}, the model knows 0 to "
            f"{(vocabulary or 0) - 1}; make the ids with this model's tokenizer"
        )
    return TextWindows(tokens, options.window, bos=bos)


def load_tokens(paths: Sequence[str], tokenizer: Any, *, separator: str = "eos") -> Tensor:
    """Token ids of files, one behind the other.

    Returns:
        int32 ``[tokens]``.

    Raises:
        InputError: a file that cannot be read or holds nothing.
    """
    pieces = []
    for path in paths:
        file = Path(path).expanduser()
        if file.suffix == ".npy":
            pieces.append(_read_ids(file))
            continue
        pieces.append(tokenize_texts(read_texts(file), tokenizer, separator=separator))
    if not pieces:
        raise InputError("--text: names no file; give at least one")
    return torch.cat(pieces)


def read_texts(file: Path) -> Iterator[str]:
    """Documents of a file.

    Raises:
        InputError: the file cannot be read or holds nothing, or a line of ``.jsonl`` has no text.
    """
    try:
        with _open_text(file) as stream:
            found = False
            if ".jsonl" in file.suffixes:
                texts = (_text_of(file, number, line) for number, line in enumerate(stream, start=1) if line.strip())
            else:
                texts = (text for text in [stream.read()])
            for text in texts:
                found = found or bool(text.strip())
                yield text
            if not found:
                raise InputError(f"{file}: holds no text; give a file with some text in it")
    except (OSError, EOFError, UnicodeDecodeError, lzma.LZMAError) as error:
        raise InputError(f"{file}: cannot be read ({first_line(error)}); give a UTF-8 text file") from error


def _open_text(file: Path) -> IO[str]:
    if file.suffix == ".xz":
        return lzma.open(file, "rt", encoding="utf-8")
    if file.suffix == ".gz":
        return gzip.open(file, "rt", encoding="utf-8")
    return file.open(encoding="utf-8")


def _text_of(file: Path, number: int, line: str) -> str:
    try:
        text = json.loads(line)["text"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f'{file}: line {number} is no JSON object with "text"; each line must be {{"text": "..."}}'
        ) from error
    if not isinstance(text, str):
        raise InputError(f"{file}: line {number}: text is {type(text).__name__}, it must be a string")
    return text


def _read_ids(file: Path) -> Tensor:
    try:
        ids = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{file}: cannot be read ({first_line(error)}); give token ids saved by numpy.save") from error
    if ids.ndim != 1 or ids.dtype.kind not in "iu" or ids.size == 0:
        raise InputError(f"{file}: holds {ids.dtype} of shape {ids.shape}; need token ids, a vector of integers")
    return torch.from_numpy(ids.astype(np.int32))
