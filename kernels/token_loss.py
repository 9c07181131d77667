"""Losses of next-token logits and their gradient, which takes the logits' place.

For a token with logits z, and a teacher's t, over the vocabulary:

    nll = logsumexp(z) - z[label]
    kl  = sum of p * (log p - log q)                p = softmax(t / T), q = softmax(z / T)
    dL/dz = label_weight * (softmax(z) - onehot(label)) + teacher_weight / T * (q - p)

with L = label_weight * nll + teacher_weight * kl. A soft cap c stands for z = c * tanh(raw / c), and the gradient is
that of the raw logits.

In torch these are some twenty passes over tensors of the size of all logits, in float32; here it is two reads of the
logits as the head left them and one write. A program takes a row twice: once for the running maximum and the sums of
exponentials, once for what depends on them. The second read is of a few hundred KB and comes from L2 as a rule.

Source: online softmax, Milakov and Gimelshein (arXiv 1805.02867); the gradient in the place of the logits as in
Liger-Kernel (arXiv 2410.10989), section 3.2.
"""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

#: dtypes of logits.
SUPPORTED_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

_BLOCK = 4096
_NUM_WARPS = 8


@triton.jit
def _read(row, at, inside, cap, CAP: tl.constexpr):
    """Logits as the softmax sees them; -inf outside of the vocabulary."""
    z = tl.load(row + at, mask=inside, other=0.0).to(tl.float32)
    if CAP:
        z = cap * (2 * tl.sigmoid(2 * z / cap) - 1)
    return tl.where(inside, z, float("-inf"))


@triton.jit
def _token_loss_kernel(
    logits,  # [rows, vocabulary], row stride `stride`; overwritten with the gradient if GRADIENT
    teacher,  # [rows, vocabulary], row stride `teacher_stride`, if TEACHER
    labels,  # int64 [rows], negative: no label; if LABELS
    nll,  # float32 [rows]
    kl,  # float32 [rows]
    vocabulary,
    stride,
    teacher_stride,
    label_weight,
    teacher_weight,
    inverse_temperature,
    cap,
    teacher_cap,
    LABELS: tl.constexpr,
    TEACHER: tl.constexpr,
    GRADIENT: tl.constexpr,
    CAP: tl.constexpr,
    TEACHER_CAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    z_row = logits + row * stride
    t_row = teacher + row * teacher_stride
    step = tl.arange(0, BLOCK)
    top = float("-inf")
    total = 0.0  # of exp(z - top)
    soft_total = 0.0  # of exp((z - top) / T)
    t_top = float("-inf")
    t_total = 0.0
    for begin in range(0, vocabulary, BLOCK):
        at = begin + step
        inside = at < vocabulary
        z = _read(z_row, at, inside, cap, CAP)
        higher = tl.maximum(top, tl.max(z, 0))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(z - higher), 0)
        if TEACHER:
            soft_total = soft_total * tl.exp((top - higher) * inverse_temperature) + tl.sum(
                tl.exp((z - higher) * inverse_temperature), 0
            )
            t = _read(t_row, at, inside, teacher_cap, TEACHER_CAP)
            t_higher = tl.maximum(t_top, tl.max(t, 0))
            t_total = t_total * tl.exp((t_top - t_higher) * inverse_temperature) + tl.sum(
                tl.exp((t - t_higher) * inverse_temperature), 0
            )
            t_top = t_higher
        top = higher
    log_total = top + tl.log(total)
    label = -1
    if LABELS:
        label = tl.load(labels + row).to(tl.int32)
        has_label = label >= 0
        at_label = tl.maximum(label, 0)
        z_label = _read(z_row, at_label, has_label, cap, CAP)
        tl.store(nll + row, tl.where(has_label, log_total - z_label, 0.0))
        label_weight = tl.where(has_label, label_weight, 0.0)
    if TEACHER or GRADIENT:
        log_soft = 0.0
        log_teacher = 0.0
        if TEACHER:
            log_soft = top * inverse_temperature + tl.log(soft_total)
            log_teacher = t_top * inverse_temperature + tl.log(t_total)
        divergence = 0.0
        for begin in range(0, vocabulary, BLOCK):
            at = begin + step
            inside = at < vocabulary
            z = _read(z_row, at, inside, cap, CAP)
            gradient = tl.zeros([BLOCK], tl.float32)
            if LABELS:
                gradient += label_weight * (tl.exp(z - log_total) - tl.where(at == label, 1.0, 0.0))
            if TEACHER:
                log_q = z * inverse_temperature - log_soft
                t = _read(t_row, at, inside, teacher_cap, TEACHER_CAP)
                log_p = t * inverse_temperature - log_teacher
                p = tl.exp(log_p)
                # a word that the teacher rules out adds nothing
                divergence += tl.sum(tl.where(p > 0, p * (log_p - log_q), 0.0), 0)
                gradient += teacher_weight * inverse_temperature * (tl.exp(log_q) - p)
            if GRADIENT:
                if CAP:
                    gradient *= 1 - (z / cap) * (z / cap)
                tl.store(z_row + at, gradient, mask=inside)
        if TEACHER:
            tl.store(kl + row, divergence)


def token_loss_(
    logits: Tensor,
    labels: Tensor | None,
    teacher: Tensor | None,
    nll: Tensor,
    kl: Tensor,
    *,
    label_weight: float,
    teacher_weight: float,
    temperature: float,
    cap: float | None,
    teacher_cap: float | None,
    gradient: bool,
) -> None:
    """Losses of rows; the logits become their gradient.

    Args:
        logits: ``[rows, vocabulary]``, rows contiguous inside; overwritten if ``gradient``.
        labels: int64 ``[rows]``, or None; negative ones have no loss.
        teacher: ``[rows, vocabulary]``, rows contiguous inside, or None.
        nll, kl: float32 ``[rows]``, written where there are labels, a teacher.
        label_weight, teacher_weight: of the two in the gradient.
        temperature: of the comparison with the teacher.
        cap, teacher_cap: soft caps of the logits, or None.
        gradient: whether it is wanted.
    """
    rows, vocabulary = logits.shape
    if rows == 0:
        return
    beside = logits if teacher is None else teacher
    on_device = torch.cuda.device(logits.device) if logits.is_cuda else contextlib.nullcontext()
    with on_device:
        _token_loss_kernel[(rows,)](
            logits,
            beside,
            nll if labels is None else labels,
            nll,
            kl,
            vocabulary,
            logits.stride(0),
            beside.stride(0),
            label_weight,
            teacher_weight,
            1 / temperature,
            cap or 1.0,
            teacher_cap or 1.0,
            LABELS=labels is not None,
            TEACHER=teacher is not None,
            GRADIENT=gradient,
            CAP=cap is not None,
            TEACHER_CAP=teacher_cap is not None,
            BLOCK=min(_BLOCK, triton.next_power_of_2(vocabulary)),
            num_warps=_NUM_WARPS,
        )
