"""Losses at the head without ever holding all logits of a batch.

Logits of 16,384 tokens over 128,256 words are 4.2 GB in 16 bits. Here tokens pass through the head in chunks, as many
at a time as a budget of bytes allows: a chunk's logits are made, its loss and gradient taken in one kernel
(``ops/token_loss.py``), and only the gradients of the hidden states and of the head's weight outlive it. Chunks are
rows and not columns of the logits, because a softmax needs the whole vocabulary of a token. The price is none in
arithmetic: the gradient is taken in the forward pass while the logits are there, nothing is computed twice.

The logits are those of the model's own dtype, normalised in float32. What it gives up: no second derivatives.

Source: the idea of the fused linear cross entropy of Liger-Kernel (arXiv 2410.10989), section 3.2.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor

from sparsert.compress.anatomy import Anatomy
from sparsert.ops import token_loss_

#: Bytes of logits held at a time, and as many of the teacher's. 256 MiB in 16 bits are 1,046 tokens of a vocabulary of
#: 128,256: enough rows to keep a GPU's matrix units busy.
LOGIT_BYTES = 256 * 1024 * 1024

#: Label of a token that predicts nothing, as elsewhere in torch.
NO_LABEL = -100


@dataclasses.dataclass(frozen=True)
class TokenLoss:
    """What the next tokens are held against.

    Attributes:
        labels: int64 ``[tokens]``, negative for none; None: no labels at all.
        teacher: whose logits are to be matched, with ``teacher_hidden``; None: nobody's.
        teacher_hidden: the teacher's states in front of its head, ``[tokens, hidden]``, without a gradient.
        label_weight, teacher_weight: of the two in the sum.
        temperature: T of ``KL(teacher / T || student / T)``.
    """

    labels: Tensor | None = None
    teacher: Anatomy | None = None
    teacher_hidden: Tensor | None = None
    label_weight: float = 1.0
    teacher_weight: float = 1.0
    temperature: float = 1.0


def head_loss(
    anatomy: Anatomy, hidden: Tensor, loss: TokenLoss, *, logit_bytes: int = LOGIT_BYTES
) -> tuple[Tensor, Tensor]:
    """Sum losses of the logits over all tokens, a chunk of tokens at a time.

    Args:
        anatomy: whose head makes the logits.
        hidden: hidden states in front of the head, ``[tokens, hidden]``.
        loss: what they are held against.
        logit_bytes: most bytes of logits at a time; one token is always taken.

    Returns:
        (the weighted sum, a float32 scalar, differentiable in ``hidden`` and the head's weight;
        ``[negative log-likelihood, divergence]``, their sums without weights and detached).
    """
    weight = anatomy.head.weight
    wanted = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    total, parts = _HeadLoss.apply(hidden, weight, anatomy, loss, logit_bytes, wanted)
    return total, parts.detach()


def label_loss(anatomy: Anatomy, hidden: Tensor, tokens: Tensor, *, logit_bytes: int = LOGIT_BYTES) -> Tensor:
    """Mean negative log-likelihood of each next token.

    Args:
        anatomy: whose head makes the logits.
        hidden: ``[batch, length, hidden]``.
        tokens: int64 ``[batch, length]``, at least two long; the first of each row is not predicted.

    Returns:
        A float32 scalar, in nats a token.
    """
    labels = tokens[:, 1:].reshape(-1)
    rows = hidden[:, :-1].reshape(-1, hidden.shape[-1])
    return head_loss(anatomy, rows, TokenLoss(labels), logit_bytes=logit_bytes)[0] / labels.numel()


def next_tokens(tokens: Tensor) -> Tensor:
    """The label of every token of windows: ``[batch, length]`` -> ``[batch * length]``; a window's last has none."""
    return functional.pad(tokens[:, 1:], (0, 1), value=NO_LABEL).reshape(-1)


class _HeadLoss(torch.autograd.Function):
    """Loss and gradients of a head in one pass over chunks of tokens."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, anatomy: Anatomy, loss: TokenLoss, logit_bytes: int, wanted: bool
    ) -> tuple[Tensor, Tensor]:
        # cast once: autocast would cast anew, and keep, a copy for every chunk
        matrix = _cast(weight)
        teacher_matrix = None if loss.teacher is None else _cast(loss.teacher.head.weight)
        of_hidden = torch.zeros_like(hidden) if wanted and ctx.needs_input_grad[0] else None
        # sums over all tokens: in float32, since chunks would be lost in a 16-bit sum
        wide = torch.promote_types(weight.dtype, torch.float32)
        of_weight = torch.zeros_like(weight, dtype=wide) if wanted and ctx.needs_input_grad[1] else None
        sums = torch.zeros(2, device=hidden.device, dtype=wide)
        rows = max(1, logit_bytes // (matrix.element_size() * matrix.shape[0]))
        with torch.autocast(hidden.device.type, enabled=False):
            for begin in range(0, hidden.shape[0], rows):
                part = slice(begin, begin + rows)
                states = hidden[part].to(matrix.dtype)
                logits = functional.linear(states, matrix)
                teacher_logits, teacher_cap = None, None
                if loss.teacher is not None:
                    assert loss.teacher_hidden is not None and teacher_matrix is not None
                    theirs = loss.teacher_hidden[part].to(teacher_matrix)
                    teacher_logits = functional.linear(theirs, teacher_matrix).to(logits.device)
                    teacher_cap = loss.teacher.logit_softcap
                losses = token_loss_(
                    logits,
                    labels=None if loss.labels is None else loss.labels[part].to(logits.device),
                    teacher=teacher_logits,
                    label_weight=loss.label_weight,
                    teacher_weight=loss.teacher_weight,
                    temperature=loss.temperature,
                    softcap=anatomy.logit_softcap,
                    teacher_softcap=teacher_cap,
                    gradient=of_hidden is not None or of_weight is not None,
                )
                sums += torch.stack([part_losses.sum() for part_losses in losses])
                if of_hidden is not None:
                    of_hidden[part] = logits @ matrix
                if of_weight is not None:
                    of_weight += logits.T @ states
        ctx.of_hidden = of_hidden
        ctx.of_weight = None if of_weight is None else of_weight.to(weight.dtype)
        ctx.mark_non_differentiable(sums)
        return loss.label_weight * sums[0] + loss.teacher_weight * sums[1], sums

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        scale = outer[0]
        of_hidden = None if ctx.of_hidden is None else ctx.of_hidden * scale.to(ctx.of_hidden.dtype)
        of_weight = None if ctx.of_weight is None else ctx.of_weight * scale.to(ctx.of_weight.dtype)
        return of_hidden, of_weight, None, None, None, None


def _cast(weight: Tensor) -> Tensor:
    """A head's weight in the dtype that autocast asks for."""
    device, stored = weight.device.type, weight.detach()
    return stored.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else stored
