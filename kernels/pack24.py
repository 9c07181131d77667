"""Triton packer and unpacker: dense 2:4 weights to the packed layout and back, on the GPU, bit for bit.

One program packs one row tile (16 outputs) over a run of blocks. Rows g and g + 8 are read side by
side, a group of four inputs at a time (64 bits, or twice 64 for float32), because that is how they
are stored: the two pairs of a slot make one 64-bit unit, and the eight slots of a row leave in one
contiguous store. The nibbles of the four slots that share a metadata word meet in a sum of disjoint
bit fields. Nothing is staged: the dense weight is read once and 9/16 of it written, so the time is
that of the memory.

Groups that keep three or more values cannot be packed. A kernel cannot raise, and a packer that
waited for the answer would stall the load of a model once a layer, so the count and the first place
come back in a device tensor for the caller to look at when it likes. The integer atomics that fill it
give the same result in any order.

Weights are moved as bits and never as numbers: NaN payloads, infinities and denormals survive, and
-0.0 counts as zero only when no mask says otherwise, as in ``sparsert.formats.pack_reference``, which
this equals bit for bit.
"""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsert.kernels.fragments24 import (
    NIBBLES_OF_MASKS,
    load_pairs,
    slot_group,
    slot_word_offset,
    value_offset,
    word_offset,
)

#: dtypes of dense weights and packed values.
SUPPORTED_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

#: ``stats[1]`` when no group keeps more than two values.
NO_GROUP = torch.iinfo(torch.int64).max

# 16 x 256 inputs: one metadata chunk, and 40-87 registers (255 with spills at four times the width)
_BLOCKS_PER_PROGRAM = 8
_NUM_WARPS = 4


@triton.jit
def _load_group(weight, at, mask, WIDE: tl.constexpr):
    """Four values of a group as two 64-bit halves of raw bits; 16-bit weights fill only the first."""
    if WIDE:
        return tl.load(weight + 2 * at, mask=mask, other=0), tl.load(weight + 2 * at + 1, mask=mask, other=0)
    else:
        bits = tl.load(weight + at, mask=mask, other=0)
        return bits, bits


@triton.jit
def _value_bits(halves0, halves1, POSITION: tl.constexpr, WIDE: tl.constexpr):
    """Raw bits of one of the four values, zero-extended to 32 bits."""
    if WIDE:
        half = halves0 if POSITION < 2 else halves1
        return (half >> (POSITION % 2 * 32)).to(tl.int32)
    else:
        return (halves0 >> (POSITION * 16)).to(tl.int32) & 0xFFFF


@triton.jit
def _is_kept(value, mask_bytes, POSITION: tl.constexpr, WIDE: tl.constexpr, HAS_MASK: tl.constexpr):
    """1 where the mask, or without one the value, is non-zero."""
    if HAS_MASK:
        return (((mask_bytes >> (POSITION * 8)) & 0xFF) != 0).to(tl.int32)
    else:
        # all bits but the sign: -0.0 is zero, NaN is not
        return ((value & (0x7FFFFFFF if WIDE else 0x7FFF)) != 0).to(tl.int32)


@triton.jit
def _join_bits(low, high):
    """Two 32-bit halves -> 64 bits."""
    return (low.to(tl.int64) & 0xFFFFFFFF) | (high.to(tl.int64) << 32)


