"""The weight files of a checkpoint that is being written: what goes into which, in which order, in which form.

Everything is planned before the first byte, because a safetensors file begins with what it holds and its name says how
many there are. Then each tensor is read, changed and written before the next one is read. A file has a name of its own
only when it is complete, on the disk and, if asked for, read back and compared; so whoever finds a shard in a directory
that was left behind can keep it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsert.checkpoint.safetensors_file import SafetensorsWriter, read_header
from sparsert.checkpoint.stored import BITMASK_24, DENSE, part_names
from sparsert.errors import CheckpointError

#: Bytes of tensors in one file; the hub and its tools cut at the same size.
SHARD_BYTES = 5_000_000_000

Layout = Mapping[str, tuple[tuple[int, ...], torch.dtype]]


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor of the model on its way.

    Attributes:
        source: its name where it comes from.
        name: its name in the copy.
        shape: sizes.
        dtype: torch dtype.
        storage: ``dense`` or ``sparse-24-bitmask``, in the copy.
    """

    source: str
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    storage: str = DENSE

    @property
    def layout(self) -> Layout:
        """Name -> shape and dtype of each tensor that is written for it."""
        if self.storage == DENSE:
            return {self.name: (self.shape, self.dtype)}
        names = part_names(self.name, BITMASK_24)
        rows, columns = self.shape
        return {
            names["compressed"]: ((rows, columns // 2), self.dtype),
            names["bitmask"]: ((rows, -(-columns // 8)), torch.uint8),
            names["shape"]: ((2, 1), torch.int64),
        }

    @property
    def nbytes(self) -> int:
        """Bytes written for it."""
        return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in self.layout.values())


@dataclasses.dataclass(frozen=True)
class Shard:
    """One weight file.

    Attributes:
        file_name: e.g. ``model-00001-of-00003.safetensors``.
        entries: what it holds, in order.
    """

    file_name: str
    entries: tuple[Entry, ...]

    @property
    def layout(self) -> Layout:
        """Name -> shape and dtype of each tensor in the file, in order."""
        return {name: form for entry in self.entries for name, form in entry.layout.items()}


def plan_shards(entries: Iterable[Entry], shard_bytes: int) -> list[Shard]:
    """Cut a checkpoint into files of at most ``shard_bytes``, larger only where a single tensor is."""
    parts: list[list[Entry]] = [[]]
    filled = 0
    for entry in entries:
        if parts[-1] and filled + entry.nbytes > shard_bytes:
            parts.append([])
            filled = 0
        parts[-1].append(entry)
        filled += entry.nbytes
    if len(parts) == 1:
        return [Shard("model.safetensors", tuple(parts[0]))]
    return [
        Shard(f"model-{number:05d}-of-{len(parts):05d}.safetensors", tuple(part))
        for number, part in enumerate(parts, start=1)
    ]


def write_shards(
    directory: Path,
    shards: list[Shard],
    read: Callable[[Entry], Mapping[str, Tensor]],
    *,
    check: Callable[[Path, Shard], None] | None = None,
    keep_finished: bool = False,
    progress: bool = False,
) -> None:
    """Write weight files and, if there are several, their index.

    Args:
        directory: where to; exists.
        shards: from :func:`plan_shards`.
        read: the tensors that are written for an entry, by their names in the file.
        check: called with each finished file before it gets its name; raises if it is wrong.
        keep_finished: leave alone the files that an earlier run finished.
        progress: show a bar on standard error if that is a terminal.

    Raises:
        CheckpointError: a tensor cannot be read.
        OSError: a file cannot be written.
    """
    from tqdm import tqdm

    total = sum(entry.nbytes for shard in shards for entry in shard.entries)
    # disable=None: tqdm stays silent when standard error is no terminal
    with tqdm(total=total, unit="B", unit_scale=True, desc="writing", disable=None if progress else True) as bar:
        for shard in shards:
            file = directory / shard.file_name
            if keep_finished and _is_finished(file, shard):
                bar.update(sum(entry.nbytes for entry in shard.entries))
                continue
            partial = directory / f".{shard.file_name}.partial"
            partial.unlink(missing_ok=True)
            with SafetensorsWriter(partial, shard.layout) as writer:
                for entry in shard.entries:
                    _write_all(writer, read(entry))
                    bar.update(entry.nbytes)
            if check is not None:
                check(partial, shard)
            partial.rename(file)
    if len(shards) > 1:
        weight_map = {name: shard.file_name for shard in shards for name in shard.layout}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(directory / "model.safetensors.index.json", index)


def _write_all(writer: SafetensorsWriter, tensors: Mapping[str, Tensor]) -> None:
    """A function of its own: variables of the caller would keep these tensors alive while the next ones are read."""
    for name, tensor in tensors.items():
        writer.write(name, tensor)


def _is_finished(file: Path, shard: Shard) -> bool:
    """Whether a file holds exactly what the plan says, by its header and length."""
    try:
        found = {name: (info.shape, info.dtype) for name, info in read_header(file).items()}
    except CheckpointError:
        return False
    return found == dict(shard.layout)


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object, indented."""
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
