"""Random 2:4 weights and masks for the tests of formats, operators and kernels."""

from __future__ import annotations

import torch
from torch import Tensor


def random_mask(out_features: int, in_features: int, *, exact: bool = False, device: str = "cpu") -> Tensor:
    """Bool mask that keeps two values of every group, or 0, 1 or 2 at random unless ``exact``."""
    groups = (out_features, in_features // 4)
    order = torch.rand(*groups, 4, device=device).argsort(-1).argsort(-1)
    kept = torch.full((*groups, 1), 2, device=device) if exact else torch.randint(0, 3, (*groups, 1), device=device)
    return (order < kept).view(out_features, in_features)


def random_weight(
    out_features: int, in_features: int, dtype: torch.dtype, *, exact: bool = False, device: str = "cpu"
) -> tuple[Tensor, Tensor]:
    """A dense random weight and a 2:4 mask for it; the weight is not masked yet and has no zeros."""
    weight = torch.randn(out_features, in_features, device=device)
    weight = torch.where(weight.abs() < 1e-3, torch.ones_like(weight), weight).to(dtype)
    return weight, random_mask(out_features, in_features, exact=exact, device=device)


def apply_mask(weight: Tensor, mask: Tensor) -> Tensor:
    """The weight with +0 wherever the mask drops it."""
    return torch.where(mask, weight, torch.zeros_like(weight))


def raw_bits(tensor: Tensor) -> Tensor:
    """The tensor's bits as integers, so that -0.0 differs from +0 and NaN equals itself."""
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32}[tensor.element_size()])


def random_24(out_features: int, in_features: int, *, dtype: torch.dtype, device: str = "cpu") -> Tensor:
    """A random weight whose groups keep 0, 1 or 2 values."""
    return apply_mask(*random_weight(out_features, in_features, dtype, device=device))
