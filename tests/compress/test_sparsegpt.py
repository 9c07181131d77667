"""Wanda and SparseGPT on single layers: against the algorithm written out in float64, and against what they promise."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparsert.compress.sparsegpt import Hessian, sparsegpt
from sparsert.compress.wanda import InputNorms, wanda_mask
from sparsert.errors import InputError

SHAPES = [(5, 16), (24, 132), (40, 300)]


def inputs(tokens: int, width: int) -> Tensor:
    """Correlated, of different size by channel."""
    mixing = torch.randn(width, width) / width**0.5 + torch.eye(width)
    return torch.randn(tokens, width) @ mixing * (0.1 + torch.rand(width) * 3)


def hessian_of(x: Tensor, *, parts: int = 3) -> Hessian:
    hessian = Hessian(x.shape[1], x.device)
    for part in x.chunk(parts):
        hessian.add(part.unsqueeze(0))
    return hessian


def written_out(weight: Tensor, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Algorithm 1 row by row and column by column, with the inverse of the rest formed anew at every column."""
    h = (x.double().t() @ x.double()) / len(x)
    h += 0.01 * h.diagonal().mean() * torch.eye(len(h))
    w = weight.double().clone()
    kept = torch.zeros(w.shape, dtype=torch.bool)
    columns = w.shape[1]
    rest = [torch.linalg.inv(h[k:, k:]) for k in range(columns)]
    # the factor's diagonal at column k is the root of the first entry of the inverse of what is left
    scale = torch.stack([rest[k][0, 0].sqrt() for k in range(columns)])
    for k in range(columns):
        if k % 4 == 0:
            score = (w[:, k : k + 4] / scale[k : k + 4]).square()
            kept[:, k : k + 4] = torch.zeros(score.shape, dtype=torch.bool).scatter_(1, score.topk(2).indices, True)
            if mask is not None:
                kept[:, k : k + 4] = mask[:, k : k + 4]
        lost = torch.where(kept[:, k], 0.0, w[:, k])
        w[:, k:] -= torch.outer(lost / rest[k][0, 0], rest[k][0])
    return kept, w


@pytest.mark.parametrize("shape", SHAPES)
def test_sparsegpt_is_the_published_algorithm(shape: tuple[int, int]) -> None:
    weight, x = torch.randn(shape), inputs(4 * shape[1], shape[1])
    mask, updated = sparsegpt(weight, hessian_of(x))
    expected_mask, expected = written_out(weight, x)
    same = (mask == expected_mask).view(-1, 4).all(1)
    assert float(same.float().mean()) > 0.995  # ties of fp32
    rows = (mask == expected_mask).all(1)
    torch.testing.assert_close(updated[rows].double(), expected[rows], rtol=1e-3, atol=1e-3)
    assert bool((mask.view(-1, 4).sum(1) == 2).all())
    assert not bool(updated[~mask].any())


@pytest.mark.parametrize("block_size", [4, 64, 128, 512])
def test_block_size_changes_speed_and_not_the_result(block_size: int) -> None:
    weight, hessian = torch.randn(30, 260), hessian_of(inputs(900, 260))
    mask, updated = sparsegpt(weight, hessian, block_size=block_size)
    expected_mask, expected = sparsegpt(weight, hessian)
    assert float((mask == expected_mask).float().mean()) > 0.999
    rows = (mask == expected_mask).all(1)
    torch.testing.assert_close(updated[rows], expected[rows], rtol=1e-3, atol=1e-3)


def test_the_update_makes_up_for_what_is_lost() -> None:
    weight, x = torch.randn(64, 128), inputs(2000, 128)
    hessian = hessian_of(x)
    mask, updated = sparsegpt(weight, hessian)

    def error(pruned: Tensor) -> float:
        return float((x @ (weight - pruned).t()).square().mean())

    norms = InputNorms(128, x.device)
    norms.add(x)
    wanda = wanda_mask(weight, norms)
    fitted_mask, fitted = sparsegpt(weight, hessian, mask=wanda)
    assert torch.equal(fitted_mask, wanda) and not bool(fitted[~wanda].any())
    assert error(updated) < error(fitted) < error(weight * wanda)
    assert error(updated) < 0.8 * error(weight * mask)


def test_a_given_mask_is_fitted_as_the_algorithm_says() -> None:
    weight, x = torch.randn(9, 40), inputs(300, 40)
    mask = torch.rand(9, 40) < 0.5
    _, updated = sparsegpt(weight, hessian_of(x), mask=mask)
    torch.testing.assert_close(updated.double(), written_out(weight, x, mask)[1], rtol=1e-3, atol=1e-4)


def test_dead_inputs_and_little_text() -> None:
    weight, x = torch.randn(8, 24), inputs(10, 24)
    x[:, 5] = 0
    mask, updated = sparsegpt(weight, hessian_of(x, parts=1))
    assert not bool(updated[:, 5].any())
    assert bool(updated.isfinite().all()) and bool((mask.view(-1, 4).sum(1) == 2).all())


def test_bf16_weights_keep_their_dtype_and_are_not_changed() -> None:
    weight, x = torch.randn(16, 64).bfloat16(), inputs(400, 64)
    before = weight.clone()
    _, updated = sparsegpt(weight, hessian_of(x))
    assert updated.dtype == torch.bfloat16 and torch.equal(weight, before)


def test_hessian_is_a_mean_whatever_the_parts() -> None:
    x = inputs(100, 12)
    one, many = hessian_of(x, parts=1), hessian_of(x, parts=7)
    torch.testing.assert_close(one.products, x.t() @ x / 100, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(one.products, many.products, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_wanda_is_its_formula(shape: tuple[int, int]) -> None:
    weight, x = torch.randn(shape), inputs(50, shape[1])
    norms = InputNorms(shape[1], x.device)
    for part in x.chunk(4):
        norms.add(part)
    score = (weight.double().abs() * x.double().norm(dim=0)).view(-1, 4)
    expected = torch.zeros(score.shape, dtype=torch.bool).scatter_(1, score.topk(2).indices, True).view(shape)
    assert torch.equal(wanda_mask(weight, norms), expected)


def test_what_is_refused() -> None:
    weight, empty = torch.randn(4, 8), Hessian(8, torch.device("cpu"))
    with pytest.raises(InputError, match="up_proj: no calibration text reached this layer"):
        sparsegpt(weight, empty, name="up_proj")
    with pytest.raises(InputError, match="no calibration text"):
        wanda_mask(weight, InputNorms(8, torch.device("cpu")))
    x = torch.randn(9, 8)
    x[3, 2] = float("inf")
    with pytest.raises(InputError, match="its inputs overflow or are NaN; run the model in bfloat16"):
        sparsegpt(weight, hessian_of(x))
    norms = InputNorms(8, torch.device("cpu"))
    norms.add(x)
    with pytest.raises(InputError, match="its inputs overflow or are NaN"):
        wanda_mask(weight, norms)
    hessian = hessian_of(torch.randn(20, 8))
    with pytest.raises(InputError, match="block_size is 6"):
        sparsegpt(weight, hessian, block_size=6)
    with pytest.raises(InputError, match=r"the mask is \(4, 4\), the weight \(4, 8\)"):
        sparsegpt(weight, hessian, mask=torch.ones(4, 4))
    hessian.products -= 100 * torch.eye(8)
    with pytest.raises(InputError, match=r"cannot be factored with damping 0\.01"):
        sparsegpt(weight, hessian)
    with pytest.raises(InputError, match="input width 6"):
        sparsegpt(torch.randn(4, 6), hessian)
