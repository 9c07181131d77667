"""MaskLLM's compressed masks: flat big-endian bits, to masks and to metadata nibbles.

``mask_compressed.npz`` holds one uint8 vector a parameter: its mask flattened row by row, eight
elements a byte, the first in the highest bit (``numpy.packbits`` with its defaults), the last byte
filled with zeros. The shape is not stored; it is that of the dense weight. Rows do not start on a
byte of their own, but as widths are multiples of 4 every group of four is one half of a byte, the
earlier group in the high half. A table of 256 therefore gives two nibbles a byte, without ever making
the mask, which is eight times the size of the bits.

Reimplemented from the format alone (its documentation and a file), not from MaskLLM's code.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparsert.errors import InputError
from sparsert.formats.nibbles import NIBBLE_OF_MASK, check_matrix, sparsity_error
from sparsert.formats.rows import byte_lookup

if TYPE_CHECKING:
    import numpy

_REVERSED_BITS = tuple(int(f"{half:04b}"[::-1], 2) for half in range(16))  # highest bit first -> position 0 lowest
_FIRST_NIBBLES = tuple(NIBBLE_OF_MASK[_REVERSED_BITS[byte >> 4]] for byte in range(256))
_SECOND_NIBBLES = tuple(NIBBLE_OF_MASK[_REVERSED_BITS[byte & 0xF]] for byte in range(256))


def _as_bits(bits: Tensor | numpy.ndarray, shape: Sequence[int], name: str) -> Tensor:
    """The bits as a uint8 vector whose length fits the shape."""
    vector = bits if isinstance(bits, Tensor) else torch.from_numpy(bits.copy() if not bits.flags.writeable else bits)
    elements = math.prod(shape)
    if vector.dim() != 1 or vector.dtype != torch.uint8 or vector.numel() != -(-elements // 8):
        raise InputError(
            f"{name}: got mask bits {tuple(vector.shape)} {vector.dtype}; a weight {tuple(shape)} needs a uint8 vector "
            f"of {-(-elements // 8)} bytes, one bit an element. Are the masks those of this model?"
        )
    return vector


def mask_from_maskllm_bits(bits: Tensor | numpy.ndarray, shape: Sequence[int], name: str = "mask") -> Tensor:
    """Mask of a parameter.

    Args:
        bits: uint8 ``[ceil(numel / 8)]``, big-endian, row-major.
        shape: shape of the dense weight.
        name: tensor name for errors.

    Returns:
        bool mask of that shape, True keeps, on the device of the bits.

    Raises:
        InputError: the bits are no uint8 vector of the length that the shape needs.

    Example:
        >>> mask_from_maskllm_bits(torch.tensor([0b10100011], dtype=torch.uint8), (2, 4)).int().tolist()
        [[1, 0, 1, 0], [0, 0, 1, 1]]
    """
    vector = _as_bits(bits, shape, name)
    shifts = torch.arange(7, -1, -1, dtype=torch.uint8, device=vector.device)
    # in place and reinterpreted: the mask is eight times the bits, once is enough
    flat = (vector.unsqueeze(1) >> shifts).bitwise_and_(1).view(torch.bool).flatten()
    return flat[: math.prod(shape)].view(*shape)


def nibbles_from_maskllm_bits(bits: Tensor | numpy.ndarray, shape: Sequence[int], name: str = "mask") -> Tensor:
    """Metadata nibbles of a parameter, straight from the bits.

    A group that keeps fewer than two values is padded as ``mask_to_nibbles`` does. ``pack_nibbles`` stores
    whatever the weight holds at a padded position, so give it a weight that is already masked if there can be
    such groups (1:4 masks); with two kept values in every group it does not matter.

    Args:
        bits: uint8 ``[ceil(numel / 8)]``, big-endian, row-major.
        shape: ``(out_features, in_features)`` of the dense weight.
        name: tensor name for errors.

    Returns:
        uint8 ``[out_features, in_features // 4]``, equal to ``mask_to_nibbles(mask_from_maskllm_bits(...))``.

    Raises:
        InputError: the bits do not fit the shape, or the shape is no matrix of a width divisible by 4.
        SparsityError: some group keeps three or four values.
    """
    rows, columns = check_matrix(torch.empty(tuple(shape), device="meta"), name)
    vector = _as_bits(bits, shape, name)
    both = torch.stack([byte_lookup(_FIRST_NIBBLES, vector), byte_lookup(_SECOND_NIBBLES, vector)], dim=1)
    nibbles = both.flatten()[: rows * columns // 4]
    bad = nibbles == 0
    if bool(bad.any()):
        raise sparsity_error(name, int(bad.sum()), rows, columns, int(bad.to(torch.uint8).argmax()))
    return nibbles.view(rows, columns // 4)


def maskllm_bits(mask: Tensor) -> Tensor:
    """Bits of a mask as MaskLLM stores them (the inverse of :func:`mask_from_maskllm_bits`).

    Args:
        mask: any shape, non-zero keeps.

    Returns:
        uint8 ``[ceil(numel / 8)]``, big-endian, row-major, on the mask's device.
    """
    kept = (mask != 0).flatten().to(torch.uint8)
    padded = torch.nn.functional.pad(kept, (0, -kept.numel() % 8)).view(-1, 8)
    bits = padded[:, 0] << 7
    for position in range(1, 8):
        bits |= padded[:, position] << (7 - position)
    return bits
