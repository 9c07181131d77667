"""A weight under a soft 2:4 mask that can be learned: one operator with a gradient, in torch and in Triton.

The formula stands in ``kernels/masked_weight.py``. ``sparsert::masked_weight`` is differentiable in the logits alone,
for the weights under a learned mask stay what they are. What changes from step to step (scale, temperature,
regularisation, seed) is passed in tensors on the device, so that compiled code and captured graphs need not be made
anew.

The reference draws the same noise as the kernel: Philox is integer arithmetic, and torch does it in 64 bits. It
takes some twenty tensors of the size of the logits, which is what a CPU with a small model can afford.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparsert.errors import InputError
from sparsert.ops import native

#: Positions that each candidate mask of a group keeps, in MaskLLM's order: 1100 1010 1001 0110 0101 0011.
CANDIDATES = ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))

_LOW = 0xFFFFFFFF
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def candidate_masks(device: torch.device | str = "cpu") -> Tensor:
    """The six masks of a group, float32 ``[6, 4]``.

    Example:
        >>> candidate_masks()[2].tolist()
        [1.0, 0.0, 0.0, 1.0]
    """
    masks = torch.zeros(6, 4, device=device)
    for candidate, positions in enumerate(CANDIDATES):
        masks[candidate, list(positions)] = 1
    return masks


def masked_weight(weight: Tensor, logits: Tensor, controls: Tensor, seed: Tensor) -> Tensor:
    """Weight times a soft mask drawn from logits; differentiable in the logits.

    Args:
        weight: ``[out_features, in_features]``, contiguous, 16 or 32 bits, ``in_features`` a multiple of 4.
        logits: ``[out_features * in_features / 4, 6]``, contiguous, 16 or 32 bits: six candidates a group, in the
            order of :data:`CANDIDATES`.
        controls: float32 ``[3]``: scale of the logits, temperature, regularisation (lambda of -lambda * |w * m|^2, of
            which only the gradient is taken).
        seed: int64 ``[1]``: same seed and logits, same mask; layers need different ones.

    Returns:
        Like ``weight``.

    Raises:
        InputError: something does not fit.

    Example:
        >>> logits = torch.tensor([[0.0, 9.0, 0.0, 0.0, 0.0, 0.0]])
        >>> controls, seed = torch.tensor([100.0, 0.05, 0.0]), torch.tensor([1])
        >>> masked_weight(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), logits, controls, seed).tolist()
        [[1.0, 0.0, 3.0, 0.0]]
    """
    if weight.dim() != 2 or weight.shape[1] % 4 or weight.dtype not in _DTYPES or not weight.is_contiguous():
        raise InputError(
            f"weight is {tuple(weight.shape)} {weight.dtype}; a mask is learned for a contiguous matrix of bf16, fp16 "
            "or fp32 whose width is a multiple of 4"
        )
    if logits.shape != (weight.numel() // 4, 6) or logits.dtype not in _DTYPES or not logits.is_contiguous():
        raise InputError(
            f"logits are {tuple(logits.shape)} {logits.dtype}; a weight {tuple(weight.shape)} needs contiguous "
            f"({weight.numel() // 4}, 6) in bf16, fp16 or fp32"
        )
    if controls.shape != (3,) or controls.dtype != torch.float32 or seed.shape != (1,) or seed.dtype != torch.int64:
        raise InputError(
            f"controls are {tuple(controls.shape)} {controls.dtype} and seed {tuple(seed.shape)} {seed.dtype}; needed: "
            "(3,) float32 and (1,) int64"
        )
    masked: Tensor = torch.ops.sparsert.masked_weight(weight, logits, controls, seed)
    return masked


def hard_mask(logits: Tensor, shape: tuple[int, int]) -> Tensor:
    """The mask of the likeliest candidate of every group; of equals the first.

    Args:
        logits: ``[groups, 6]``.
        shape: ``(out_features, in_features)``.

    Returns:
        bool ``[out_features, in_features]``.
    """
    # argmax promises no order among equals on a GPU
    best = logits == logits.max(dim=1, keepdim=True).values
    first = best.cumsum(1, dtype=torch.int8).eq(1) & best
    return (first.float() @ candidate_masks(logits.device)).bool().view(shape)


def masked_weight_reference(weight: Tensor, logits: Tensor, controls: Tensor, seed: Tensor) -> Tensor:
    """The forward formula in torch."""
    probabilities = _probabilities(logits, controls, seed)
    mask = probabilities @ candidate_masks(weight.device)
    return (weight.float().view(-1, 4) * mask).view(weight.shape).to(weight.dtype)


def masked_weight_backward_reference(
    gradient: Tensor, weight: Tensor, logits: Tensor, controls: Tensor, seed: Tensor
) -> Tensor:
    """The gradient of the logits in torch."""
    scale, temperature, regularisation = controls.unbind()
    candidates = candidate_masks(weight.device)
    probabilities = _probabilities(logits, controls, seed)
    w = weight.float().view(-1, 4)
    of_mask = w * (gradient.float().reshape(-1, 4) - 2 * regularisation * w * (probabilities @ candidates))
    of_choice = of_mask @ candidates.t()
    mean = (probabilities * of_choice).sum(1, keepdim=True)
    return (scale / temperature * probabilities * (of_choice - mean)).to(logits.dtype)


def gumbel_noise(groups: int, seed: int, device: torch.device | str = "cpu") -> Tensor:
    """The noise of a seed, float32 ``[groups, 6]``; that of the kernel up to the rounding of two logarithms."""
    group = torch.arange(groups, device=device)
    words: list[Tensor] = []
    for half in range(2):
        words += _philox(seed, group & _LOW, group >> 32, 0, half)[:3]
    uniform = ((torch.stack(words, dim=1) >> 9).float() + 0.5) * 2.0**-23
    return -(-uniform.log()).clamp(min=2.0**-24).log()


def _probabilities(logits: Tensor, controls: Tensor, seed: Tensor) -> Tensor:
    noise = gumbel_noise(logits.shape[0], int(seed), logits.device)
    return ((logits.float() * controls[0] + noise) / controls[1]).softmax(dim=1)


def _philox(seed: int, c0: Tensor, c1: Tensor, c2: int, c3: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox 4x32-10: four 32-bit words, in int64, of a 64-bit key and a counter of four words."""
    words = (c0, c1, torch.full_like(c0, c2), torch.full_like(c0, c3))
    key0, key1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(10):
        first, second = 0xD2511F53 * words[0], 0xCD9E8D57 * words[2]
        # the products may pass 2^63: their 64 bits are right all the same, and only the sign needs to be cut off
        words = (
            ((second >> 32) & _LOW) ^ words[1] ^ key0,
            second & _LOW,
            ((first >> 32) & _LOW) ^ words[3] ^ key1,
            first & _LOW,
        )
        key0, key1 = (key0 + 0x9E3779B9) & _LOW, (key1 + 0xBB67AE85) & _LOW
    return words


