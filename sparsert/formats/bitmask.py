"""The ``sparse-24-bitmask`` tensors of compressed-tensors, to and from the packed layout.

This is also what this project writes to disk (docs/format.md): a format that other tools have read, in which
nothing depends on a GPU generation. For a weight ``[rows, columns]``:

    compressed  [rows, columns / 2]               kept values in column order, the weight's dtype
    bitmask     uint8 [rows, ceil(columns / 8)]   bit j of byte c is column 8 c + j
    shape       int64 [2, 1]                      rows, columns

Bits are little-endian within a byte and rows start on a byte (MaskLLM's are big-endian and flat:
``maskllm.py``). Every group of four has exactly two bits, also where fewer values are non-zero; the
kept value is then a zero. So a byte is two groups, one table turns it into two metadata nibbles, and
both directions are exact. With a width that is a multiple of 4 but not of 8 the last byte of a row
has four bits and four zeros. A group with another number of bits is refused: the position of every
later value in its row would be a guess.

Source: compressed-tensors up to 0.14, ``sparse_24_bitmask.py`` (``packbits(bitorder="little")``).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparsert.errors import InputError, SparsityError
from sparsert.formats.groups import comparable
from sparsert.formats.nibbles import MASK_OF_NIBBLE, NIBBLE_OF_MASK, check_matrix, mask_to_nibbles
from sparsert.formats.packed import PACKED_DTYPES, Packed24, packed_kept_values
from sparsert.formats.rows import byte_lookup, check_nibbles, pack_rows, packed_nibble_bytes

#: Dense weights are read and written in slices of about this many values: positions take eight bytes each.
_SLICE_VALUES = 1 << 22

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

_MASKS_OF_NIBBLES = tuple(MASK_OF_NIBBLE[byte & 0xF] | MASK_OF_NIBBLE[byte >> 4] << 4 for byte in range(256))


def _nibbles_of_two_bits(mask: int) -> int:
    """Nibble of a four-bit mask, 0 unless it has exactly two bits."""
    return NIBBLE_OF_MASK[mask] if bin(mask).count("1") == 2 else 0


_NIBBLES_OF_MASKS = tuple(
    _nibbles_of_two_bits(byte & 0xF) | _nibbles_of_two_bits(byte >> 4) << 4 for byte in range(256)
)
_ALL_TWO_BITS = tuple(int(byte & 0xF != 0 and byte >> 4 != 0) for byte in _NIBBLES_OF_MASKS)


def to_bitmask(packed: Packed24, name: str = "weight") -> dict[str, Tensor]:
    """The three tensors of sparse-24-bitmask.

    Args:
        packed: any packed weight.
        name: tensor name for errors.

    Returns:
        ``{"compressed": [rows, columns / 2], "bitmask": uint8 [rows, ceil(columns / 8)], "shape": int64 [2, 1]}``
        on the weight's device (shape on the CPU).

    Raises:
        SparsityError: the metadata is damaged.

    Example:
        >>> from sparsert.formats import pack_reference
        >>> to_bitmask(pack_reference(torch.tensor([[1.0, 0, 0, 2, 0, 3, 4, 0]])))["bitmask"].tolist()
        [[105]]
    """
    check_nibbles(packed, name)
    bitmask = byte_lookup(_MASKS_OF_NIBBLES, packed_nibble_bytes(packed))
    if packed.in_features % 8:
        bitmask[:, -1] &= 0x0F  # the other half of the byte is padding of ours
    return {
        "compressed": packed_kept_values(packed),
        "bitmask": bitmask,
        "shape": torch.tensor([[packed.out_features], [packed.in_features]], dtype=torch.int64),
    }


def from_bitmask(compressed: Tensor, bitmask: Tensor, shape: Tensor | Sequence[int], name: str = "weight") -> Packed24:
    """Packed weight from the tensors of sparse-24-bitmask.

    Args:
        compressed: ``[rows, columns / 2]``, bf16, fp16 or fp32.
        bitmask: uint8 ``[rows, ceil(columns / 8)]``, same device.
        shape: ``rows, columns`` as an int64 tensor of two elements or a sequence.
        name: tensor name for errors.

    Returns:
        The packed weight on the same device; :func:`to_bitmask` of it gives the same tensors back.

    Raises:
        InputError: shapes, dtypes or devices do not fit.
        SparsityError: a group does not have exactly two bits, or bits are set past the last column.
    """
    check_packable_parts(compressed, bitmask, shape, name)
    nibble_bytes, columns = _nibble_bytes(compressed, bitmask, shape, name)
    return pack_rows(compressed, nibble_bytes, columns)


def check_packable_parts(
    compressed: Tensor, bitmask: Tensor, shape: Tensor | Sequence[int], name: str
) -> tuple[int, int]:
    """Check what every packer of these tensors needs but the bits themselves; return ``(rows, columns)``.

    Raises:
        InputError: shapes, dtypes or devices do not fit.
    """
    if compressed.dtype not in PACKED_DTYPES or compressed.device != bitmask.device:
        raise InputError(
            f"{name}: got compressed {compressed.dtype} on {compressed.device} and bitmask {bitmask.dtype} on "
            f"{bitmask.device}; need bfloat16, float16 or float32 and uint8 on one device"
        )
    return _check_sizes(compressed, bitmask, shape, name)


def bitmask_from_dense(weight: Tensor, name: str = "weight") -> dict[str, Tensor]:
    """The three tensors of sparse-24-bitmask, straight from a dense weight with zeros.

    Bits move as they are, NaN payloads included; -0.0 counts as zero and becomes +0. A group that keeps fewer than
    two values names the positions that :data:`~sparsert.formats.nibbles.NIBBLE_OF_MASK` does, so the result is that
    of :func:`to_bitmask` after packing.

    Args:
        weight: ``[rows, columns]``, any float dtype, ``columns`` a multiple of 4.
        name: tensor name for errors.

    Returns:
        As :func:`to_bitmask`.

    Raises:
        SparsityError: some group keeps three or four values.
        InputError: no matrix, or a width that is no multiple of 4.

    Example:
        >>> bitmask_from_dense(torch.tensor([[1.0, 0, 0, 2, 0, 3, 4, 0]]))["compressed"].tolist()
        [[1.0, 2.0, 3.0, 4.0]]
    """
    rows, columns = check_matrix(weight, name)
    bits = weight.view(_INTEGERS[weight.element_size()])
    compressed = bits.new_empty(rows, columns // 2)
    bitmask = torch.zeros(rows, -(-columns // 8), dtype=torch.uint8, device=weight.device)
    without_sign = 2 ** (8 * weight.element_size() - 1) - 1
    masks = torch.tensor(MASK_OF_NIBBLE, dtype=torch.uint8, device=weight.device)
    try:
        for part in _slices(rows, columns):
            nibbles = mask_to_nibbles(bits[part] & without_sign, name)
            index = torch.stack([nibbles & 3, nibbles >> 2], dim=-1).long()
            values = bits[part].unflatten(1, (-1, 4)).gather(-1, index).flatten(1)
            compressed[part] = values * ((values & without_sign) != 0)  # a spare slot that held -0.0 holds +0
            two_masks = masks[nibbles.int()]
            bitmask[part] = two_masks[:, ::2]
            bitmask[part][:, : columns // 8] |= two_masks[:, 1::2] << 4
    except SparsityError:
        mask_to_nibbles(comparable(weight) != 0, name)  # counts in the whole weight, not in a slice, and raises
        raise
    shape = torch.tensor([[rows], [columns]], dtype=torch.int64)
    return {"compressed": compressed.view(weight.dtype), "bitmask": bitmask, "shape": shape}


def dense_from_bitmask(
    compressed: Tensor, bitmask: Tensor, shape: Tensor | Sequence[int], name: str = "weight"
) -> Tensor:
    """Dense weight from the tensors of sparse-24-bitmask, bit for bit, +0 where nothing is kept.

    Args:
        compressed, bitmask, shape, name: as :func:`from_bitmask`, but any dtype of values.

    Returns:
        ``[rows, columns]`` in the dtype and on the device of ``compressed``.

    Raises:
        InputError, SparsityError: as :func:`from_bitmask`.
    """
    nibble_bytes, columns = _nibble_bytes(compressed, bitmask, shape, name)
    rows = compressed.shape[0]
    values = compressed.contiguous().view(_INTEGERS[compressed.element_size()]).view(rows, columns // 4, 2)
    dense = values.new_zeros(rows, columns // 4, 4)
    for part in _slices(rows, columns):
        nibbles = torch.stack([nibble_bytes[part] & 0xF, nibble_bytes[part] >> 4], dim=-1).flatten(1)[:, : columns // 4]
        index = torch.stack([nibbles & 3, nibbles >> 2], dim=-1).long()
        dense[part].scatter_(-1, index, values[part])
    return dense.view(rows, columns).view(compressed.dtype)


def bitmask_columns(bitmask: Tensor, begin: int, count: int) -> Tensor:
    """The bitmask of some neighbouring columns of a weight: what one of several GPUs needs that share its inputs.

    Args:
        bitmask: uint8 ``[rows, bytes]`` of the whole weight, bits as above; they are not checked.
        begin: first column, a multiple of 4.
        count: how many columns, a multiple of 4.

    Returns:
        uint8 ``[rows, ceil(count / 8)]`` on the same device: a view, or a copy where bits have to move.

    Raises:
        InputError: the columns are no whole groups, or not all there.

    Example:
        >>> bitmask_columns(torch.tensor([[0x69, 0x05]], dtype=torch.uint8), 4, 8).tolist()
        [[86]]
    """
    stored = 8 * bitmask.shape[1]
    if begin % 4 or count % 4 or begin < 0 or count < 4 or begin + count > stored:
        raise InputError(
            f"columns {begin} to {begin + count} of a bitmask of {stored} were asked for; give whole groups of four "
            "inside it"
        )
    first, nbytes = begin // 8, -(-count // 8)
    if begin % 8 == 0:
        part = bitmask[:, first : first + nbytes]
    else:  # a byte is the high half of one and the low half of the next
        part = bitmask[:, first : first + nbytes] >> 4
        following = bitmask[:, first + 1 : first + 1 + nbytes]
        part[:, : following.shape[1]] |= following << 4
    if count % 8:
        part = part.clone()
        part[:, -1] &= 0x0F
    return part


def _slices(rows: int, columns: int) -> list[slice]:
    step = max(1, _SLICE_VALUES // columns)
    return [slice(begin, min(begin + step, rows)) for begin in range(0, rows, step)]


def _nibble_bytes(compressed: Tensor, bitmask: Tensor, shape: Tensor | Sequence[int], name: str) -> tuple[Tensor, int]:
    """Two metadata nibbles for each byte of a bitmask that fits the values, and the width.

    With an odd number of groups the high nibble of a row's last byte stands for nothing.
    """
    _, columns = _check_sizes(compressed, bitmask, shape, name)
    return byte_lookup(_NIBBLES_OF_MASKS, _checked_bits(bitmask, columns, name)), columns


def check_bitmask(bitmask: Tensor, columns: int, name: str = "weight") -> None:
    """Check the bits of sparse-24-bitmask.

    Args:
        bitmask: uint8 ``[rows, ceil(columns / 8)]``.
        columns: of the weight, a multiple of 4.
        name: tensor name for errors.

    Raises:
        SparsityError: a group does not have exactly two bits, or bits are set past the last column.
    """
    _checked_bits(bitmask, columns, name)


def _checked_bits(bitmask: Tensor, columns: int, name: str) -> Tensor:
    """The bitmask, with any two bits for the half of a row's last byte that stands for nothing."""
    if columns % 8:
        if bool((bitmask[:, -1] > 0x0F).any()):
            row = int((bitmask[:, -1] > 0x0F).to(torch.uint8).argmax())
            raise SparsityError(f"{name}: row {row} of the bitmask has bits past its {columns} columns; it is damaged")
        bitmask = bitmask.clone()
        bitmask[:, -1] |= 0xC0  # the padding of the packed layout takes their place
    if not bool(byte_lookup(_ALL_TWO_BITS, bitmask).all()):
        raise _bits_error(bitmask, name)
    return bitmask


