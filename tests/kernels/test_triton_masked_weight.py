"""The Triton kernels of the soft mask against the reference: same noise, same numbers, nothing written elsewhere."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparsert.ops.masked_weight import masked_weight_backward_reference, masked_weight_reference

pytest.importorskip("triton")

from sparsert.kernels.masked_weight import masked_weight, masked_weight_backward

SHAPES = [(1, 4), (3, 20), (7, 1172)]
if torch.cuda.is_available():
    SHAPES += [(4096, 4096), (1536, 576), (1001, 4100)]

DTYPES = [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)]


def problem(
    shape: tuple[int, int], weights: torch.dtype, logits: torch.dtype, device: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    groups = shape[0] * shape[1] // 4
    return (
        torch.randn(shape, device=device).to(weights),
        (torch.randn(groups, 6, device=device) * 0.02).to(logits),
        torch.tensor([150.0, 1.7, 0.3], device=device),
        torch.tensor([2**40 + 77], device=device),
    )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("weights", "logits"), DTYPES)
def test_equals_the_reference(shape: tuple[int, int], weights: torch.dtype, logits: torch.dtype, device: str) -> None:
    arguments = problem(shape, weights, logits, device)
    # a rounding of the result and no more: the arithmetic of both is fp32
    close = {"rtol": 1e-2, "atol": 1e-4} if weights == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(masked_weight(*arguments), masked_weight_reference(*arguments), **close)
    gradient = torch.randn(shape, device=device).to(weights)
    ours = masked_weight_backward(gradient, *arguments)
    assert ours.dtype == logits
    expected = masked_weight_backward_reference(gradient, *arguments)
    close = {"rtol": 1e-2, "atol": 1e-2} if logits == torch.bfloat16 else {"rtol": 1e-3, "atol": 1e-3}
    torch.testing.assert_close(ours, expected, **close)


def test_seeds_draw_other_noise(device: str) -> None:
    weight, logits, controls, seed = problem((8, 64), torch.float32, torch.float32, device)
    first = masked_weight(weight, logits, controls, seed)
    assert torch.equal(first, masked_weight(weight, logits, controls, seed))
    assert not torch.equal(first, masked_weight(weight, logits, controls, seed + 1))
    # the upper half of a seed counts as well
    assert not torch.equal(first, masked_weight(weight, logits, controls, seed + 2**32))


def test_low_temperature_gives_whole_masks(device: str) -> None:
    weight, logits, _, seed = problem((16, 128), torch.float32, torch.float32, device)
    masked = masked_weight(weight, logits, torch.tensor([500.0, 1e-3, 0.0], device=device), seed)
    kept = (masked.abs() > 1e-6 * weight.abs()).view(-1, 4).sum(1)
    # two candidates nearly tied still share a group now and then
    assert float((kept == 2).float().mean()) > 0.99


def test_nothing_beyond_the_last_group_is_written(device: str) -> None:
    weight, logits, controls, seed = problem((3, 20), torch.float32, torch.float32, device)
    import sparsert.kernels.masked_weight as kernels

    room = torch.full((2048, 4), float("nan"), device=device)
    kernels._masked_weight_kernel[(1,)](weight, logits, controls, seed, room, 15, BLOCK=512)
    assert bool(room[:15].isfinite().all()) and bool(room[15:].isnan().all())
    room = torch.full((2048, 6), float("nan"), device=device)
    kernels._masked_weight_backward_kernel[(1,)](weight, weight, logits, controls, seed, room, 15, BLOCK=512)
    assert bool(room[:15].isfinite().all()) and bool(room[15:].isnan().all())
