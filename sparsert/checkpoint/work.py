"""The hidden directory in which a checkpoint is made, until the last byte is on the disk and it takes its name.

A run that dies leaves nothing under the target's name. A work directory with a key stays behind in that case, as
``.NAME.partial`` beside the target, and the next run with the same key goes on in it; one with another key starts it
anew. A lock keeps two runs from working in the same one.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from sparsert.checkpoint.json_file import read_json
from sparsert.checkpoint.shards import write_json
from sparsert.errors import CheckpointError, InputError

_STATE, _LOCK = ".resume.json", ".lock"


def check_output(output: Path) -> None:
    """Refuse a target that is not free, before any work is done.

    Raises:
        InputError: ``output`` is a file or a directory that holds something.
        CheckpointError: its parent directory does not exist.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f"{output}: exists and is not an empty directory; choose a new directory or remove it first")
    if not output.absolute().parent.is_dir():
        raise CheckpointError(f"{output}: the parent directory does not exist; create it first")


@contextlib.contextmanager
def work_directory(output: Path, key: str | None = None) -> Iterator[Path]:
    """A directory to fill, renamed to ``output`` when the block ends without an error.

    Args:
        output: the target; must be free, see :func:`check_output`.
        key: says what is being made; with one, what is finished survives an error for the next run.

    Raises:
        InputError: another process is at work on the same target.
        OSError: a directory cannot be made, synchronised or renamed.
    """
    hidden = output.absolute()
    if key is None:
        directory = hidden.with_name(f".{output.name}.{os.getpid()}.partial")
        directory.mkdir()
        try:
            yield directory
            _take_name(directory, output)
        finally:
            shutil.rmtree(directory, ignore_errors=True)
        return
    directory = hidden.with_name(f".{output.name}.partial")
    directory.mkdir(exist_ok=True)
    with (directory / _LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"{output}: another process is writing it ({directory}); wait for it, or stop it"
            ) from None
        if _state(directory) != key:
            for entry in directory.iterdir():
                if entry.name != _LOCK:
                    entry.unlink()
            write_json(directory / _STATE, {"key": key})
        try:
            yield directory
            for name in (_STATE, _LOCK):
                (directory / name).unlink()
            _take_name(directory, output)
        except BaseException:
            if not any(directory.glob("*.safetensors")):
                shutil.rmtree(directory, ignore_errors=True)
            raise


def _state(directory: Path) -> object:
    try:
        return read_json(directory / _STATE).get("key")
    except CheckpointError:
        return None


def _take_name(directory: Path, output: Path) -> None:
    for place in (*directory.iterdir(), directory):
        _synchronise(place)
    if output.exists():
        output.rmdir()
    os.rename(directory, output)
    _synchronise(output.absolute().parent)


def _synchronise(place: Path) -> None:
    """Wait until a file or the list of a directory's files is on the disk."""
    descriptor = os.open(place, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
