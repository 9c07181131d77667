"""2:4 masks and the 4-bit metadata ("nibble") that NVIDIA's sparse tensor cores read.

A group is four consecutive inputs of one output row. It keeps two positions ``i0 < i1``; the
hardware wants them as one nibble ``i0 | i1 << 2``:

    kept      1100   1010   1001   0110   0101   0011      (position 0 printed first)
    i0, i1    0,1    0,2    0,3    1,2    1,3    2,3
    nibble    0x4    0x8    0xC    0x9    0xD    0xE

A group that keeps fewer than two values still names two positions; the spare slot holds a zero.
Which position pads is fixed by :data:`NIBBLE_OF_MASK` and is the choice of ``torch.sparse``, so
what is packed here equals what torch packs, bit for bit.

Source: PTX ISA, "mma.sp", sparsity metadata; ``torch/sparse/_semi_structured_conversions.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsert.errors import InputError, SparsityError

#: Nibble for a 4-bit mask whose bit p is set when position p is kept. 0 marks "three or more kept".
NIBBLE_OF_MASK: tuple[int, ...] = (
    0xE, 0x8, 0x9, 0x4,  # 0000 1000 0100 1100
    0xE, 0x8, 0x9, 0x0,  # 0010 1010 0110 1110
    0xE, 0xC, 0xD, 0x0,  # 0001 1001 0101 1101
    0xE, 0x0, 0x0, 0x0,  # 0011 1011 0111 1111
)  # fmt: skip

#: 4-bit mask (bit p = position p) named by each nibble; 0 for the ten nibbles that are not legal.
MASK_OF_NIBBLE: tuple[int, ...] = (0, 0, 0, 0, 0x3, 0, 0, 0, 0x5, 0x6, 0, 0, 0x9, 0xA, 0xC, 0)


def _lookup(table: tuple[int, ...], index: Tensor) -> Tensor:
    entries = torch.tensor(table, dtype=torch.uint8, device=index.device)
    return entries.index_select(0, index.flatten().to(torch.int32)).view(index.shape)


def check_matrix(tensor: Tensor, name: str) -> tuple[int, int]:
    """Return ``(out_features, in_features)`` of a weight or mask, or say why it cannot be 2:4.

    Raises:
        InputError: not two-dimensional, empty, or the input width is no multiple of 4.
    """
    if tensor.dim() != 2 or tensor.numel() == 0:
        raise InputError(
            f"{name}: got shape {tuple(tensor.shape)}; a 2:4 weight is a non-empty matrix [out_features, in_features]"
        )
    rows, columns = tensor.shape
    if columns % 4:
        raise InputError(
            f"{name}: input width {columns} is no multiple of 4, so it has no groups of four; keep this layer dense"
        )
    return rows, columns


def sparsity_error(name: str, bad_groups: int, rows: int, columns: int, first_group: int) -> SparsityError:
    """The one message for a matrix that breaks 2:4.

    Args:
        name: tensor name the user knows, e.g. ``model.layers.3.mlp.up_proj.weight``.
        bad_groups: how many groups keep three or four values.
        rows, columns: shape of the matrix.
        first_group: flat index of the first such group, row-major over ``[rows, columns // 4]``.
    """
    groups = rows * columns // 4
    row, group = divmod(first_group, columns // 4)
    return SparsityError(
        f"{name}: {bad_groups} of {groups} groups keep more than 2 of 4 values, the first in row {row}, "
        f"columns {4 * group}-{4 * group + 3}; run `sparsert inspect` to see which layers are 2:4, "
        f"prune this one (`sparsert prune`), or keep it dense"
    )


def mask_to_nibbles(mask: Tensor, name: str = "mask") -> Tensor:
    """Metadata nibbles of a 2:4 mask.

    Args:
        mask: ``[out_features, in_features]``, bool or any number dtype; non-zero keeps.
        name: tensor name for the error message.

    Returns:
        uint8 ``[out_features, in_features // 4]``, one nibble (0-15) per byte.

    Raises:
        SparsityError: some group keeps three or four values.
        InputError: not a matrix, or the input width is no multiple of 4.

    Example:
        >>> mask_to_nibbles(torch.tensor([[1, 0, 1, 0, 0, 0, 1, 1]])).tolist()
        [[8, 14]]
    """
    rows, columns = check_matrix(mask, name)
    # four bools are one 32-bit word of four 0/1 bytes; the multiplication gathers them as bits of the highest byte
    words = (mask != 0).contiguous().view(torch.int32)
    nibbles = _lookup(NIBBLE_OF_MASK, ((words * 0x01020408) >> 24) & 0xF)
    bad = nibbles == 0
    if bool(bad.any()):
        first = int(bad.flatten().to(torch.uint8).argmax())
        raise sparsity_error(name, int(bad.sum()), rows, columns, first)
    return nibbles


def nibbles_to_mask(nibbles: Tensor, name: str = "metadata") -> Tensor:
    """Mask of the two positions each nibble names (the inverse of :func:`mask_to_nibbles` up to padding).

    Args:
        nibbles: uint8 ``[out_features, in_features // 4]``.

    Returns:
        bool ``[out_features, in_features]`` with exactly two True in every group.

    Raises:
        SparsityError: some byte is none of the six legal nibbles.
    """
    bits = _lookup(MASK_OF_NIBBLE, nibbles & 0xF)
    bad = (bits == 0) | (nibbles > 0xF)
    if bool(bad.any()):
        row, group = divmod(int(bad.flatten().to(torch.uint8).argmax()), nibbles.shape[1])
        raise SparsityError(
            f"{name}: {int(bad.sum())} groups hold no legal 2:4 nibble (4, 8, 9, 12, 13, 14), the first in row {row}, "
            f"group {group} (value {int(nibbles[row, group])}); the metadata is damaged or of another format"
        )
    positions = torch.arange(4, device=nibbles.device, dtype=torch.uint8)
    return ((bits.unsqueeze(-1) >> positions) & 1).bool().view(nibbles.shape[0], -1)