def _runs_kernel(weight: Tensor) -> bool:
    return weight.is_cuda and native.has_triton()


def _masked_weight_impl(weight: Tensor, logits: Tensor, controls: Tensor, seed: Tensor) -> Tensor:
    if not _runs_kernel(weight):
        return masked_weight_reference(weight, logits, controls, seed)
    from sparsert.kernels.masked_weight import masked_weight as kernel

    masked: Tensor = kernel(weight, logits, controls, seed)
    return masked


def _masked_weight_backward_impl(
    gradient: Tensor, weight: Tensor, logits: Tensor, controls: Tensor, seed: Tensor
) -> Tensor:
    if not _runs_kernel(weight):
        return masked_weight_backward_reference(gradient, weight, logits, controls, seed)
    from sparsert.kernels.masked_weight import masked_weight_backward as kernel

    of_logits: Tensor = kernel(gradient.contiguous(), weight, logits, controls, seed)
    return of_logits


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weight, logits, controls, seed = inputs
    ctx.save_for_backward(weight, logits, controls, seed)


def _gradient(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    weight, logits, controls, seed = ctx.saved_tensors
    of_logits = torch.ops.sparsert.masked_weight_backward(gradient, weight, logits, controls, seed)
    return None, of_logits, None, None


_library = torch.library.Library("sparsert", "FRAGMENT")
_library.define("masked_weight(Tensor weight, Tensor logits, Tensor controls, Tensor seed) -> Tensor")
_library.define(
    "masked_weight_backward(Tensor gradient, Tensor weight, Tensor logits, Tensor controls, Tensor seed) -> Tensor"
)
for _device in ("CPU", "CUDA"):
    _library.impl("masked_weight", _masked_weight_impl, _device)
    _library.impl("masked_weight_backward", _masked_weight_backward_impl, _device)
torch.library.register_fake(
    "sparsert::masked_weight",
    lambda weight, logits, controls, seed: torch.empty_like(weight),
    lib=_library,
)
torch.library.register_fake(
    "sparsert::masked_weight_backward",
    lambda gradient, weight, logits, controls, seed: torch.empty_like(logits),
    lib=_library,
)
torch.library.register_autograd("sparsert::masked_weight", _gradient, setup_context=_setup_context, lib=_library)
