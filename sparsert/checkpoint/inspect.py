"""What is in a checkpoint: per tensor its pattern of zeros, what would run sparse, and the bytes saved.

A weight is classed by the fullest of its groups of four inputs:

    1:4     no group holds more than one value (packed like 2:4, with one padded slot)
    2:4     no group holds more than two
    other   some group holds three or four, yet a fourth or more of all values are zero
    dense   everything else

The threshold between "other" and "dense" is for the reader of the table alone: both run dense.
Trained weights hold practically no exact zeros, weights that went through 4-bit integers up to some
15 %, pruned ones 30 % and more. A weight of the third kind is also looked at across its inputs: one
that is 2:4 there was transposed when it was pruned, and no reader could tell that from its shape.

Tensors are read one at a time and counted in slices, so a report on a model of any size needs little
memory; it does need the time to read all weights once.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sparsert.checkpoint.quantization import (
    QUANT_METHOD,
    pruning_record,
    quantization_of,
    unsupported_quantization,
)
from sparsert.checkpoint.reader import Checkpoint
from sparsert.checkpoint.stored import BITMASK_24, DENSE
from sparsert.checkpoint.writer import stored_plan
from sparsert.errors import SparsertError
from sparsert.formats.groups import comparable, count_groups
from sparsert.formats.packed import PACKED_DTYPES, packed_nbytes
from sparsert.schedule import LayerPlan

#: Share of zeros from which a weight that is not 2:4 counts as pruned some other way.
OTHER_ZERO_SHARE = 0.25

#: Reasons for running dense that the text names, each with its first weight.
_REASONS_SHOWN = 4


@dataclasses.dataclass(frozen=True)
class TensorReport:
    """One tensor.

    Attributes:
        name: tensor name.
        shape: sizes.
        dtype: e.g. ``bfloat16``.
        zero_share: share of exact zeros, 0-1.
        bad_groups: groups of four inputs with three or four values; None where groups make no sense.
        pattern: ``2:4``, ``1:4``, ``other``, ``dense``, or ``-`` for what is no matrix of groups of four.
        runs_sparse: a block linear that would be packed at load.
        dense_reason: why a linear of a block would not; None if it would, or is none.
        claimed: the checkpoint says of this weight that it is 2:4.
        storage: how it is stored: ``dense``, ``sparse-24-bitmask``, ``marlin-24``, ...
        nbytes: bytes as stored.
        packed_bytes: bytes on the device: packed if it runs sparse, else as stored.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    zero_share: float
    bad_groups: int | None
    pattern: str
    runs_sparse: bool
    dense_reason: str | None
    claimed: bool
    storage: str
    nbytes: int
    packed_bytes: int


