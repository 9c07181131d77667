"""AdamW, with a choice of how its two moments are kept.

``float32`` is torch's own fused AdamW. ``bfloat16`` halves the memory of the moments, ``int8`` quarters it, and that is
what makes large mask learning fit: the arithmetic is done in fp32, and what is written back is rounded at random, up or
down with the probability that keeps the mean right. Rounding to nearest would lose every update smaller than 1/256 of
the value that it is added to, which late in a schedule is all of them. The random bits follow from seed and step, so a
resumed run draws the same ones.

In ``int8`` 256 neighbours share a scale. The first moment is signed and linear; of the second the root is stored, which
halves the range of its exponents, and never as 0, since it divides: a value too small for its neighbours then moves
less than it should, never more.

Source: Loshchilov and Hutter, "Decoupled weight decay regularization" (arXiv 1711.05101); stochastic rounding as in
Zamirai et al., "Revisiting bfloat16 training" (arXiv 2010.06192); blocks as in Dettmers et al., "8-bit optimizers via
block-wise quantization" (arXiv 2110.02861).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.optim.optimizer import Optimizer, ParamsT

from sparsert.errors import InputError

#: How the moments can be kept.
STATES = ("float32", "bfloat16", "int8")

#: Values updated at once: bounds the fp32 copies beside the parameters. A multiple of the block.
_CHUNK_VALUES = 1 << 24

#: Values that share a scale in int8.
_BLOCK = 256


def make_optimizer(
    parameters: ParamsT,
    *,
    learning_rate: float,
    betas: tuple[float, float],
    epsilon: float,
    weight_decay: float,
    state: str = "float32",
    seed: int = 0,
) -> Optimizer:
    """AdamW over parameters or parameter groups.

    Args:
        parameters: tensors, or groups as torch's optimizers take them.
        learning_rate: overwritten by a schedule before every step.
        betas, epsilon, weight_decay: as in torch.
        state: one of :data:`STATES`. Parameters of 16 bits are always written back with random rounding.
        seed: of that rounding.

    Raises:
        InputError: an unknown state.
    """
    if state not in STATES:
        raise InputError(f"optimizer state is {state!r}; choose one of {', '.join(STATES)}")
    groups: list[Any] = list(parameters)
    tensors = [p for group in groups for p in (group["params"] if isinstance(group, dict) else [group])]
    options: dict[str, Any] = {"lr": learning_rate, "betas": betas, "eps": epsilon, "weight_decay": weight_decay}
    if state == "float32" and all(tensor.dtype == torch.float32 for tensor in tensors):
        return torch.optim.AdamW(groups, fused=all(tensor.is_cuda for tensor in tensors), **options)
    return RoundingAdamW(groups, state=state, seed=seed, **options)


class RoundingAdamW(Optimizer):
    """AdamW in fp32 arithmetic whose parameters may be bf16 and whose moments bf16 or int8, rounded at random."""

    def __init__(self, params: ParamsT, *, state: str, seed: int, **defaults: Any) -> None:
        super().__init__(params, defaults)
        self._kept = state
        self._seed = seed

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for number, (group, parameter) in enumerate(self._parameters()):
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if not state:
                state["step"] = 0
                state["exp_avg"] = _empty_moment(parameter, self._kept, torch.int8)
                state["exp_avg_sq"] = _empty_moment(parameter, self._kept, torch.uint8)
                if self._kept == "int8":
                    blocks = -(-parameter.numel() // _BLOCK)
                    state["exp_avg_scale"] = torch.zeros(blocks, device=parameter.device)
                    state["exp_avg_sq_scale"] = torch.zeros(blocks, device=parameter.device)
            state["step"] += 1
            generator = torch.Generator(parameter.device)
            generator.manual_seed((self._seed * 1_000_003 + state["step"]) * 1_000_003 + number)
            self._update_(parameter, parameter.grad, state, group, generator)

    def _update_(
        self,
        parameter: Tensor,
        gradient: Tensor,
        state: dict[str, Any],
        group: dict[str, Any],
        generator: torch.Generator,
    ) -> None:
        beta1, beta2 = group["betas"]
        values, gradients = parameter.view(-1), gradient.reshape(-1)
        for begin in range(0, values.numel(), _CHUNK_VALUES):
            part = slice(begin, min(begin + _CHUNK_VALUES, values.numel()))
            g = gradients[part].float()
            mean = _read_mean(state, part).lerp_(g, 1 - beta1)
            square = _read_square(state, part).mul_(beta2).addcmul_(g, g, value=1 - beta2)
            scale = (square / (1 - beta2 ** state["step"])).sqrt_().add_(group["eps"])
            new = values[part].float().mul_(1 - group["lr"] * group["weight_decay"])
            new.addcdiv_(mean, scale, value=-group["lr"] / (1 - beta1 ** state["step"]))
            values[part] = _rounded(new, values.dtype, generator)
            _write_mean(state, part, mean, generator)
            _write_square(state, part, square, generator)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but for the moments' dtype, which torch would change to that of the parameter."""
        super().load_state_dict(state_dict)
        for number, (_, parameter) in enumerate(self._parameters()):
            for name, value in state_dict["state"].get(number, {}).items():
                if isinstance(value, Tensor):
                    self.state[parameter][name] = value.to(parameter.device, copy=True)

    def _parameters(self) -> Iterable[tuple[dict[str, Any], Tensor]]:
        return ((group, parameter) for group in self.param_groups for parameter in group["params"])


