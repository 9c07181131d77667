"""Write a pruned checkpoint: zeros where a mask says so, whole blocks left out.

The result is an ordinary dense checkpoint that every loader of its architecture opens; here its
zeros are recognised as 2:4 and packed when it is loaded. Or it is written packed, see ``writer.py``; the record below
then is the ``provenance`` in ``quantization_config``. What was done stands in ``config.json``:

    "sparsert": {
      "version": "0.1.0",            of sparsert
      "method": "magnitude",         how masks were made; "none" when only blocks were removed
      "pattern": "2:4",              what the block linears fulfil; null when they were not masked
      "base_model": "owner/name",
      "base_num_blocks": 30,
      "kept_blocks": [0, 1, ...],    in the numbering of the base model
      "removed_blocks": [...],       likewise
      "without_attention": [...],    kept blocks without this half, likewise
      "without_mlp": [...],          likewise
      "dense_linears": [...]         block linears (new numbering) that could not be masked
    }

Pruning a pruned checkpoint again keeps the numbering of the first base model. ``pattern`` is a
claim: a loader that finds a third value in a group then reports an error and does not go dense.
:meth:`sparsert.schedule.LayerPlan.from_record` reads back what was removed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsert import __version__
from sparsert.checkpoint.quantization import QUANT_METHOD, pruning_record, quantization_of
from sparsert.checkpoint.reader import Checkpoint, block_of, rename_block
from sparsert.checkpoint.shards import SHARD_BYTES
from sparsert.checkpoint.stored import BITMASK_24, DENSE
from sparsert.checkpoint.writer import SPARSERT, Form, stored_plan, write_checkpoint
from sparsert.errors import CheckpointError, InputError
from sparsert.formats.groups import count_groups
from sparsert.formats.packed import PACKED_DTYPES
from sparsert.schedule import LayerPlan


@dataclasses.dataclass(frozen=True)
class PruneSummary:
    """What :func:`prune_checkpoint` wrote.

    Attributes:
        output: the new directory.
        method: name of the mask method.
        num_blocks: blocks of the source.
        removed_blocks: blocks left out, in the numbering of the source.
        without_attention, without_mlp: blocks of which only this half was left out, likewise.
        masked_linears: how many block linears are now 2:4.
        dense_linears: block linears (new numbering) that were left dense: no mask, or a width that is no multiple of 4.
        zero_share: share of zeros in the masked linears, 0-1.
        total_bytes: bytes of all tensors written.
    """

    output: Path
    method: str
    num_blocks: int
    removed_blocks: tuple[int, ...]
    without_attention: tuple[int, ...]
    without_mlp: tuple[int, ...]
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
    weight_maker: Callable[[str, Tensor], Tensor] | None = None,
    base_model: str,
    plan: LayerPlan | None = None,
    target: str | None = None,
    keep_dense: Collection[str] = (),
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
        weight_maker: called likewise before it, returns the weight to mask, of the same shape and dtype; for methods
            that change the weights that stay. Default: the weight itself.
        base_model: name to record; an earlier record in ``source`` wins.
        plan: what to keep, default all; what the source itself skips stays away.
        target: ``dense``, ``sparsert`` or ``sparse-24-bitmask``, see :class:`~sparsert.checkpoint.writer.Form`; what is
            masked, or packed in the source, is then written packed. Default: dense, or our format if the source is.
        keep_dense: block linears that no mask is made for.
        shard_bytes: most bytes of tensors in one file.
        progress: show a bar on standard error if that is a terminal.

    Returns:
        What was done.

    Raises:
        InputError: ``output`` is not free, a plan for another number of blocks, or a weight cannot be masked.
        CheckpointError: the source is damaged, or the target cannot be written.
    """
    stored = stored_plan(source.config, source.num_blocks)
    plan = stored if plan is None else stored.intersect(plan)
    linears = set() if mask_maker is None else set(source.block_linears(plan.kept))
    position = {block: index for index, block in enumerate(plan.kept)}
    dense: list[str] = []
    zeros = positions = masked = 0

    def mask(name: str, tensor: Tensor) -> Tensor:
        nonlocal zeros, positions, masked
        if mask_maker is None or name not in linears:
            return tensor
        if tensor.shape[1] % 4 or name in keep_dense:
            dense.append(rename_block(name, position[block_of(name) or 0]))
            return tensor
        if weight_maker is not None:
            tensor = weight_maker(name, tensor)
        pruned = torch.where(mask_maker(name, tensor), tensor, torch.zeros((), dtype=tensor.dtype))
        zeros += pruned.numel() - int(torch.count_nonzero(pruned))
        positions += pruned.numel()
        masked += 1
        return pruned

    if target is None:
        ours = quantization_of(source.config).get("quant_method") == QUANT_METHOD
        target = SPARSERT if ours else DENSE
    masked_anew = linears - set(keep_dense)
    packable = [name for name in masked_anew if source.shape(name)[1] % 4 == 0 and source.dtype(name) in PACKED_DTYPES]
    already = [name for name in source.names if mask_maker is None and source.storage(name) == BITMASK_24]
    form = Form(target, frozenset() if target == DENSE else frozenset([*packable, *already]))

    def record() -> dict[str, Any]:
        return _record(source, plan, method if mask_maker else "none", bool(mask_maker), dense, base_model)

    total_bytes = write_checkpoint(
        source,
        output,
        plan=plan,
        transform=mask,
        record=record,
        form=form,
        shard_bytes=shard_bytes,
        progress=progress,
    )
    return PruneSummary(
        output=Path(output).expanduser(),
        method=method if mask_maker else "none",
        num_blocks=source.num_blocks,
        removed_blocks=plan.removed,
        without_attention=plan.without_attention,
        without_mlp=plan.without_mlp,
        masked_linears=masked,
        dense_linears=tuple(dense),
        zero_share=zeros / positions if positions else 0.0,
        total_bytes=total_bytes,
    )