@triton.jit
def _compress(weight, mask_bytes, at, inside, WIDE: tl.constexpr, HAS_MASK: tl.constexpr):
    """First value, second value, nibble and number of kept values of every group."""
    halves0, halves1 = _load_group(weight, at, inside, WIDE)
    kept_mask = tl.load(mask_bytes + at, mask=inside, other=0) if HAS_MASK else 0
    v0 = _value_bits(halves0, halves1, 0, WIDE)
    v1 = _value_bits(halves0, halves1, 1, WIDE)
    v2 = _value_bits(halves0, halves1, 2, WIDE)
    v3 = _value_bits(halves0, halves1, 3, WIDE)
    k0 = _is_kept(v0, kept_mask, 0, WIDE, HAS_MASK)
    k1 = _is_kept(v1, kept_mask, 1, WIDE, HAS_MASK)
    k2 = _is_kept(v2, kept_mask, 2, WIDE, HAS_MASK)
    k3 = _is_kept(v3, kept_mask, 3, WIDE, HAS_MASK)
    # a slot that pads a group of fewer than two kept values holds +0
    v0 = tl.where(k0 != 0, v0, 0)
    v1 = tl.where(k1 != 0, v1, 0)
    v2 = tl.where(k2 != 0, v2, 0)
    v3 = tl.where(k3 != 0, v3, 0)
    bits = k0 | (k1 << 1) | (k2 << 2) | (k3 << 3)
    table = tl.full(bits.shape, NIBBLES_OF_MASKS, tl.int64)
    nibble = ((table >> (bits * 4).to(tl.int64)) & 0xF).to(tl.int32)
    position0 = nibble & 3
    position1 = nibble >> 2
    first = tl.where(position0 == 0, v0, tl.where(position0 == 1, v1, v2))
    second = tl.where(position1 == 1, v1, tl.where(position1 == 2, v2, v3))
    return first, second, nibble, k0 + k1 + k2 + k3


