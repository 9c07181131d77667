"""AdamW with moments in 16 bits: against torch's, and that rounding keeps small updates."""

from __future__ import annotations

import copy

import pytest
import torch

from sparsert.compress.optimizer import RoundingAdamW, make_optimizer, round_at_random
from sparsert.errors import InputError

OPTIONS = {"learning_rate": 0.01, "betas": (0.9, 0.95), "epsilon": 1e-8, "weight_decay": 0.1}


def run(optimizer: torch.optim.Optimizer, parameter: torch.nn.Parameter, steps: int) -> None:
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        optimizer.step()


def test_fp32_arithmetic_is_that_of_torch() -> None:
    start = torch.randn(37, 11)
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    own = RoundingAdamW([ours], state="float32", seed=0, lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    run(own, ours, 5)
    run(make_optimizer([theirs], **OPTIONS), theirs, 5)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("state", "dtype"), [("bfloat16", torch.bfloat16), ("int8", torch.uint8)])
def test_small_moments_stay_close(state: str, dtype: torch.dtype) -> None:
    start = torch.randn(201, 50)  # the last block of 256 is not full
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    own = make_optimizer([ours], state=state, **OPTIONS)
    assert isinstance(own, RoundingAdamW)
    run(own, ours, 20)
    run(make_optimizer([theirs], **OPTIONS), theirs, 20)
    assert own.state[ours]["exp_avg_sq"].dtype == dtype
    moved = (theirs.detach() - start).norm()
    assert float((ours - theirs).detach().norm() / moved) < 0.05


def test_rounding_keeps_the_mean_where_the_nearest_would_stand_still() -> None:
    values = torch.full((1 << 16,), 1 + 1 / 1024)
    rounded = round_at_random(values, torch.Generator().manual_seed(0))
    assert set(rounded.tolist()) == {1.0, 1 + 1 / 128}
    assert abs(float(rounded.double().mean()) - (1 + 1 / 1024)) < 1e-4
    negative = round_at_random(-values, torch.Generator().manual_seed(0))
    assert torch.equal(negative, -rounded)
    exact = torch.randn(999).bfloat16()
    assert torch.equal(round_at_random(exact.float(), torch.Generator()), exact)


@pytest.mark.parametrize("state", ["bfloat16", "int8"])
def test_a_resumed_run_draws_the_same_bits(state: str) -> None:
    start = torch.randn(64, 9)
    parameter = torch.nn.Parameter(start.bfloat16())
    optimizer = make_optimizer([parameter], state=state, seed=5, **OPTIONS)
    run(optimizer, parameter, 3)
    saved, at = copy.deepcopy(optimizer.state_dict()), parameter.detach().clone()
    run(optimizer, parameter, 4)

    resumed = torch.nn.Parameter(at)
    other = make_optimizer([resumed], state=state, seed=5, **OPTIONS)
    other.load_state_dict(saved)
    run(other, resumed, 4)
    assert torch.equal(resumed, parameter)


def test_fp32_parameters_keep_bf16_moments_through_a_state() -> None:
    parameter = torch.nn.Parameter(torch.randn(8, 3))
    optimizer = make_optimizer([parameter], state="bfloat16", **OPTIONS)
    run(optimizer, parameter, 1)
    other = make_optimizer([parameter], state="bfloat16", **OPTIONS)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert other.state[parameter]["exp_avg"].dtype == torch.bfloat16
    assert other.state[parameter]["exp_avg"].data_ptr() != optimizer.state[parameter]["exp_avg"].data_ptr()


def test_int8_never_divides_by_nothing() -> None:
    """Values far below their neighbours' size move little, and none flies off."""
    start = torch.randn(4, 256)
    parameter = torch.nn.Parameter(start.clone())
    optimizer = make_optimizer([parameter], state="int8", **OPTIONS)
    for step in range(10):
        gradient = torch.randn(4, 256, generator=torch.Generator().manual_seed(step))
        gradient[:, ::2] *= 1e-6
        gradient[2] = 0
        parameter.grad = gradient
        optimizer.step()
    moved = (parameter.detach() - start).abs()
    assert float(moved.max()) < 0.5 and float(moved[0, 1::2].mean()) > 0.005
    torch.testing.assert_close(parameter[2].detach(), start[2] * (1 - 0.001) ** 10)


def test_unknown_state() -> None:
    with pytest.raises(InputError, match="optimizer state is 'int4'; choose one of float32, bfloat16, int8"):
        make_optimizer([torch.nn.Parameter(torch.zeros(1))], state="int4", **OPTIONS)