@dataclasses.dataclass(frozen=True)
class CheckpointReport:
    """A whole checkpoint.

    Attributes:
        directory: where it is.
        format: one line: files, how weights are stored, how they are quantized.
        architecture: first entry of ``architectures``, else ``model_type``.
        supported: whether sparsert can run it; None if nobody was asked.
        unsupported_reason: why not.
        num_blocks: transformer blocks; None where ``config.json`` does not say.
        plan: which of them run, by ``per_layer_config``; None likewise.
        record: what ``sparsert prune`` recorded (method, kept and removed blocks), or None.
        tensors: one report a tensor, in file order.
    """

    directory: str
    format: str
    architecture: str
    supported: bool | None
    unsupported_reason: str | None
    num_blocks: int | None
    plan: LayerPlan | None
    record: dict[str, Any] | None
    tensors: tuple[TensorReport, ...]

    def totals(self) -> dict[str, Any]:
        """Sums over all tensors: bytes now and on the device, sparse and dense linears, broken claims."""
        return {
            "tensors": len(self.tensors),
            "bytes": sum(tensor.nbytes for tensor in self.tensors),
            "device_bytes": sum(tensor.packed_bytes for tensor in self.tensors),
            "sparse_linears": sum(tensor.runs_sparse for tensor in self.tensors),
            "sparse_linear_bytes": sum(tensor.nbytes for tensor in self.tensors if tensor.runs_sparse),
            "sparse_linear_packed_bytes": sum(tensor.packed_bytes for tensor in self.tensors if tensor.runs_sparse),
            "dense_linears": {
                tensor.name: tensor.dense_reason for tensor in self.tensors if tensor.dense_reason is not None
            },
            "broken_claims": [tensor.name for tensor in self.tensors if tensor.claimed and tensor.bad_groups],
        }

    def to_dict(self) -> dict[str, Any]:
        """The same as plain JSON types."""
        return {**dataclasses.asdict(self), "totals": self.totals()}

    def to_text(self) -> str:
        """A table, a line a tensor, and the totals below it."""
        header = ("tensor", "shape", "dtype", "zeros", "bad groups", "pattern", "runs", "MB", "MB on device")
        rows = [header]
        for tensor in self.tensors:
            rows.append(
                (
                    tensor.name,
                    "x".join(map(str, tensor.shape)) or "scalar",
                    tensor.dtype,
                    f"{tensor.zero_share:.1%}",
                    "-" if tensor.bad_groups is None else str(tensor.bad_groups),
                    tensor.pattern,
                    "sparse" if tensor.runs_sparse else "dense",
                    f"{tensor.nbytes / 1e6:.2f}",
                    f"{tensor.packed_bytes / 1e6:.2f}",
                )
            )
        widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
        left = (0, 1, 2, 5, 6)
        lines = [
            "  ".join(cell.ljust(width) if column in left else cell.rjust(width) for column, (cell, width) in pairs)
            for pairs in (list(enumerate(zip(row, widths, strict=True))) for row in rows)
        ]
        return "\n".join([line.rstrip() for line in lines] + [""] + self._summary_lines())

    def _summary_lines(self) -> list[str]:
        totals = self.totals()
        supported = {None: "", True: " (runs in sparsert)", False: f" (not supported: {self.unsupported_reason})"}
        lines = [
            f"{self.directory}: {self.architecture}{supported[self.supported]}, {self.num_blocks} blocks, "
            f"{totals['tensors']} tensors",
            f"format: {self.format}",
            f"{totals['sparse_linears']} linear weights would run sparse: "
            f"{totals['sparse_linear_bytes'] / 1e6:.1f} MB stored, {totals['sparse_linear_packed_bytes'] / 1e6:.1f} MB "
            "packed",
            f"all tensors: {totals['bytes'] / 1e6:.1f} MB stored, {totals['device_bytes'] / 1e6:.1f} MB on the device",
        ]
        reasons = collections.Counter(totals["dense_linears"].values())
        for reason, count in reasons.most_common(_REASONS_SHOWN):
            name = next(name for name, given in totals["dense_linears"].items() if given == reason)
            lines.append(f"{count} linear weights would run dense: {reason} (first {name})")
        if len(reasons) > _REASONS_SHOWN:
            more = sum(count for _, count in reasons.most_common()[_REASONS_SHOWN:])
            lines.append(f"{more} more would run dense for other reasons; --json lists them")
        if self.record is not None and "kept_blocks" in self.record:
            lines.append(
                f"pruned by sparsert {self.record.get('version')}: method {self.record.get('method')}, base model "
                f"{self.record.get('base_model')}, runs {LayerPlan.from_record(self.record)}"
            )
        elif self.plan is not None and self.plan != LayerPlan.full(self.plan.num_blocks):
            lines.append(f"runs {self.plan} (per_layer_config)")
        if totals["broken_claims"]:
            lines.append(
                f"broken: {len(totals['broken_claims'])} weights are said to be 2:4 and are not, the first "
                f"{totals['broken_claims'][0]}; prune them again (`sparsert prune`)"
            )
        return lines


def inspect_checkpoint(
    checkpoint: Checkpoint,
    *,
    architecture_check: Callable[[dict[str, Any]], object] | None = None,
    progress: bool = False,
) -> CheckpointReport:
    """Read every tensor once and report.

    Args:
        checkpoint: the opened checkpoint.
        architecture_check: called with the configuration; raises a ``SparsertError`` for what cannot run.
        progress: show a bar on standard error if that is a terminal.

    Raises:
        CheckpointError: a tensor cannot be read.
    """
    from tqdm import tqdm

    config = checkpoint.config
    supported, reason = None, None
    if architecture_check is not None:
        try:
            architecture_check(config)
            supported = True
        except SparsertError as error:
            supported, reason = False, str(error)
    block_linears = set(checkpoint.block_linears())
    tensors = []
    # disable=None: tqdm stays silent when standard error is no terminal
    for name in tqdm(checkpoint.names, unit="tensor", desc="reading", disable=None if progress else True):
        tensors.append(_inspect_tensor(checkpoint, name, name in block_linears))
    architectures = config.get("architectures") or [config.get("model_type", "unknown")]
    depth, record = config.get("num_hidden_layers"), pruning_record(config)
    return CheckpointReport(
        directory=str(checkpoint.directory),
        format=describe_format(checkpoint),
        architecture=str(architectures[0]),
        supported=supported,
        unsupported_reason=reason,
        num_blocks=depth if isinstance(depth, int) else None,
        plan=stored_plan(config, depth) if isinstance(depth, int) else None,
        record=dict(record) if record is not None else None,
        tensors=tuple(tensors),
    )


