"""The packed 2:4 layout: one copy of a weight that every kernel reads.

``out_features`` is the M of the sparse A operand of ``mma.sp.m16n8k32`` (and of ``wgmma.sp``), the
batch is N. A *block* is 16 outputs x 32 inputs; it keeps 16 x 16 values, stored in the order in
which the 32 lanes of a warp hold them, 8 values (16 bytes in bf16) a lane. With lane = 4 g + q:

                 kept columns 2q, 2q+1     kept columns 2q+8, 2q+9
    row g              values 0, 1                values 4, 5
    row g + 8          values 2, 3                values 6, 7

so one 16-byte load per lane is one whole A operand. The two kept values of group j of a block are
kept columns 2j, 2j+1: always a pair inside one lane.

Metadata: one 32-bit word per lane serves a *unit* of two blocks (64 inputs). Bits 0-15 are the
nibbles of row g, bits 16-31 those of row g + 8, lowest nibble first:

    q            0               1               2               3
    inputs    0-15 of block 0   16-31 of block 0   0-15 of block 1   16-31 of block 1

which is what ``mma.sp`` wants with selector 0 for the even and selector 1 for the odd block. Four
units (256 inputs) of a row of blocks are stored ``[lane][unit]``, 16 bytes a lane; the 0-3 units
that are left after the last full 256 are stored ``[unit][lane]``.

    values    [row tile][block][lane][8]        row tile = 16 outputs
    metadata  [row tile][chunk of 4 units][lane][4] ++ [row tile][left-over unit][lane]

Outputs are padded to 16 and inputs to 64, with zero values and nibble 0xE; the padding is never
seen outside. Bytes: 9/16 of a dense bf16 matrix. Shown against float64 on an H100 for both
instructions. What it gives up: no cheap access to one element, and a second layout on disk
(see ``sparsert.checkpoint``), because this one follows the hardware and may change with it.

Source: PTX ISA, "Multiply-and-accumulate with sparse matrix A", m16n8k32 fragments and metadata.
"""

from __future__ import annotations

import dataclasses
import functools

import torch
from torch import Tensor

from sparsert.errors import InputError
from sparsert.formats.nibbles import check_matrix, mask_to_nibbles, nibbles_to_mask

ROW_TILE = 16  #: outputs of a block
BLOCK = 32  #: inputs of a block
UNIT = 64  #: inputs that one metadata word of a lane serves
CHUNK = 256  #: inputs that one 16-byte metadata load of a lane serves

#: dtypes that can be packed. The GPU kernels multiply the 16-bit ones; float32 runs on the CPU.
PACKED_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

_PADDING_NIBBLE = 0xE
_INTEGERS = {2: torch.int16, 4: torch.int32}


@dataclasses.dataclass(frozen=True)
class Packed24:
    """A 2:4 weight in the packed layout of this module.

    Attributes:
        values: ``[row_tiles, blocks, 32, 8]``, bf16, fp16 or fp32, contiguous.
        metadata: int32 ``[row_tiles, 32 * units]``, contiguous, same device.
        out_features: outputs before padding.
        in_features: inputs before padding, a multiple of 4.
    """

    values: Tensor
    metadata: Tensor
    out_features: int
    in_features: int

    def __post_init__(self) -> None:
        values_shape, metadata_shape = packed_shapes(self.out_features, self.in_features)
        if tuple(self.values.shape) != values_shape or tuple(self.metadata.shape) != metadata_shape:
            raise InputError(
                f"packed weight [{self.out_features}, {self.in_features}]: got values {tuple(self.values.shape)} and "
                f"metadata {tuple(self.metadata.shape)}, need {values_shape} and {metadata_shape}"
            )
        if self.values.dtype not in PACKED_DTYPES or self.metadata.dtype != torch.int32:
            raise InputError(
                f"packed weight: got values {self.values.dtype} and metadata {self.metadata.dtype}, "
                f"need one of {', '.join(map(str, PACKED_DTYPES))} and torch.int32"
            )

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def nbytes(self) -> int:
        """Bytes of values and metadata, padding included."""
        return self.values.nbytes + self.metadata.nbytes

    def to(self, device: torch.device | str) -> Packed24:
        """The same weight on another device."""
        return dataclasses.replace(self, values=self.values.to(device), metadata=self.metadata.to(device))


