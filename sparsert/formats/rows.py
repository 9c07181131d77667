"""Row order: the neutral form between the packed layout and every layout that keeps rows together.

torch.sparse, compressed-tensors and this project all store the same two things and differ only in
where they put them. Row order names them plainly:

    kept          [out_features, in_features / 2]           kept values in column order, two a group
    nibble bytes  uint8 [out_features, ceil(in_features/8)] two metadata nibbles a byte, even group low

From there to the packed layout both are pure permutations: of pairs of values, and of 16-bit pieces
of metadata (four nibbles, which is what one row of a lane's word holds). So nothing here computes
with values, NaN payloads survive, and no dense matrix and no index tensor is made. Gives up
generality: pieces are reinterpreted as wider integers, which needs a little-endian machine, the only
kind torch is built for on GPUs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsert.formats.nibbles import MASK_OF_NIBBLE, nibbles_to_mask
from sparsert.formats.packed import (
    BLOCK,
    ROW_TILE,
    UNIT,
    Packed24,
    interleave_units,
    packed_nibbles,
    separate_units,
)

_PADDING_BYTE = 0xEE  # two nibbles that name positions 2 and 3, as the packed layout pads
_PAIR_DTYPES = {2: torch.int32, 4: torch.int64}  # value bytes -> integer that holds a pair


def byte_lookup(table: tuple[int, ...], indices: Tensor) -> Tensor:
    """``table[indices]`` for uint8 indices, in the indices' shape; without int64 indices eight times their size."""
    entries = torch.tensor(table, dtype=torch.uint8, device=indices.device)
    return entries.index_select(0, indices.flatten().to(torch.int32)).view(indices.shape)


def values_from_rows(kept: Tensor) -> Tensor:
    """Packed ``values`` of kept values in row order.

    Args:
        kept: ``[out_features, in_features / 2]``, bf16, fp16 or fp32.

    Returns:
        ``[row_tiles, blocks, 32, 8]``, the same dtype, padded with +0.
    """
    rows, columns = kept.shape
    row_tiles, blocks = -(-rows // ROW_TILE), -(-2 * columns // UNIT) * (UNIT // BLOCK)
    if (rows, columns) != (row_tiles * ROW_TILE, blocks * BLOCK // 2):
        padded = kept.new_zeros(row_tiles * ROW_TILE, blocks * BLOCK // 2)
        padded[:rows, :columns] = kept
        kept = padded
    pairs = kept.contiguous().view(_PAIR_DTYPES[kept.element_size()])
    # rows are (tile, half, g), pairs are (block, half of block, q): the lane order of packed.py
    in_lanes = pairs.view(row_tiles, 2, 8, blocks, 2, 4).permute(0, 3, 2, 5, 4, 1)
    return in_lanes.contiguous().view(kept.dtype).view(row_tiles, blocks, 32, 8)


def metadata_from_bytes(nibble_bytes: Tensor, in_features: int) -> Tensor:
    """Packed ``metadata`` of nibble bytes.

    Args:
        nibble_bytes: uint8 ``[out_features, ceil(in_features / 8)]``. With an odd number of groups the high nibble
            of a row's last byte is ignored.
        in_features: inputs before padding.

    Returns:
        int32 ``[row_tiles, 32 * units]``.
    """
    rows, row_bytes = nibble_bytes.shape
    row_tiles, units = -(-rows // ROW_TILE), -(-in_features // UNIT)
    padded = nibble_bytes.new_full((row_tiles * ROW_TILE, units * UNIT // 8), _PADDING_BYTE)
    padded[:rows, :row_bytes] = nibble_bytes
    if in_features % 8:
        padded[:rows, row_bytes - 1] = nibble_bytes[:, -1] & 0x0F | (_PADDING_BYTE & 0xF0)
    # four nibbles of a row are half a word: (tile, half, g, unit, q) -> tile, unit, g, q, half
    words = padded.view(torch.int16).view(row_tiles, 2, 8, units, 4).permute(0, 3, 2, 4, 1).contiguous()
    return interleave_units(words.view(torch.int32).view(row_tiles, units, 32))


def pack_rows(kept: Tensor, nibble_bytes: Tensor, in_features: int) -> Packed24:
    """Packed weight of kept values and nibble bytes in row order."""
    return Packed24(values_from_rows(kept), metadata_from_bytes(nibble_bytes, in_features), kept.shape[0], in_features)


def packed_nibble_bytes(packed: Packed24) -> Tensor:
    """Nibble bytes of a packed weight: uint8 ``[out_features, ceil(in_features / 8)]``.

    With an odd number of groups the high nibble of a row's last byte is that of the padding, 0xE.
    """
    words = separate_units(packed.metadata).contiguous()  # [row_tiles, units, 32]
    row_tiles, units, _ = words.shape
    quads = words.view(torch.int16).view(row_tiles, units, 8, 4, 2).permute(0, 4, 2, 1, 3)
    rows = quads.contiguous().view(torch.uint8).view(row_tiles * ROW_TILE, -1)
    return rows[: packed.out_features, : -(-packed.in_features // 8)].contiguous()


def check_nibbles(packed: Packed24, name: str) -> Packed24:
    """Return ``packed`` if all its metadata is legal.

    Raises:
        SparsityError: some nibble is none of the six that name two positions.
    """
    legal = tuple(int(MASK_OF_NIBBLE[byte & 0xF] != 0 and MASK_OF_NIBBLE[byte >> 4] != 0) for byte in range(256))
    if not bool(byte_lookup(legal, packed.metadata.view(torch.uint8)).all()):
        nibbles_to_mask(packed_nibbles(packed), name)  # finds the place and raises
    return packed
