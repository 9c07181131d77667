"""Magnitude masks: against brute force, and on ties, zeros, infinities and NaN."""

from __future__ import annotations

import pytest
import torch

from sparsert.compress import magnitude_mask
from sparsert.errors import InputError


def brute_force(weight: torch.Tensor) -> torch.Tensor:
    mask = torch.zeros(weight.shape, dtype=torch.bool)
    for row in range(weight.shape[0]):
        for first in range(0, weight.shape[1], 4):
            group = [abs(float(value)) for value in weight[row, first : first + 4]]
            for position in sorted(range(4), key=lambda p: (-group[p], p))[:2]:
                mask[row, first + position] = True
    return mask


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1, 4), (3, 20), (17, 36), (64, 128)])
def test_equals_brute_force(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    weight = torch.randn(shape).to(dtype)
    assert torch.equal(magnitude_mask(weight), brute_force(weight))


def test_many_ties() -> None:
    weight = torch.randint(-2, 3, (50, 64)).float()
    mask = magnitude_mask(weight)
    assert torch.equal(mask, brute_force(weight))
    assert bool((mask.view(-1, 4).sum(-1) == 2).all())


def test_ties_go_to_the_lower_index_and_zeros_still_keep_two() -> None:
    weight = torch.tensor([[0.0, 0.0, 0.0, 0.0, -1.0, 1.0, 1.0, -1.0, 0.0, 0.0, 0.0, 5.0, -0.0, 2.0, 0.0, 2.0]])
    assert magnitude_mask(weight).int().tolist() == [[1, 1, 0, 0, 1, 1, 0, 0, 1, 0, 0, 1, 0, 1, 0, 1]]


def test_infinities_are_the_largest() -> None:
    weight = torch.tensor([[1.0, float("inf"), 2.0, -float("inf")]])
    assert magnitude_mask(weight).int().tolist() == [[0, 1, 0, 1]]


def test_transposed_weights() -> None:
    weight = torch.randn(24, 12).t()
    assert torch.equal(magnitude_mask(weight), brute_force(weight))


def test_what_is_refused() -> None:
    weight = torch.randn(4, 8)
    weight[2, 3] = float("nan")
    with pytest.raises(InputError, match=r"layers\.3\.up: 1 of 32 values are NaN"):
        magnitude_mask(weight, name="layers.3.up")
    with pytest.raises(InputError, match="input width 6 is no multiple of 4"):
        magnitude_mask(torch.randn(4, 6))
    with pytest.raises(InputError, match=r"got shape \(4,\)"):
        magnitude_mask(torch.randn(4))
    for dtype in (torch.int8, torch.float8_e4m3fn, torch.bool):
        with pytest.raises(InputError, match="need a float type"):
            magnitude_mask(torch.ones(4, 8).to(dtype))