@triton.jit(do_not_specialize=["out_features", "groups", "stride_weight", "stride_mask", "units"])
def _pack24_kernel(
    weight,  # 64-bit units of [out_features, in_features], rows stride_weight units apart
    mask,  # 32-bit units (one a group) of the mask's bytes, or None
    values,  # 64-bit units, see fragments24
    metadata,  # int32 words
    stats,  # int64 [2]
    out_features,
    groups,  # of a row
    stride_weight,
    stride_mask,
    units,
    BLOCKS: tl.constexpr,
    WIDE: tl.constexpr,
    HAS_MASK: tl.constexpr,
):
    blocks = units * 2
    row_tile = tl.program_id(0).to(tl.int64)
    first_block = tl.program_id(1) * BLOCKS
    values += row_tile * blocks * (128 if WIDE else 64)
    metadata += row_tile * units * 32

    g = tl.arange(0, 8)
    index = tl.arange(0, BLOCKS * 8)
    block = first_block + index // 8
    group = first_block * 8 + slot_group(index)
    row_low = row_tile * 16 + g
    row_high = row_low + 8
    in_row = (group < groups)[None, :]
    low_inside = (row_low < out_features)[:, None] & in_row
    high_inside = (row_high < out_features)[:, None] & in_row
    if HAS_MASK:
        low_mask = mask + row_low[:, None] * stride_mask
        high_mask = mask + row_high[:, None] * stride_mask
    else:
        low_mask = 0
        high_mask = 0
    low_first, low_second, low_nibble, low_kept = _compress(
        weight + row_low[:, None] * stride_weight, low_mask, group[None, :], low_inside, WIDE, HAS_MASK
    )
    high_first, high_second, high_nibble, high_kept = _compress(
        weight + row_high[:, None] * stride_weight,
        high_mask,
        group[None, :],
        high_inside,
        WIDE,
        HAS_MASK,
    )

    stored = (block < blocks)[None, :]
    at = value_offset(block[None, :], g[:, None], (index % 8)[None, :])
    if WIDE:
        tl.store(values + 2 * at, _join_bits(low_first, low_second), mask=stored)
        tl.store(values + 2 * at + 1, _join_bits(high_first, high_second), mask=stored)
    else:
        pairs = _join_bits(low_first | (low_second << 16), high_first | (high_second << 16))
        tl.store(values + at, pairs, mask=stored)

    # [8 rows, BLOCKS, 4 q, 2 halves]: the four q of a half share a word, each with four bits of it
    fields = (low_nibble | (high_nibble << 16)) << (index % 8 // 2 * 4)[None, :]
    words = tl.sum(tl.reshape(fields, (8, BLOCKS, 4, 2)), axis=2)
    words = tl.reshape(words, (8, BLOCKS * 2)).to(tl.int32)
    half_block = tl.arange(0, BLOCKS * 2)
    word_block = first_block + half_block // 2
    word_at = word_offset(word_block[None, :] // 2, 4 * g[:, None] + (half_block % 4)[None, :], units)
    tl.store(metadata + word_at, words, mask=(word_block < blocks)[None, :])

    low_bad = low_kept > 2
    high_bad = high_kept > 2
    bad_groups = tl.sum(tl.sum(low_bad.to(tl.int32) + high_bad.to(tl.int32), axis=1), axis=0)
    if bad_groups > 0:
        NO_GROUP_HERE: tl.constexpr = 0x7FFFFFFFFFFFFFFF
        low_place = tl.where(low_bad, row_low[:, None] * groups + group[None, :], NO_GROUP_HERE)
        high_place = tl.where(high_bad, row_high[:, None] * groups + group[None, :], NO_GROUP_HERE)
        first_place = tl.min(tl.min(tl.minimum(low_place, high_place), axis=1), axis=0)
        tl.atomic_add(stats, bad_groups.to(tl.int64))
        tl.atomic_min(stats + 1, first_place)


@triton.jit
def _store_group(dense, at, first, second, nibble, inside, WIDE: tl.constexpr):
    """Write the four values of every group: raw bits, two of them zero."""
    position0 = nibble & 3
    position1 = (nibble >> 2) & 3
    if WIDE:
        zero = tl.zeros_like(first)
        for half in tl.static_range(2):
            low = tl.where(position0 == 2 * half, first, tl.where(position1 == 2 * half, second, zero))
            high = tl.where(position0 == 2 * half + 1, first, tl.where(position1 == 2 * half + 1, second, zero))
            tl.store(dense + 2 * at + half, _join_bits(low, high), mask=inside)
    else:
        first = first.to(tl.int64) & 0xFFFF
        second = second.to(tl.int64) & 0xFFFF
        four = (first << (position0 * 16).to(tl.int64)) | (second << (position1 * 16).to(tl.int64))
        tl.store(dense + at, four, mask=inside)


@triton.jit(do_not_specialize=["out_features", "groups", "units"])
def _unpack24_kernel(
    values,  # 64-bit units, see fragments24
    metadata,  # int32 words
    dense,  # 64-bit units of [out_features, in_features] contiguous
    out_features,
    groups,  # of a row
    units,
    BLOCKS: tl.constexpr,
    WIDE: tl.constexpr,
):
    blocks = units * 2
    row_tile = tl.program_id(0).to(tl.int64)
    first_block = tl.program_id(1) * BLOCKS
    values += row_tile * blocks * (128 if WIDE else 64)
    metadata += row_tile * units * 32

    g = tl.arange(0, 8)
    index = tl.arange(0, BLOCKS * 8)
    slot = index % 8
    block = first_block + index // 8
    group = first_block * 8 + slot_group(index)
    stored = (block < blocks)[None, :]
    at = value_offset(block[None, :], g[:, None], slot[None, :])
    low_first, low_second, high_first, high_second = load_pairs(values, at, stored, WIDE)
    word_at = slot_word_offset(block[None, :], g[:, None], slot[None, :], units)
    nibbles = tl.load(metadata + word_at, mask=stored, other=0) >> (slot // 2 * 4)[None, :]

    row_low = row_tile * 16 + g
    row_high = row_low + 8
    in_row = (group < groups)[None, :]
    low_at = row_low[:, None] * groups + group[None, :]
    high_at = row_high[:, None] * groups + group[None, :]
    _store_group(dense, low_at, low_first, low_second, nibbles, (row_low < out_features)[:, None] & in_row, WIDE)
    _store_group(
        dense, high_at, high_first, high_second, nibbles >> 16, (row_high < out_features)[:, None] & in_row, WIDE
    )


def _on_device(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def _rows_of_groups(matrix: Tensor, unit: torch.dtype) -> Tensor:
    """The matrix as units of ``unit``, a group in whole units; a contiguous copy if its groups are not aligned."""
    aligned = matrix.stride(0) % 4 == 0 and matrix.storage_offset() % 4 == 0
    if matrix.stride(1) != 1 or not aligned or matrix.data_ptr() % unit.itemsize:
        matrix = matrix.clone(memory_format=torch.contiguous_format)
    return matrix.view(unit)


def pack24(weight: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Pack a 2:4 weight.

    Args:
        weight: ``[out_features, in_features]``, bf16, fp16 or fp32, ``in_features`` a multiple of 4; rows may be
            strided. On a GPU, or on any device in the interpreter. A weight whose rows are not aligned to whole
            groups is copied first.
        mask: same shape and device, bool or uint8, non-zero keeps; without it non-zero weights are kept.

    Returns:
        ``values`` and ``metadata`` as in ``Packed24``, and ``stats``, int64 ``[2]`` on the device: the number of
        groups that keep three or more values, and the first of them as a flat index over
        ``[out_features, in_features // 4]`` (:data:`NO_GROUP` if none). If ``stats[0]`` is not 0, values and
        metadata mean nothing.

    Raises:
        ValueError: shapes or dtypes do not fit. ``sparsert.ops.pack`` explains such things to users.
    """
    if weight.dim() != 2 or weight.shape[1] % 4 or weight.dtype not in SUPPORTED_DTYPES:
        raise ValueError(
            f"pack24: got weight {tuple(weight.shape)} {weight.dtype}, need [N, multiple of 4] bf16, fp16 or fp32"
        )
    if mask is not None and (mask.shape != weight.shape or mask.dtype not in (torch.bool, torch.uint8)):
        raise ValueError(f"pack24: got mask {tuple(mask.shape)} {mask.dtype}, need {tuple(weight.shape)} bool or uint8")
    out_features, in_features = weight.shape
    row_tiles, units = triton.cdiv(out_features, 16), triton.cdiv(in_features, 64)
    values = torch.empty((row_tiles, units * 2, 32, 8), dtype=weight.dtype, device=weight.device)
    metadata = torch.empty((row_tiles, units * 32), dtype=torch.int32, device=weight.device)
    stats = torch.zeros(2, dtype=torch.int64, device=weight.device)
    stats[1].fill_(NO_GROUP)
    wide = weight.dtype == torch.float32
    groups_of_weight = _rows_of_groups(weight, torch.int64)
    groups_of_mask = None if mask is None else _rows_of_groups(mask, torch.int32)
    with _on_device(weight):
        _pack24_kernel[(row_tiles, triton.cdiv(units * 2, _BLOCKS_PER_PROGRAM))](
            groups_of_weight,
            groups_of_mask,
            values.view(torch.int64),
            metadata,
            stats,
            out_features,
            in_features // 4,
            groups_of_weight.stride(0),
            0 if groups_of_mask is None else groups_of_mask.stride(0),
            units,
            BLOCKS=_BLOCKS_PER_PROGRAM,
            WIDE=wide,
            HAS_MASK=mask is not None,
            num_warps=_NUM_WARPS,
        )
    return values, metadata, stats


def unpack24(
    values: Tensor, metadata: Tensor, out_features: int, in_features: int, out: Tensor | None = None
) -> Tensor:
    """Dense weight of a packed one.

    Args:
        values, metadata: as in ``Packed24``, on a GPU (any device in the interpreter).
        out_features, in_features: before padding.
        out: ``[out_features, in_features]`` to write to, contiguous, the values' dtype; made if not given.

    Returns:
        ``[out_features, in_features]`` in the values' dtype.

    Raises:
        ValueError: ``out`` does not fit.
    """
    if out is None:
        out = torch.empty((out_features, in_features), dtype=values.dtype, device=values.device)
    elif out.shape != (out_features, in_features) or out.dtype != values.dtype or not out.is_contiguous():
        raise ValueError(
            f"unpack24: got out {tuple(out.shape)} {out.dtype}, "
            f"need contiguous [{out_features}, {in_features}] {values.dtype}"
        )
    row_tiles, blocks = values.shape[0], values.shape[1]
    with _on_device(values):
        _unpack24_kernel[(row_tiles, triton.cdiv(blocks, _BLOCKS_PER_PROGRAM))](
            values.view(torch.int64),
            metadata,
            out.view(torch.int64),
            out_features,
            in_features // 4,
            blocks // 2,
            BLOCKS=_BLOCKS_PER_PROGRAM,
            WIDE=values.dtype == torch.float32,
            num_warps=_NUM_WARPS,
        )
    return out
