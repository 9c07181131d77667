"""Write a pruned checkpoint: zeros where a mask says so, whole blocks left out.

The result is an ordinary dense checkpoint that every loader of its architecture opens; here its
zeros are recognised as 2:4 and packed when it is loaded. What was done stands in ``config.json``:

    "sparsert": {
      "version": "0.1.0",            of sparsert
      "method": "magnitude",         how masks were made; "none" when only blocks were removed
      "pattern": "2:4",              what the block linears fulfil; null when they were not masked
      "base_model": "owner/name",
      "base_num_blocks": 30,
      "kept_blocks": [0, 1, ...],    in the numbering of the base model
      "removed_blocks": [...],       likewise
      "dense_linears": [...]         block linears (new numbering) that could not be masked
    }

Pruning a pruned checkpoint again keeps the numbering of the first base model. ``pattern`` is a
claim: a loader that finds a third value in a group then reports an error and does not go dense.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsert import __version__
from sparsert.checkpoint.reader import Checkpoint, block_of, rename_block
from sparsert.checkpoint.writer import SHARD_BYTES, write_checkpoint


@dataclasses.dataclass(frozen=True)
class PruneSummary:
    """What :func:`prune_checkpoint` wrote.

    Attributes:
        output: the new directory.
        method: name of the mask method.
        num_blocks: blocks of the source.
        removed_blocks: blocks left out, in the numbering of the source.
        masked_linears: how many block linears are now 2:4.
        dense_linears: block linears (new numbering) whose input width is no multiple of 4.
        zero_share: share of zeros in the masked linears, 0-1.
        total_bytes: bytes of all tensors written.
    """

    output: Path
    method: str
    num_blocks: int
    removed_blocks: tuple[int, ...]
    masked_linears: int
    dense_linears: tuple[str, ...]
    zero_share: float
    total_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """The same as plain JSON types."""
        return {**dataclasses.asdict(self), "output": str(self.output)}


def prune_checkpoint(
    source: Checkpoint,
    output: str | Path,
    *,
    method: str,
    mask_maker: Callable[[str, Tensor], Tensor] | None,
    base_model: str,
    kept_blocks: Sequence[int] | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: bool = False,
) -> PruneSummary:
    """Mask every block linear of a checkpoint, leave out blocks, and write the result.

    Args:
        source: the opened checkpoint.
        output: directory to create; an empty one may exist.
        method: name to record for the masks.
        mask_maker: called with name and weight ``[out_features, in_features]``, returns a bool mask (True keeps);
            None leaves the weights as they are.
        base_model: name to record; an earlier record in ``source`` wins.
        kept_blocks: increasing indices of the blocks to keep, default all.
        shard_bytes: most bytes of tensors in one file.
        progress: show a bar on standard error if that is a terminal.

    Returns:
        What was done.

    Raises:
        InputError: ``output`` is not free, ``kept_blocks`` out of range, or a weight cannot be masked.
        CheckpointError: the source is damaged, or the target cannot be written.
    """
    kept = list(range(source.num_blocks)) if kept_blocks is None else list(kept_blocks)
    linears = set() if mask_maker is None else set(source.block_linears(kept))
    position = {block: index for index, block in enumerate(kept)}
    dense: list[str] = []
    zeros = positions = masked = 0

    def mask(name: str, tensor: Tensor) -> Tensor:
        nonlocal zeros, positions, masked
        if mask_maker is None or name not in linears:
            return tensor
        if tensor.shape[1] % 4:
            dense.append(rename_block(name, position[block_of(name) or 0]))
            return tensor
        pruned = torch.where(mask_maker(name, tensor), tensor, torch.zeros((), dtype=tensor.dtype))
        zeros += pruned.numel() - int(torch.count_nonzero(pruned))
        positions += pruned.numel()
        masked += 1
        return pruned

    def record() -> dict[str, Any]:
        return _record(source, kept, method if mask_maker else "none", bool(mask_maker), dense, base_model)

    total_bytes = write_checkpoint(
        source, output, kept_blocks=kept, transform=mask, record=record, shard_bytes=shard_bytes, progress=progress
    )
    return PruneSummary(
        output=Path(output).expanduser(),
        method=method if mask_maker else "none",
        num_blocks=source.num_blocks,
        removed_blocks=tuple(sorted(set(range(source.num_blocks)) - set(kept))),
        masked_linears=masked,
        dense_linears=tuple(dense),
        zero_share=zeros / positions if positions else 0.0,
        total_bytes=total_bytes,
    )


def _record(
    source: Checkpoint, kept: list[int], method: str, masked: bool, dense: list[str], base_model: str
) -> dict[str, Any]:
    earlier = source.config.get("sparsert")
    earlier = earlier if isinstance(earlier, dict) else {}
    original = earlier.get("kept_blocks", list(range(source.num_blocks)))
    base_num_blocks = earlier.get("base_num_blocks", source.num_blocks)
    kept_original = [original[block] for block in kept]
    if not masked and earlier.get("pattern"):
        # the weights pass through as they are, and so does what is said of them
        method, pattern = earlier.get("method", method), earlier["pattern"]
        position = {block: index for index, block in enumerate(kept)}
        dense = [
            rename_block(name, position[block_of(name) or 0])
            for name in earlier.get("dense_linears", ())
            if (block_of(name) or 0) in position
        ]
    else:
        pattern = "2:4" if masked else None
    return {
        "version": __version__,
        "method": method,
        "pattern": pattern,
        "base_model": earlier.get("base_model", base_model),
        "base_num_blocks": base_num_blocks,
        "kept_blocks": kept_original,
        "removed_blocks": sorted(set(range(base_num_blocks)) - set(kept_original)),
        "dense_linears": dense,
    }