def _check_sizes(compressed: Tensor, bitmask: Tensor, shape: Tensor | Sequence[int], name: str) -> tuple[int, int]:
    rows, columns = _dimensions(shape, name)
    if columns % 4:
        raise InputError(f"{name}: width {columns} is no multiple of 4, so it cannot be 2:4; the tensors are damaged")
    expected = (rows, columns // 2), (rows, -(-columns // 8))
    if (tuple(compressed.shape), tuple(bitmask.shape)) != expected or bitmask.dtype != torch.uint8:
        raise InputError(
            f"{name}: got compressed {tuple(compressed.shape)} and bitmask {tuple(bitmask.shape)} {bitmask.dtype}, "
            f"need {expected[0]} and uint8 {expected[1]} for a weight [{rows}, {columns}]; the file is damaged or of "
            f"another format"
        )
    return rows, columns


def _dimensions(shape: Tensor | Sequence[int], name: str) -> tuple[int, int]:
    sizes = [int(size) for size in (shape.flatten().tolist() if isinstance(shape, Tensor) else shape)]
    if len(sizes) != 2 or min(sizes) < 1:
        raise InputError(f"{name}: got shape {sizes}; sparse-24-bitmask stores a matrix, two positive sizes")
    return sizes[0], sizes[1]


def _bits_error(bitmask: Tensor, name: str) -> SparsityError:
    groups = torch.stack([bitmask & 0xF, bitmask >> 4], dim=-1).flatten(1)
    counts = sum(((groups >> position) & 1 for position in range(4)), torch.zeros_like(groups))
    bad = counts != 2
    row, group = divmod(int(bad.flatten().to(torch.uint8).argmax()), groups.shape[1])
    return SparsityError(
        f"{name}: {int(bad.sum())} groups of the bitmask do not have exactly 2 of 4 bits, the first in row {row}, "
        f"columns {4 * group}-{4 * group + 3} ({int(counts[row, group])} bits); "
        f"sparse-24-bitmask always has two, so the file is damaged or of another format"
    )
