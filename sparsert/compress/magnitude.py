"""Magnitude pruning: in every group of four inputs the two largest absolute values stay.

The baseline of the field: no data, no training, milliseconds a layer. It gives up quality: a model
of 135 million parameters loses nearly all of its language by it (perplexity 20 -> 4412 on
WikiText-2), a model of 7 billion some of it; learned masks keep most.

Source: Mishra et al., "Accelerating Sparse Deep Neural Networks" (arXiv 2104.08378), section 4.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsert.errors import InputError
from sparsert.formats.nibbles import check_matrix

_INTEGER_OF_BYTES = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def magnitude_mask(weight: Tensor, *, name: str = "weight") -> Tensor:
    """2:4 mask of the two largest ``|w|`` in every group of four inputs.

    Exactly two positions a group are kept, also where values are zero; equal values go to the
    lower index, so the mask does not depend on device or dtype.

    Args:
        weight: ``[out_features, in_features]``, a floating dtype, any device.
        name: tensor name for errors.

    Returns:
        bool ``[out_features, in_features]`` on the device of ``weight``; True keeps.

    Raises:
        InputError: no matrix, width no multiple of 4, no floating dtype, or a NaN.

    Example:
        >>> magnitude_mask(torch.tensor([[0.1, -3.0, 2.0, 0.5, 1.0, 1.0, 1.0, 1.0]])).int().tolist()
        [[0, 1, 1, 0, 1, 1, 0, 0]]
    """
    check_matrix(weight, name)
    if not weight.dtype.is_floating_point or weight.dtype.itemsize < 2:
        raise InputError(f"{name}: got {weight.dtype}; magnitudes need a float type of 16 bits or more")
    # As integers without the sign bit, floats order by magnitude, and NaN stands above infinity.
    integer = _INTEGER_OF_BYTES[weight.dtype.itemsize]
    bits = weight.detach().contiguous().view(integer) & torch.iinfo(integer).max
    infinity = int(torch.tensor(float("inf"), dtype=weight.dtype).view(integer))
    if int(bits.max()) > infinity:
        count = int((bits > infinity).sum())
        raise InputError(f"{name}: {count} of {weight.numel()} values are NaN; the checkpoint is damaged, get it again")
    return two_largest(bits)


def two_largest(scores: Tensor) -> Tensor:
    """The two largest of every four neighbours in a row; of equals the earlier one.

    Nothing is checked and nothing waits for the device.

    Args:
        scores: ``[rows, columns]``, any type that can be compared, without NaN.

    Returns:
        bool ``[rows, columns]``; exactly two of four are True.

    Example:
        >>> two_largest(torch.tensor([[1, 3, 3, 2], [0, 0, 0, 0]])).int().tolist()
        [[0, 1, 1, 0], [1, 1, 0, 0]]
    """
    magnitude = scores.reshape(-1, 4).t().contiguous()  # [4, groups]: the positions of a group in rows of their own
    # A value's rank is the number of others that beat it. Six comparisons, and ties fall as wanted: of two
    # equals the one with the lower index wins. torch.topk promises no order among equals.
    rank = torch.empty_like(magnitude, dtype=torch.uint8)
    for position in range(4):
        rank[position] = 3 - position  # as if every later position won
    for low in range(4):
        for high in range(low + 1, 4):
            low_wins = (magnitude[low] >= magnitude[high]).view(torch.uint8)
            rank[low] -= low_wins
            rank[high] += low_wins
    return (rank < 2).t().contiguous().view(scores.shape)
