"""The ``marlin-24`` tensors of compressed-tensors: integers of 4 or 8 bits under 2:4, decoded to a dense weight.

For a linear layer with K inputs and N outputs, quantized symmetrically with one scale an output, or one for each 128
inputs of an output:

    weight_packed  int32 [K/32, N bits/2]   kept integers plus 2^(bits-1), K/2 x N of them, in the order below
    scale_packed   fp16 [groups, N]         columns permuted within each 64
    meta           int16 [K/32, 2 N]        metadata, four nibbles a word, in the order of :func:`_metadata_places`

The kept integers, inputs first, are cut into tiles of 16 x 16, a row of tiles is laid flat (16 N integers), every
1024 of them are permuted into the fragments of the kernel that read them, and 32 / bits neighbours share a word, the
first in the lowest bits. The kernel is gone; undone here, the format is ordinary 2:4 once more. What that gives up: the
weight is 4 to 8 bits wide on disk and 16 when it runs, and is rounded to that dtype after the multiplication by its
scale. A kept integer 0 is a zero like any other.

Source: compressed-tensors up to 0.14, ``marlin_24.py`` and ``permutations_24.py``; Sparse-Marlin (arXiv 2408.11743).
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from sparsert.errors import InputError
from sparsert.formats.packed import unpack_reference
from sparsert.formats.rows import check_nibbles, pack_rows

_TILE = 16
#: Outputs that share a permutation of scales; with the 16 kept inputs of a tile, 1024 integers.
_COLUMNS = 64
#: Inputs that share a scale, unless all of them do.
_GROUP = 128


def marlin24_sizes(
    weight_packed: tuple[int, ...], scale_packed: tuple[int, ...], meta: tuple[int, ...], name: str = "weight"
) -> tuple[int, int, int]:
    """``(out_features, in_features, bits)`` from the shapes of the three tensors.

    Raises:
        InputError: they do not fit each other, or cannot be of this format.
    """
    if len(weight_packed) == len(scale_packed) == len(meta) == 2:
        rows, columns = meta[1] // 2, 32 * meta[0]
        bits = 2 * weight_packed[1] // rows if rows else 0
        whole = rows > 0 and columns > 0 and rows % _COLUMNS == 0 and meta[1] % 2 == 0 and bits in (4, 8)
        if (
            whole
            and weight_packed == (columns // 32, rows * bits // 2)
            and scale_packed[1] == rows
            and scale_packed[0] > 0
            and columns % scale_packed[0] == 0
        ):
            return rows, columns, bits
    raise InputError(
        f"{name}: got weight_packed {weight_packed}, scale_packed {scale_packed} and meta {meta}; marlin-24 has "
        f"[K/32, N bits/2], [groups, N] and [K/32, 2 N] with N a multiple of {_COLUMNS} and 4 or 8 bits"
    )


def dense_from_marlin24(
    weight_packed: Tensor,
    scale_packed: Tensor,
    meta: Tensor,
    dtype: torch.dtype = torch.bfloat16,
    name: str = "weight",
) -> Tensor:
    """Dense weight with 2:4 zeros.

    Args:
        weight_packed, scale_packed, meta: as drawn above, on the CPU.
        dtype: of the result, bf16 or fp16.
        name: tensor name for errors.

    Returns:
        ``[N, K]``: integer times scale, computed in fp32 and rounded once.

    Raises:
        InputError: shapes or dtypes do not fit.
        SparsityError: the metadata is damaged.
    """
    shapes = tuple(weight_packed.shape), tuple(scale_packed.shape), tuple(meta.shape)
    rows, columns, bits = marlin24_sizes(*shapes, name)
    if (weight_packed.dtype, scale_packed.dtype, meta.dtype) != (torch.int32, torch.float16, torch.int16):
        raise InputError(
            f"{name}: got weight_packed {weight_packed.dtype}, scale_packed {scale_packed.dtype} and meta "
            f"{meta.dtype}; marlin-24 has int32, float16 and int16"
        )
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    integers = ((weight_packed.unsqueeze(-1) >> shifts) & (2**bits - 1)).to(torch.uint8).view(-1, 1024)
    tiles = torch.empty_like(integers)
    tiles[:, _fragment_order(bits)] = integers
    kept = tiles.view(columns // 2 // _TILE, rows // _TILE, _TILE, _TILE).transpose(1, 2).reshape(columns // 2, rows)

    groups = scale_packed.shape[0]
    # the writer compares the group with the kept inputs, not with all: scales of 256 inputs stay as those of one group
    order = torch.tensor(_GROUP_SCALE_ORDER if groups > 1 and columns // 2 > _GROUP else range(_COLUMNS))
    scales = torch.empty(groups * rows // _COLUMNS, _COLUMNS, dtype=torch.float32)
    scales[:, order] = scale_packed.float().view(-1, _COLUMNS)
    centered = kept.view(groups, -1, rows).float() - 2 ** (bits - 1)
    values = (centered * scales.view(groups, 1, rows)).view(columns // 2, rows).to(dtype)
    words = meta.flatten()[_metadata_places(rows, columns // 16)]
    packed = pack_rows(values.t().contiguous(), words.contiguous().view(torch.uint8).view(rows, columns // 8), columns)
    return unpack_reference(check_nibbles(packed, name))


def _metadata_places(rows: int, words: int) -> Tensor:
    """Where the metadata of output r, inputs 16 c to 16 c + 15, stands in ``meta``: ``[rows, words]``.

    Outputs go within each 64 to the bits of their number: r = 8 a + 4 b + 2 c + d to 32 c + 4 a + 2 d + b. Then of two
    neighbouring outputs and words, the two off the diagonal change places, and words lie in pairs of columns. This is
    an earlier order than that of ``torch.sparse`` today (``cutlass.py``).
    """
    r = torch.arange(rows).unsqueeze(1).expand(rows, words)
    column = torch.arange(words).unsqueeze(0).expand(rows, words)
    row = r // 64 * 64 + r % 4 // 2 * 32 + r % 64 // 8 * 4 + r % 2 * 2 + r % 8 // 4
    exchange = (column % 2) - (row % 2)
    row, column = row + exchange, column - exchange
    return column // 2 * 2 * rows + row * 2 + column % 2


_GROUP_SCALE_ORDER = tuple(8 * block + column for block in range(8) for column in (0, 4, 1, 5, 2, 6, 3, 7))


@functools.cache
def _fragment_order(bits: int) -> Tensor:
    """For each of 1024 integers as stored, its place in four 16 x 16 tiles laid flat."""
    order = []
    for lane in range(32):
        column, q = lane // 4, lane % 4
        for repeat in range(4):
            for block in range(2):
                for row in (2 * q, 2 * q + 1, 2 * q + 8, 2 * q + 9):
                    order.append(16 * row + column // 2 * 256 + column % 2 * 8 + block * 4 + repeat)
    interleave = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7] if bits == 4 else [0, 2, 1, 3])
    return torch.tensor(order).view(-1, len(interleave))[:, interleave].flatten()
