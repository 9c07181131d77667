"""Losses at the head without ever holding all logits of a batch.

Logits of 16,384 tokens over 128,256 words are 8.4 GB in float32, and a loss with its gradient holds several such
tensors. Here tokens pass through the head in chunks, as many at a time as a budget of bytes allows: a chunk's logits
are made, its loss and gradient taken, and only the gradients of the hidden states and of the head's weight outlive
it. Chunks are rows and not columns of the logits, because a softmax needs the whole vocabulary of a token. The price
is none in arithmetic: the gradient is taken in the forward pass while the logits are there, nothing is computed
twice.

The logits are those of the model's own dtype, normalised in float32. What it gives up: no second derivatives.

Source: the idea of the fused linear cross entropy of Liger-Kernel (arXiv 2410.10989), section 3.2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor

from sparsert.compress.anatomy import Anatomy

#: Bytes of float32 logits held at a time; the loss takes some five times as much for moments. 256 MiB are 523 tokens of
#: a vocabulary of 128,256: enough rows to keep a GPU's matrix units busy.
LOGIT_BYTES = 256 * 1024 * 1024

#: Sum of the losses of some rows: takes float32 logits ``[rows, vocabulary]`` and the slice of all rows that they are.
RowLoss = Callable[[Tensor, slice], Tensor]


def head_loss(anatomy: Anatomy, hidden: Tensor, row_loss: RowLoss, *, logit_bytes: int = LOGIT_BYTES) -> Tensor:
    """Sum a loss of the logits over all tokens, a chunk of tokens at a time.

    Args:
        anatomy: whose head makes the logits.
        hidden: hidden states in front of the head, ``[tokens, hidden]``.
        row_loss: the loss of a chunk; differentiable in the logits.
        logit_bytes: most bytes of float32 logits at a time; one token is always taken.

    Returns:
        The sum, a float32 scalar; differentiable in ``hidden`` and the head's weight.
    """
    weight = anatomy.head.weight
    rows = max(1, logit_bytes // (4 * weight.shape[0]))
    if not torch.is_grad_enabled() or not (hidden.requires_grad or weight.requires_grad):
        total = torch.zeros((), device=hidden.device)
        for part in _slices(hidden.shape[0], rows):
            total += row_loss(logits_of(anatomy, hidden[part], weight), part).detach()
        return total
    total = _HeadLoss.apply(hidden, weight, anatomy, row_loss, rows)
    return total


def logits_of(anatomy: Anatomy, hidden: Tensor, weight: Tensor | None = None) -> Tensor:
    """Float32 logits ``[..., vocabulary]`` of hidden states ``[..., hidden]``, soft cap included."""
    weight = anatomy.head.weight if weight is None else weight
    logits = functional.linear(hidden.to(weight.dtype), weight).float()
    cap = anatomy.logit_softcap
    return logits if cap is None else cap * torch.tanh(logits / cap)


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

    def of(logits: Tensor, part: slice) -> Tensor:
        return functional.cross_entropy(logits, labels[part].to(logits.device), reduction="sum")

    return head_loss(anatomy, rows, of, logit_bytes=logit_bytes) / labels.numel()


def _slices(count: int, step: int) -> list[slice]:
    return [slice(begin, min(begin + step, count)) for begin in range(0, count, step)]


class _HeadLoss(torch.autograd.Function):
    """Loss and gradients of a head in one pass over chunks of tokens."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, anatomy: Anatomy, row_loss: RowLoss, rows: int) -> Tensor:
        total = torch.zeros((), device=hidden.device)
        # cast once: autocast would cast anew, and keep, a copy for every chunk
        device = hidden.device.type
        cast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        stored = weight.detach().to(cast)
        of_hidden = torch.zeros_like(hidden) if ctx.needs_input_grad[0] else None
        # sums over all tokens: in float32, since chunks would be lost in a 16-bit sum
        of_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for part in _slices(hidden.shape[0], rows):
            with torch.enable_grad():
                states = hidden[part].detach().requires_grad_(of_hidden is not None)
                matrix = stored.detach().requires_grad_(of_weight is not None)
                loss = row_loss(logits_of(anatomy, states, matrix), part)
            wanted = [tensor for tensor in (states, matrix) if tensor.requires_grad]
            gradients = list(torch.autograd.grad(loss, wanted))
            if of_hidden is not None:
                of_hidden[part] = gradients.pop(0)
            if of_weight is not None:
                of_weight += gradients.pop(0)
            total += loss.detach()
        ctx.of_hidden = of_hidden
        ctx.of_weight = None if of_weight is None else of_weight.to(weight.dtype)
        return total

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        scale = outer[0]
        of_hidden = None if ctx.of_hidden is None else ctx.of_hidden * scale.to(ctx.of_hidden.dtype)
        of_weight = None if ctx.of_weight is None else ctx.of_weight * scale.to(ctx.of_weight.dtype)
        return of_hidden, of_weight, None, None, None