def packed_shapes(out_features: int, in_features: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of ``values`` and ``metadata`` for a weight ``[out_features, in_features]``."""
    row_tiles = -(-out_features // ROW_TILE)
    units = -(-in_features // UNIT)
    return (row_tiles, units * (UNIT // BLOCK), 32, 8), (row_tiles, units * 32)


def packed_nbytes(out_features: int, in_features: int, dtype: torch.dtype) -> int:
    """Bytes of a packed weight, padding included."""
    values, metadata = packed_shapes(out_features, in_features)
    return functools.reduce(int.__mul__, values) * dtype.itemsize + metadata[0] * metadata[1] * 4


def check_packable(weight: Tensor, mask: Tensor | None, name: str) -> tuple[int, int]:
    """Check what every packer needs of its input; return ``(out_features, in_features)``.

    Raises:
        InputError: no matrix, width no multiple of 4, unsupported dtype, or a mask of another shape or device.
    """
    rows, columns = check_matrix(weight, name)
    if weight.dtype not in PACKED_DTYPES:
        raise InputError(
            f"{name}: got {weight.dtype}; 2:4 packing takes bfloat16, float16 or float32, convert the weight first"
        )
    if mask is not None and (mask.shape != weight.shape or mask.device != weight.device):
        raise InputError(
            f"{name}: the mask is {tuple(mask.shape)} on {mask.device}, the weight {tuple(weight.shape)} on "
            f"{weight.device}; they must agree"
        )
    return rows, columns


def pack_nibbles(weight: Tensor, nibbles: Tensor) -> Packed24:
    """Pack the values that ``nibbles`` name, in plain torch: the reference for every other packer.

    Args:
        weight: ``[out_features, in_features]``, bf16, fp16 or fp32, any strides.
        nibbles: uint8 ``[out_features, in_features // 4]`` from :func:`mask_to_nibbles`.

    Returns:
        The packed weight on the same device. Values at positions the nibbles do not name are dropped.
    """
    rows, columns = check_packable(weight, None, "weight")
    row_tiles, units = -(-rows // ROW_TILE), -(-columns // UNIT)
    # moved as integers: torch's gather rewrites the payload of a NaN
    bits = weight.contiguous().view(_INTEGERS[weight.element_size()])
    grouped = bits.new_zeros(row_tiles * ROW_TILE, units * UNIT // 4, 4)
    grouped.view(row_tiles * ROW_TILE, -1)[:rows, :columns] = bits
    padded = nibbles.new_full((row_tiles * ROW_TILE, units * UNIT // 4), _PADDING_NIBBLE)
    padded[:rows, : columns // 4] = nibbles

    index = torch.stack([padded & 3, padded >> 2], dim=-1).long()
    kept = grouped.gather(-1, index)  # [rows, groups, 2]
    # rows split into (tile, half, g); groups into (block, half of block, q): -> tile, block, g, q, half of block, half
    kept = kept.view(row_tiles, 2, 8, units * 2, 2, 4, 2).permute(0, 3, 2, 5, 4, 1, 6)
    values = kept.reshape(row_tiles, units * 2, 32, 8).contiguous().view(weight.dtype)

    # groups into (unit, q, nibble): word of lane (g, q) = row g low, row g + 8 high
    fields = padded.view(row_tiles, 2, 8, units, 4, 4).permute(0, 3, 2, 4, 1, 5).reshape(row_tiles, units, 32, 8)
    shifts = torch.arange(0, 32, 4, device=fields.device, dtype=torch.int64)
    words = (fields.long() << shifts).sum(-1)
    words = torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)  # [row_tiles, units, 32]
    return Packed24(values, interleave_units(words), rows, columns)


def pack_reference(weight: Tensor, mask: Tensor | None = None, name: str = "weight") -> Packed24:
    """Pack a 2:4 weight in plain torch.

    Args:
        weight: ``[out_features, in_features]``.
        mask: same shape, non-zero keeps; without it the weight's non-zeros are the mask (-0.0 counts as zero).
        name: tensor name for errors.

    Raises:
        SparsityError: some group keeps three or four values.
        InputError: see :func:`check_packable`.
    """
    check_packable(weight, mask, name)
    kept = (weight if mask is None else mask) != 0
    nibbles = mask_to_nibbles(kept, name)
    # a spare slot of a group that keeps fewer than two values holds +0, whatever the weight has there
    return pack_nibbles(torch.where(kept, weight, torch.zeros_like(weight)), nibbles)


def packed_nibbles(packed: Packed24) -> Tensor:
    """Metadata nibbles of a packed weight: uint8 ``[out_features, in_features // 4]``."""
    row_tiles = packed.values.shape[0]
    words = separate_units(packed.metadata)  # [row_tiles, units, 32]
    units = words.shape[1]
    shifts = torch.arange(0, 32, 4, device=words.device, dtype=torch.int32)
    fields = ((words.unsqueeze(-1) >> shifts) & 0xF).to(torch.uint8)
    rows = fields.view(row_tiles, units, 8, 4, 2, 4).permute(0, 4, 2, 1, 3, 5).reshape(row_tiles * ROW_TILE, -1)
    return rows[: packed.out_features, : packed.in_features // 4].contiguous()


def packed_kept_values(packed: Packed24) -> Tensor:
    """Kept values of a packed weight in column order: ``[out_features, in_features // 2]``, two per group."""
    row_tiles, blocks = packed.values.shape[:2]
    kept = packed.values.view(row_tiles, blocks, 8, 4, 2, 2, 2).permute(0, 5, 2, 1, 4, 3, 6)
    return kept.reshape(row_tiles * ROW_TILE, -1)[: packed.out_features, : packed.in_features // 2].contiguous()


def unpack_reference(packed: Packed24) -> Tensor:
    """Dense ``[out_features, in_features]`` of a packed weight, in plain torch."""
    nibbles = packed_nibbles(packed)
    # moved as integers: torch's scatter rewrites the payload of a NaN
    kept = packed_kept_values(packed).view(_INTEGERS[packed.dtype.itemsize]).view(packed.out_features, -1, 2)
    index = torch.stack([nibbles & 3, nibbles >> 2], dim=-1).long()
    dense = kept.new_zeros(packed.out_features, packed.in_features // 4, 4)
    return dense.scatter_(-1, index, kept).view(packed.out_features, packed.in_features).view(packed.dtype)


def packed_mask(packed: Packed24) -> Tensor:
    """Positions that a packed weight stores: bool ``[out_features, in_features]``, two True in every group."""
    return nibbles_to_mask(packed_nibbles(packed))


def concatenate_outputs(parts: list[Packed24]) -> Packed24:
    """One packed weight whose outputs are those of ``parts`` one after another (q, k, v -> qkv).

    Raises:
        InputError: widths, dtypes or devices differ, or a part other than the last has outputs that
            are no multiple of 16 (its padding would end up in the middle).
    """
    first = parts[0]
    for part in parts:
        if (part.in_features, part.dtype, part.device) != (first.in_features, first.dtype, first.device):
            raise InputError("concatenate_outputs: all parts need the same in_features, dtype and device")
    if any(part.out_features % ROW_TILE for part in parts[:-1]):
        raise InputError(f"concatenate_outputs: every part but the last needs out_features divisible by {ROW_TILE}")
    return Packed24(
        torch.cat([part.values for part in parts]),
        torch.cat([part.metadata for part in parts]),
        sum(part.out_features for part in parts),
        first.in_features,
    )


def interleave_outputs(first: Packed24, second: Packed24) -> Packed24:
    """One packed weight in which 16 outputs of ``first`` and the same 16 of ``second`` take turns.

    A kernel that has a gate's outputs and the factor's in one block can multiply them there and then.

    Raises:
        InputError: sizes, dtypes or devices differ, or the outputs are no multiple of 16.
    """
    if (first.out_features, first.in_features, first.dtype, first.device) != (
        second.out_features,
        second.in_features,
        second.dtype,
        second.device,
    ):
        raise InputError("interleave_outputs: both parts need the same shape, dtype and device")
    if first.out_features % ROW_TILE:
        raise InputError(f"interleave_outputs: out_features {first.out_features} is no multiple of {ROW_TILE}")
    return Packed24(
        torch.stack([first.values, second.values], dim=1).flatten(0, 1),
        torch.stack([first.metadata, second.metadata], dim=1).flatten(0, 1),
        2 * first.out_features,
        first.in_features,
    )


def interleave_units(words: Tensor) -> Tensor:
    """``[row_tiles, units, 32]`` -> stored order ``[row_tiles, 32 * units]``."""
    row_tiles, units, _ = words.shape
    full = units // 4 * 4
    chunks = words[:, :full].view(row_tiles, full // 4, 4, 32).transpose(2, 3).reshape(row_tiles, full * 32)
    return torch.cat([chunks, words[:, full:].reshape(row_tiles, -1)], dim=1).contiguous()


def separate_units(metadata: Tensor) -> Tensor:
    """Stored order -> ``[row_tiles, units, 32]``."""
    row_tiles, units = metadata.shape[0], metadata.shape[1] // 32
    full = units // 4 * 4
    chunks = metadata[:, : full * 32].view(row_tiles, full // 4, 32, 4).transpose(2, 3).reshape(row_tiles, full, 32)
    return torch.cat([chunks, metadata[:, full * 32 :].view(row_tiles, units - full, 32)], dim=1)