def _empty_moment(parameter: Tensor, kept: str, integer: torch.dtype) -> Tensor:
    dtype = integer if kept == "int8" else getattr(torch, kept)
    return torch.zeros(parameter.numel(), dtype=dtype, device=parameter.device)


def _blocks(part: slice) -> slice:
    return slice(part.start // _BLOCK, -(-part.stop // _BLOCK))


def _by_block(scale: Tensor, count: int) -> Tensor:
    """A block's scale for each of its values."""
    return scale.repeat_interleave(_BLOCK)[:count]


def _largest(values: Tensor) -> Tensor:
    """Largest magnitude of each block."""
    padded = functional.pad(values, (0, -values.numel() % _BLOCK))
    return padded.view(-1, _BLOCK).abs().amax(1)


def _read_mean(state: dict[str, Any], part: slice) -> Tensor:
    mean = state["exp_avg"][part].float()
    if "exp_avg_scale" not in state:
        return mean
    return mean.mul_(_by_block(state["exp_avg_scale"][_blocks(part)] / 127, mean.numel()))


def _read_square(state: dict[str, Any], part: slice) -> Tensor:
    square = state["exp_avg_sq"][part].float()
    if "exp_avg_sq_scale" not in state:
        return square
    return square.mul_(_by_block(state["exp_avg_sq_scale"][_blocks(part)] / 255, square.numel())).square_()


def _write_mean(state: dict[str, Any], part: slice, mean: Tensor, generator: torch.Generator) -> None:
    stored = state["exp_avg"]
    if "exp_avg_scale" not in state:
        stored[part] = _rounded(mean, stored.dtype, generator)
        return
    largest = _largest(mean)
    state["exp_avg_scale"][_blocks(part)] = largest
    steps = mean / _by_block(largest.clamp(min=torch.finfo(torch.float32).tiny) / 127, mean.numel())
    stored[part] = _whole(steps, generator).clamp_(-127, 127).to(torch.int8)


def _write_square(state: dict[str, Any], part: slice, square: Tensor, generator: torch.Generator) -> None:
    stored = state["exp_avg_sq"]
    if "exp_avg_sq_scale" not in state:
        stored[part] = _rounded(square, stored.dtype, generator)
        return
    root = square.sqrt()
    largest = _largest(root)
    state["exp_avg_sq_scale"][_blocks(part)] = largest
    steps = root / _by_block(largest.clamp(min=torch.finfo(torch.float32).tiny) / 255, root.numel())
    stored[part] = _whole(steps, generator).clamp_(1, 255).to(torch.uint8)


def _whole(steps: Tensor, generator: torch.Generator) -> Tensor:
    """Up or down to a whole number, with the probability that keeps the mean."""
    return (steps + torch.rand(steps.shape, device=steps.device, generator=generator)).floor_()


def _rounded(values: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    return round_at_random(values, generator) if dtype == torch.bfloat16 else values


def round_at_random(values: Tensor, generator: torch.Generator) -> Tensor:
    """fp32 -> bf16, up or down with the probability that keeps the mean.

    Args:
        values: fp32, finite.
        generator: on the device of ``values``.
    """
    bits = values.contiguous().view(torch.int32)
    # adding 0 ... 65535 to the 16 bits that are cut off carries into those that stay, as often as they are large
    noise = torch.randint(0, 1 << 16, bits.shape, dtype=torch.int32, device=bits.device, generator=generator)
    return bits.add(noise).bitwise_and_(-(1 << 16)).view(torch.float32).to(torch.bfloat16)
