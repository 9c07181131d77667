"""Counting what a dense weight's groups of four keep: is it 2:4, and if not, by how much.

Counted in slices of rows, so that a weight mapped from a file is read once and little is held beside it.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Rows are counted in slices of about this many values; counting takes some three bytes a value beside them.
_SLICE_VALUES = 1 << 21


def count_groups(weight: Tensor) -> tuple[int, int, int]:
    """Count along the inputs of a weight.

    Args:
        weight: ``[out_features, in_features]``, any float dtype, ``in_features`` a multiple of 4.

    Returns:
        ``(zeros, groups with three or four non-zeros, most non-zeros in a group)``.

    Example:
        >>> count_groups(torch.tensor([[1.0, 0.0, 2.0, 3.0, 0.0, 0.0, 0.0, 4.0]]))
        (4, 1, 3)
    """
    # zeros, groups too full, most in a group: on the weight's device, so that nothing waits for a slice
    found = torch.zeros(3, dtype=torch.int64, device=weight.device)
    for rows in weight.split(max(1, _SLICE_VALUES // weight.shape[1])):
        kept = (comparable(rows) != 0).contiguous()
        # four bools are one 32-bit word of four 0/1 bytes; the multiplication adds them up in the highest byte
        counts = (kept.view(torch.int32) * 0x01010101).bitwise_right_shift_(24)
        found[0] += kept.numel() - counts.sum()
        found[1] += (counts > 2).sum()
        found[2] = torch.maximum(found[2], counts.max())
    zeros, bad, fullest = found.tolist()
    return zeros, bad, fullest


def comparable(tensor: Tensor) -> Tensor:
    """8-bit floats cannot be compared everywhere; a wider copy can."""
    return tensor.float() if tensor.dtype in (torch.float8_e4m3fn, torch.float8_e5m2) else tensor


def count_not_finite(weight: Tensor) -> int:
    """How many values are NaN or infinite; integers have none.

    Example:
        >>> count_not_finite(torch.tensor([1.0, float("nan"), float("inf")]))
        2
    """
    if not weight.dtype.is_floating_point:
        return 0
    return sum(int((~comparable(part).isfinite()).sum()) for part in weight.flatten().split(_SLICE_VALUES))