def _inspect_tensor(checkpoint: Checkpoint, name: str, block_linear: bool) -> TensorReport:
    tensor = checkpoint.read(name)
    nbytes = checkpoint.nbytes(name)
    has_groups = tensor.dim() == 2 and tensor.numel() > 0 and tensor.shape[1] % 4 == 0
    if has_groups and tensor.dtype.is_floating_point:
        zeros, bad_groups, fullest = count_groups(tensor)
        zero_share = zeros / tensor.numel()
        if fullest <= 2:
            pattern = "1:4" if fullest <= 1 else "2:4"
        else:
            pattern = "other" if zero_share >= OTHER_ZERO_SHARE else "dense"
    else:
        zero_share = 1.0 - int(torch.count_nonzero(comparable(tensor))) / max(tensor.numel(), 1)
        bad_groups, pattern = None, "-"
    runs_sparse = block_linear and pattern in ("2:4", "1:4") and tensor.dtype in PACKED_DTYPES
    reason = None if runs_sparse or not block_linear else _dense_reason(tensor, pattern, bad_groups)
    return TensorReport(
        name=name,
        shape=tuple(tensor.shape),
        dtype=str(tensor.dtype).removeprefix("torch."),
        zero_share=zero_share,
        bad_groups=bad_groups,
        pattern=pattern,
        runs_sparse=runs_sparse,
        dense_reason=reason,
        claimed=checkpoint.claims_two_of_four(name),
        storage=checkpoint.storage(name),
        nbytes=nbytes,
        packed_bytes=packed_nbytes(tensor.shape[0], tensor.shape[1], tensor.dtype) if runs_sparse else nbytes,
    )


def _dense_reason(tensor: Tensor, pattern: str, bad_groups: int | None) -> str:
    """Why a linear weight of a block would not be packed."""
    if pattern in ("2:4", "1:4"):
        return f"{str(tensor.dtype).removeprefix('torch.')} is not packed, only bfloat16, float16 and float32"
    if bad_groups is None:
        return "its input width is no multiple of 4"
    if pattern == "dense":
        return "it was not pruned"
    transposed = tensor.shape[0] % 4 == 0 and count_groups(tensor.t().contiguous())[1] == 0
    if transposed:
        return "it is 2:4 along its outputs; it has to be along its inputs, so it was transposed when it was pruned"
    if bad_groups * 100 < tensor.numel() // 4:
        return "it is 2:4 but for less than 1 % of its groups"
    return "it was pruned, but not 2:4"


def describe_format(checkpoint: Checkpoint) -> str:
    """One line: which files, how weights are stored in them, and whether values are quantized.

    Example:
        >>> describe_format(open_checkpoint("PACKED"))  # doctest: +SKIP
        'sparsert version 1 (sparse-24-bitmask): 210 packed weights; 2 safetensors files'
    """
    storages = collections.Counter(map(checkpoint.storage, checkpoint.names))
    packed = [f"{count} weights as {storage}" for storage, count in storages.items() if storage != DENSE]
    quantization = quantization_of(checkpoint.config)
    if quantization.get("quant_method") == QUANT_METHOD:
        stored = f"sparsert version {quantization.get('version')} ({BITMASK_24}): {storages[BITMASK_24]} packed weights"
    else:
        stored = ", ".join(packed) or "dense tensors"
    kind = "pickle" if checkpoint.files[0].suffix == ".bin" else "safetensors"
    reason = unsupported_quantization(checkpoint.config)
    files = f"{len(checkpoint.files)} {kind} file{'s' if len(checkpoint.files) > 1 else ''}"
    return f"{stored}; {files}" + (f"; {reason}" if reason else "")