def check_not_pruned(checkpoint: Checkpoint) -> None:
    """Refuse a model whose block linears are all 2:4 already: masks chosen for it would be those it has, and masks of
    another origin would leave fewer than two values in a group.

    Raises:
        InputError: there is nothing left to choose.
    """
    for name in checkpoint.block_linears():
        if checkpoint.shape(name)[1] % 4 == 0 and count_groups(checkpoint.read(name))[1]:
            return
    raise InputError(
        f"{checkpoint.directory}: every linear weight of its blocks is 2:4 already, so there is nothing to choose; "
        "start from the model before it was pruned (`sparsert prune --method none` removes blocks, or packs, as it is)"
    )


def base_plan(config: Mapping[str, Any], plan: LayerPlan) -> LayerPlan:
    """A plan of a checkpoint in the numbering of the model that it was pruned from.

    Args:
        config: content of ``config.json``; without a record the checkpoint is its own base.
        plan: what of the checkpoint runs, in its own numbering.

    Raises:
        CheckpointError: the record is damaged, or is not one of ``plan.num_blocks`` kept blocks.
    """
    record = pruning_record(config)
    if record is None or "kept_blocks" not in record:
        return plan
    earlier = LayerPlan.from_record(record)
    if len(earlier.kept) != plan.num_blocks:
        raise CheckpointError(
            f"config.json: num_hidden_layers is {plan.num_blocks}, but the sparsert record names {len(earlier.kept)} "
            f"kept blocks; config.json was changed, prune the model again"
        )

    def original(blocks: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(earlier.kept[block] for block in blocks)

    return LayerPlan(
        earlier.num_blocks, original(plan.kept), original(plan.without_attention), original(plan.without_mlp)
    )


def _record(
    source: Checkpoint, plan: LayerPlan, method: str, masked: bool, dense: list[str], base_model: str
) -> dict[str, Any]:
    earlier = pruning_record(source.config) or {}
    if not masked and earlier.get("pattern"):
        # the weights pass through as they are, and so does what is said of them
        method, pattern = earlier.get("method", method), earlier["pattern"]
        position = {block: index for index, block in enumerate(plan.kept)}
        dense = [
            rename_block(name, position[block_of(name) or 0])
            for name in earlier.get("dense_linears", ())
            if (block_of(name) or 0) in position
        ]
    else:
        pattern = "2:4" if masked else None
    original = base_plan(source.config, plan)
    return {
        "version": __version__,
        "method": method,
        "pattern": pattern,
        "base_model": earlier.get("base_model", base_model),
        "base_num_blocks": original.num_blocks,
        "kept_blocks": list(original.kept),
        "removed_blocks": list(original.removed),
        "without_attention": list(original.without_attention),
        "without_mlp": list(original.without_mlp),
        "dense_linears": dense,
    }
