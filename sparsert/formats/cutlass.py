"""The CUTLASS layout of ``torch.sparse``: ``packed`` and reordered ``meta``, to and from ours.

For a weight ``[m, k]`` in bf16 or fp16:

    packed  [m, k/2]         kept values in column order, row-major
    meta    int16 [m, k/16]  reordered: its shape says nothing about where an element's nibbles are

``meta`` holds, for each tile of 32 outputs x 32 inputs, 128 bytes in a row, tiles of one column of
tiles after another. As 32-bit words, word ``4 g + t`` of a tile is

    t        0                1                2                  3
    rows     g, g + 8         g, g + 8         g + 16, g + 24     g + 16, g + 24
    inputs   0-15             16-31            0-15               16-31

with the first row in the low half, lowest nibble first. The words of our own metadata hold the very
same 16 inputs of rows g and g + 8, so either way is a permutation of whole words.

What one bit-equal layout gives up: torch fills groups of fewer than two values with whatever the
weight has at the padded position, so a -0.0 there stays -0.0 in torch and becomes +0 here.

Source: ``torch/sparse/_semi_structured_conversions.py`` and CUTLASS ``host_reorder.h``, whose index
formula was inverted to give the table above.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsert.errors import InputError, UnsupportedError
from sparsert.formats.packed import ROW_TILE, Packed24, interleave_units, packed_kept_values, separate_units
from sparsert.formats.rows import check_nibbles, values_from_rows

#: outputs and inputs of a metadata tile.
CUTLASS_TILE = 32

_PADDING_WORD = -0x11111112  # 0xEEEEEEEE: eight nibbles 0xE


def _check_shape(rows: int, columns: int, dtype: torch.dtype, name: str) -> None:
    if dtype not in (torch.bfloat16, torch.float16):
        raise UnsupportedError(
            f"{name}: the CUTLASS layout of {dtype} is not 2:4 (torch.sparse stores float32 as 1:2); "
            f"convert the weight to bfloat16 or float16 first"
        )
    if rows % CUTLASS_TILE or columns % CUTLASS_TILE:
        raise InputError(
            f"{name}: got [{rows}, {columns}]; the CUTLASS layout needs both divisible by {CUTLASS_TILE}, "
            f"pad the weight or keep this project's packed layout, which takes any width that is a multiple of 4"
        )


def to_cutlass(packed: Packed24, name: str = "weight") -> tuple[Tensor, Tensor]:
    """``packed`` and ``meta`` as ``torch.sparse`` wants them.

    Args:
        packed: bf16 or fp16, ``out_features`` and ``in_features`` multiples of 32.
        name: tensor name for errors.

    Returns:
        ``[m, k/2]`` in the weight's dtype, and int16 ``[m, k/16]``, reordered.

    Raises:
        InputError: a dimension is no multiple of 32.
        UnsupportedError: float32, which torch stores as 1:2.
    """
    m, k = packed.out_features, packed.in_features
    _check_shape(m, k, packed.dtype, name)
    words = separate_units(packed.metadata)  # [row_tiles, units, 32]
    units = words.shape[1]
    # rows are (tile of 32, half), inputs (unit, tile of 32, half), lanes (g, tile of 32, half of its inputs)
    tiles = words.view(m // CUTLASS_TILE, 2, units, 8, 2, 2).permute(2, 4, 0, 3, 1, 5)
    tiles = tiles.reshape(2 * units, m // CUTLASS_TILE, 32)[: k // CUTLASS_TILE]
    return packed_kept_values(packed), tiles.contiguous().view(torch.int16).view(m, k // 16)


def from_cutlass(packed: Tensor, meta: Tensor, name: str = "weight") -> Packed24:
    """Our packed weight from ``torch.sparse``'s ``packed`` and ``meta``.

    Args:
        packed: ``[m, k/2]``, bf16 or fp16.
        meta: int16 ``[m, k/16]``, reordered, same device.
        name: tensor name for errors.

    Raises:
        InputError: shapes, dtypes or devices do not fit each other, or a dimension is no multiple of 32.
        UnsupportedError: float32, which torch stores as 1:2.
        SparsityError: the metadata holds an illegal nibble.
    """
    if packed.dim() != 2 or meta.dtype != torch.int16 or meta.device != packed.device:
        raise InputError(
            f"{name}: got packed {tuple(packed.shape)} on {packed.device} and meta {meta.dtype} on {meta.device}; "
            f"need packed [m, k/2] and int16 meta [m, k/16] on one device"
        )
    m, k = packed.shape[0], 2 * packed.shape[1]
    _check_shape(m, k, packed.dtype, name)
    if tuple(meta.shape) != (m, k // 16):
        raise InputError(f"{name}: got meta {tuple(meta.shape)}, need {(m, k // 16)} for packed {tuple(packed.shape)}")
    tiles = meta.contiguous().view(torch.int32).view(k // CUTLASS_TILE, m // CUTLASS_TILE, 32)
    if tiles.shape[0] % 2:  # our unit is two tiles wide
        tiles = torch.cat([tiles, tiles.new_full((1, *tiles.shape[1:]), _PADDING_WORD)])
    units = tiles.shape[0] // 2
    words = tiles.view(units, 2, m // CUTLASS_TILE, 8, 2, 2).permute(2, 4, 0, 3, 1, 5)
    metadata = interleave_units(words.reshape(m // ROW_TILE, units, 32))
    return check_nibbles(Packed24(values_from_rows(packed), metadata, m, k), name)
