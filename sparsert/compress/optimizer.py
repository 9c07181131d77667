"""AdamW, with a choice of how its two moments are kept.

``float32`` is torch's own fused AdamW. ``bfloat16`` halves the memory of parameters' moments, and is what makes large
mask
learning fit: the arithmetic is done in fp32, and what is written back is rounded at random, up or down with the
probability that keeps the mean right. Rounding to nearest would lose every update smaller than 1/256 of the value it is
added to, which late in a schedule is all of them. The random bits follow from seed and step, so a resumed run makes the
same ones.

Source: Loshchilov and Hutter, "Decoupled weight decay regularization" (arXiv 1711.05101); stochastic rounding as in
Zamirai et al., "Revisiting bfloat16 training" (arXiv 2010.06192).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from sparsert.errors import InputError

#: How the moments can be kept.
STATES = ("float32", "bfloat16")

#: Values updated at once: bounds the fp32 copies beside the parameters.
_CHUNK_VALUES = 1 << 24


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
    return RoundingAdamW(groups, state_dtype=getattr(torch, state), seed=seed, **options)


class RoundingAdamW(Optimizer):
    """AdamW in fp32 arithmetic whose parameters and moments may be bf16, rounded at random."""

    def __init__(self, params: ParamsT, *, state_dtype: torch.dtype, seed: int, **defaults: Any) -> None:
        super().__init__(params, defaults)
        self._state_dtype = state_dtype
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
                state["exp_avg"] = torch.zeros_like(parameter, dtype=self._state_dtype)
                state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=self._state_dtype)
            state["step"] += 1
            generator = torch.Generator(parameter.device)
            generator.manual_seed((self._seed * 1_000_003 + state["step"]) * 1_000_003 + number)
            flat = (parameter, parameter.grad.contiguous(), state["exp_avg"], state["exp_avg_sq"])
            for chunk in zip(*(tensor.view(-1).split(_CHUNK_VALUES) for tensor in flat), strict=True):
                _update_chunk(*chunk, step=state["step"], group=group, generator=generator)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but for the moments' dtype, which torch would change to that of the parameter."""
        super().load_state_dict(state_dict)
        kept = state_dict["state"]
        for number, (_, parameter) in enumerate(self._parameters()):
            for name in ("exp_avg", "exp_avg_sq"):
                if number in kept:
                    self.state[parameter][name] = kept[number][name].to(parameter.device, copy=True)

    def _parameters(self) -> Iterable[tuple[dict[str, Any], Tensor]]:
        return ((group, parameter) for group in self.param_groups for parameter in group["params"])


def _update_chunk(
    parameter: Tensor,
    gradient: Tensor,
    mean: Tensor,
    square: Tensor,
    *,
    step: int,
    group: dict[str, Any],
    generator: torch.Generator,
) -> None:
    beta1, beta2 = group["betas"]
    gradient = gradient.float()
    new_mean = mean.float().lerp_(gradient, 1 - beta1)
    new_square = square.float().mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    scale = (new_square / (1 - beta2**step)).sqrt_().add_(group["eps"])
    new = parameter.float() * (1 - group["lr"] * group["weight_decay"])
    new.addcdiv_(new_mean, scale, value=-group["lr"] / (1 - beta1**step))
    for stored, value in ((parameter, new), (mean, new_mean), (square, new_square)):
        stored.copy_(round_at_random(value, generator) if stored.dtype == torch.bfloat16 else value)


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
