"""Reading a written file back and comparing it with what it was made from.

A disk that lost a block, a library that changed a layout or a mistake of ours would otherwise show as a model that
talks nonsense weeks later. What is packed may differ from its source in one thing: a -0.0 is a zero, and comes back as
+0.0.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from sparsert.checkpoint.shards import Entry, Shard
from sparsert.checkpoint.stored import DENSE, part_names
from sparsert.errors import CheckpointError, InputError, SparsityError
from sparsert.formats.bitmask import dense_from_bitmask


def compare_shard(file: Path, shard: Shard, expected: Callable[[str], Tensor]) -> None:
    """Check that a safetensors file holds what it should.

    Args:
        file: to read.
        shard: what it was made as.
        expected: name in the source -> the tensor that should stand there.

    Raises:
        CheckpointError: it cannot be read, or a tensor is another.
    """
    from safetensors import SafetensorError, safe_open

    for entry in shard.entries:
        try:
            with safe_open(str(file), framework="pt", device="cpu") as stored:
                parts = {part: stored.get_tensor(name) for part, name in part_names(entry.name, entry.storage).items()}
            same = _same(entry, parts, expected(entry.source))
        except (SafetensorError, OSError, InputError, SparsityError) as error:
            raise CheckpointError(f"{file}: {entry.name!r} cannot be read back ({error}); check the disk") from error
        if not same:
            raise CheckpointError(
                f"{file}: {entry.name!r} reads back as another tensor than was written; check the disk"
            )


def _same(entry: Entry, parts: dict[str, Tensor], expected: Tensor) -> bool:
    if entry.storage == DENSE:
        return torch.equal(_bytes(parts[""]), _bytes(expected))
    dense = dense_from_bitmask(parts["compressed"], parts["bitmask"], parts["shape"], entry.name)
    # bit for bit but for zeros, of which -0.0 is one
    return torch.equal(_bytes(dense), _bytes(torch.where(expected == 0, torch.zeros_like(expected), expected)))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)
