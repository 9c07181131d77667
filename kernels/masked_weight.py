"""Weight under a soft 2:4 mask drawn from logits, and the gradient of the logits.

For every group of four inputs there are six candidate masks and as many logits l. With Gumbel noise g,

    p = softmax((scale * l + g) / temperature)      m = sum over i of p_i * candidate_i      y = w * m

    with G = dL/dy * w - 2 * regularisation * w^2 * m:
    dL/dl_i = scale / temperature * p_i * (G . candidate_i - sum over j of p_j * G . candidate_j)

The regularisation is that of MaskLLM: the loss less lambda * |w * m|^2, so that masks of large weights are preferred;
its gradient is added here, where w * m is at hand, and its value is never computed.

In torch these are some thirty passes over tensors of the size of the logits, most of them kept for the backward pass.
Here it is one pass forward and one back, and nothing is kept but the inputs: the noise is a function of a seed and the
group (Philox 4x32-10, keyed by the seed, with the group in the first two words of the counter and the half of the
six candidates in the last), so the backward pass draws it again. That makes recomputation under gradient
checkpointing exact as well, and the noise the same on every device.

A program takes one run of groups. Logits lie as ``[groups, 6]`` and are read in six strided loads that share cache
lines: memory traffic is what it must be, and the 40 transcendental functions a group hide behind it.

Source: MaskLLM (arXiv 2409.17481), equations 4-9; Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC
2011).
"""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

#: dtypes of weights and of logits.
SUPPORTED_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

_GROUPS_PER_PROGRAM = 512
_NUM_WARPS = 4


