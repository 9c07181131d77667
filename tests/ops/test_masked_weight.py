"""The soft mask: its formula against plain torch, its noise, its gradient, and the operator's contract."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from sparsert.errors import InputError
from sparsert.ops import CANDIDATES, candidate_masks, hard_mask, masked_weight
from sparsert.ops.masked_weight import _philox, gumbel_noise


def problem(rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    weight = torch.randn(rows, columns)
    logits = torch.randn(rows * columns // 4, 6) * 0.02
    return weight, logits, torch.tensor([150.0, 1.7, 0.3]), torch.tensor([2**40 + 12345])


def plain(weight: Tensor, logits: Tensor, controls: Tensor, seed: Tensor) -> tuple[Tensor, Tensor]:
    """What the formula says, for autograd: the masked weight, and the regularised part of the loss."""
    scale, temperature, regularisation = controls.tolist()
    noise = gumbel_noise(len(logits), int(seed)).to(logits.dtype)
    chosen = functional.softmax((logits * scale + noise) / temperature, dim=-1)
    masked = weight * (chosen @ candidate_masks().to(logits.dtype)).view(weight.shape)
    return masked, -regularisation * masked.square().sum()


@pytest.mark.parametrize("shape", [(1, 4), (5, 12), (33, 100)])
def test_forward_and_gradient_are_those_of_the_formula(shape: tuple[int, int]) -> None:
    weight, logits, controls, seed = problem(*shape)
    exact = logits.double().requires_grad_()
    masked, regularised = plain(weight.double(), exact, controls, seed)
    direction = torch.randn(shape)
    ((masked * direction).sum() + regularised).backward()

    logits.requires_grad_()
    ours = masked_weight(weight, logits, controls, seed)
    torch.testing.assert_close(ours.double(), masked.detach(), rtol=1e-4, atol=1e-5)
    (ours * direction).sum().backward()
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=1e-3, atol=1e-3)


def test_bf16_logits_and_weights() -> None:
    weight, logits, controls, seed = problem(17, 64)
    weight, logits = weight.bfloat16(), logits.bfloat16().requires_grad_()
    ours = masked_weight(weight, logits, controls, seed)
    assert ours.dtype == torch.bfloat16
    expected, _ = plain(weight.float(), logits.detach().float(), controls, seed)
    torch.testing.assert_close(ours.float(), expected, rtol=1e-2, atol=1e-2)
    ours.sum().backward()
    assert logits.grad.dtype == torch.bfloat16 and bool(logits.grad.any())


def test_philox_is_the_published_one() -> None:
    """Test vectors of Random123, the authors' implementation (kat_vectors, philox4x32 10)."""
    zero = _philox(0, torch.tensor([0]), torch.tensor([0]), 0, 0)
    assert [int(word) for word in zero] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    ones = _philox(2**64 - 1, torch.tensor([2**32 - 1]), torch.tensor([2**32 - 1]), 2**32 - 1, 2**32 - 1)
    assert [int(word) for word in ones] == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


def test_noise_is_gumbel_and_differs_between_seeds_and_candidates() -> None:
    noise = gumbel_noise(40_000, 7)
    assert float(noise.mean()) == pytest.approx(0.5772, abs=0.02)
    assert float(noise.var()) == pytest.approx(np.pi**2 / 6, rel=0.03)
    assert bool(noise.isfinite().all())
    together = torch.cat([noise, gumbel_noise(40_000, 8), gumbel_noise(40_000, 7 + 2**32)], dim=1)
    correlation = torch.corrcoef(together.t()) - torch.eye(18)
    assert float(correlation.abs().max()) < 0.03
    assert torch.equal(gumbel_noise(100, 7), noise[:100])


def test_choice_follows_the_logits() -> None:
    """At low temperature a candidate is drawn as often as its softmax says."""
    logits = torch.log(torch.tensor([[0.4, 0.25, 0.15, 0.1, 0.06, 0.04]])).repeat(30_000, 1)
    controls = torch.tensor([1.0, 1e-3, 0.0])
    mask = masked_weight(torch.ones(30_000, 4), logits, controls, torch.tensor([5])).round()
    drawn = torch.tensor([float((mask[:, list(pair)].sum(1) == 2).float().mean()) for pair in CANDIDATES])
    torch.testing.assert_close(drawn, logits[0].exp(), rtol=0, atol=0.012)


def test_hard_masks() -> None:
    logits = torch.randn(60, 6)
    mask = hard_mask(logits, (10, 24))
    expected = candidate_masks()[logits.argmax(1)].view(10, 24).bool()
    assert torch.equal(mask, expected)
    assert hard_mask(torch.zeros(1, 6), (1, 4)).tolist() == [[True, True, False, False]]
    tied = torch.tensor([[0.0, 1.0, 0.0, 1.0, 1.0, 0.0]])
    assert hard_mask(tied, (1, 4)).tolist() == [[True, False, True, False]]


def test_operator_contract() -> None:
    weight, logits, controls, seed = problem(6, 20)
    logits.requires_grad_()
    torch.library.opcheck(torch.ops.sparsert.masked_weight.default, (weight, logits, controls, seed))


@pytest.mark.slow
def test_compiles_without_a_break() -> None:
    weight, logits, controls, seed = problem(6, 20)
    logits.requires_grad_()
    x = torch.randn(3, 20)

    def layer(controls: Tensor, seed: Tensor) -> Tensor:
        return functional.linear(x, masked_weight(weight, logits, controls, seed)).square().sum()

    compiled = torch.compile(layer, fullgraph=True)
    for step in range(2):
        step_controls, step_seed = controls / (step + 1), seed + step
        (expected,) = torch.autograd.grad(layer(step_controls, step_seed), logits)
        (found,) = torch.autograd.grad(compiled(step_controls, step_seed), logits)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_what_is_refused() -> None:
    weight, logits, controls, seed = problem(6, 20)
    with pytest.raises(InputError, match=r"weight is \(20, 6\) .* width is a multiple of 4"):
        masked_weight(weight.t().contiguous(), logits, controls, seed)
    with pytest.raises(InputError, match="a mask is learned for a contiguous matrix"):
        masked_weight(torch.randn(20, 8).t(), logits, controls, seed)
    with pytest.raises(InputError, match=r"logits are \(29, 6\) .* needs contiguous \(30, 6\)"):
        masked_weight(weight, logits[:29], controls, seed)
    with pytest.raises(InputError, match=r"needed: \(3,\) float32 and \(1,\) int64"):
        masked_weight(weight, logits, controls.double(), seed)