@triton.jit
def _gumbel(bits):
    """Standard Gumbel noise of 32 random bits."""
    # 23 bits and a half: never 0 and never 1 in fp32
    uniform = ((bits >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07
    # an approximate logarithm may give 0 just below 1
    return -tl.log(tl.maximum(-tl.log(uniform), 5.9604644775390625e-08))


@triton.jit
def _probabilities(logits, group, inside, seed, scale, temperature):
    """Soft choice among the six candidates: a vector over groups for each."""
    low = group.to(tl.uint32)
    high = (group >> 32).to(tl.uint32)
    none = low * 0
    b0, b1, b2, _ = tl.philox(seed, low, high, none, none)
    b3, b4, b5, _ = tl.philox(seed, low, high, none, none + 1)
    at = logits + group * 6
    z0 = (tl.load(at, mask=inside, other=0.0).to(tl.float32) * scale + _gumbel(b0)) / temperature
    z1 = (tl.load(at + 1, mask=inside, other=0.0).to(tl.float32) * scale + _gumbel(b1)) / temperature
    z2 = (tl.load(at + 2, mask=inside, other=0.0).to(tl.float32) * scale + _gumbel(b2)) / temperature
    z3 = (tl.load(at + 3, mask=inside, other=0.0).to(tl.float32) * scale + _gumbel(b3)) / temperature
    z4 = (tl.load(at + 4, mask=inside, other=0.0).to(tl.float32) * scale + _gumbel(b4)) / temperature
    z5 = (tl.load(at + 5, mask=inside, other=0.0).to(tl.float32) * scale + _gumbel(b5)) / temperature
    top = tl.maximum(tl.maximum(tl.maximum(z0, z1), tl.maximum(z2, z3)), tl.maximum(z4, z5))
    p0 = tl.exp(z0 - top)
    p1 = tl.exp(z1 - top)
    p2 = tl.exp(z2 - top)
    p3 = tl.exp(z3 - top)
    p4 = tl.exp(z4 - top)
    p5 = tl.exp(z5 - top)
    total = p0 + p1 + p2 + p3 + p4 + p5
    return p0 / total, p1 / total, p2 / total, p3 / total, p4 / total, p5 / total


@triton.jit
def _masked_weight_kernel(
    weight,  # [groups, 4]
    logits,  # [groups, 6]
    controls,  # float32 [3]: scale, temperature, regularisation
    seed,  # int64 [1]
    masked,  # [groups, 4]
    groups,
    BLOCK: tl.constexpr,
):
    group = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = group < groups
    p0, p1, p2, p3, p4, p5 = _probabilities(
        logits, group, inside, tl.load(seed), tl.load(controls), tl.load(controls + 1)
    )
    at = weight + group * 4
    w0 = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    w1 = tl.load(at + 1, mask=inside, other=0.0).to(tl.float32)
    w2 = tl.load(at + 2, mask=inside, other=0.0).to(tl.float32)
    w3 = tl.load(at + 3, mask=inside, other=0.0).to(tl.float32)
    to = masked + group * 4
    tl.store(to, w0 * (p0 + p1 + p2), mask=inside)
    tl.store(to + 1, w1 * (p0 + p3 + p4), mask=inside)
    tl.store(to + 2, w2 * (p1 + p3 + p5), mask=inside)
    tl.store(to + 3, w3 * (p2 + p4 + p5), mask=inside)


@triton.jit
def _masked_weight_backward_kernel(
    gradient,  # [groups, 4], of the masked weight
    weight,  # [groups, 4]
    logits,  # [groups, 6]
    controls,  # float32 [3]
    seed,  # int64 [1]
    logit_gradient,  # [groups, 6]
    groups,
    BLOCK: tl.constexpr,
):
    group = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = group < groups
    scale = tl.load(controls)
    temperature = tl.load(controls + 1)
    decay = 2 * tl.load(controls + 2)
    p0, p1, p2, p3, p4, p5 = _probabilities(logits, group, inside, tl.load(seed), scale, temperature)
    at = weight + group * 4
    w0 = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    w1 = tl.load(at + 1, mask=inside, other=0.0).to(tl.float32)
    w2 = tl.load(at + 2, mask=inside, other=0.0).to(tl.float32)
    w3 = tl.load(at + 3, mask=inside, other=0.0).to(tl.float32)
    of = gradient + group * 4
    # of the mask's four entries
    g0 = w0 * (tl.load(of, mask=inside, other=0.0).to(tl.float32) - decay * w0 * (p0 + p1 + p2))
    g1 = w1 * (tl.load(of + 1, mask=inside, other=0.0).to(tl.float32) - decay * w1 * (p0 + p3 + p4))
    g2 = w2 * (tl.load(of + 2, mask=inside, other=0.0).to(tl.float32) - decay * w2 * (p1 + p3 + p5))
    g3 = w3 * (tl.load(of + 3, mask=inside, other=0.0).to(tl.float32) - decay * w3 * (p2 + p4 + p5))
    # of the six probabilities
    c0 = g0 + g1
    c1 = g0 + g2
    c2 = g0 + g3
    c3 = g1 + g2
    c4 = g1 + g3
    c5 = g2 + g3
    mean = p0 * c0 + p1 * c1 + p2 * c2 + p3 * c3 + p4 * c4 + p5 * c5
    slope = scale / temperature
    to = logit_gradient + group * 6
    tl.store(to, slope * p0 * (c0 - mean), mask=inside)
    tl.store(to + 1, slope * p1 * (c1 - mean), mask=inside)
    tl.store(to + 2, slope * p2 * (c2 - mean), mask=inside)
    tl.store(to + 3, slope * p3 * (c3 - mean), mask=inside)
    tl.store(to + 4, slope * p4 * (c4 - mean), mask=inside)
    tl.store(to + 5, slope * p5 * (c5 - mean), mask=inside)


def _on_device(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def masked_weight(weight: Tensor, logits: Tensor, controls: Tensor, seed: Tensor) -> Tensor:
    """Weight under the soft mask.

    Args:
        weight: contiguous, ``numel`` a multiple of 4.
        logits: contiguous ``[numel / 4, 6]``.
        controls: float32 ``[3]``: scale, temperature, regularisation.
        seed: int64 ``[1]``; layers need different ones.

    Returns:
        Like ``weight``.
    """
    masked = torch.empty_like(weight)
    groups = logits.shape[0]
    with _on_device(weight):
        _masked_weight_kernel[(triton.cdiv(groups, _GROUPS_PER_PROGRAM),)](
            weight, logits, controls, seed, masked, groups, BLOCK=_GROUPS_PER_PROGRAM, num_warps=_NUM_WARPS
        )
    return masked


def masked_weight_backward(gradient: Tensor, weight: Tensor, logits: Tensor, controls: Tensor, seed: Tensor) -> Tensor:
    """Gradient of the logits, in their dtype.

    Args:
        gradient: of what :func:`masked_weight` returned, contiguous.
        weight, logits, controls, seed: as given to it.
    """
    logit_gradient = torch.empty_like(logits)
    groups = logits.shape[0]
    with _on_device(weight):
        _masked_weight_backward_kernel[(triton.cdiv(groups, _GROUPS_PER_PROGRAM),)](
            gradient,
            weight,
            logits,
            controls,
            seed,
            logit_gradient,
            groups,
            BLOCK=_GROUPS_PER_PROGRAM,
            num_warps=_NUM_WARPS,
        )
    return logit_gradient
