"""Losses of next-token logits, against labels, a teacher or both, with the gradient in the logits' place.

The formulae stand in ``kernels/token_loss.py``. The reference makes the same of torch's operations, in float32 or, for
float64 logits, in float64; a CPU runs it, and a GPU without Triton.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsert.errors import InputError
from sparsert.ops import native

_KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def token_loss_(
    logits: Tensor,
    *,
    labels: Tensor | None = None,
    teacher: Tensor | None = None,
    label_weight: float = 1.0,
    teacher_weight: float = 1.0,
    temperature: float = 1.0,
    softcap: float | None = None,
    teacher_softcap: float | None = None,
    gradient: bool = True,
) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of labels and divergence from a teacher, token by token.

    Args:
        logits: ``[rows, vocabulary]``, without a gradient; overwritten with that of
            ``label_weight * nll.sum() + teacher_weight * kl.sum()`` if ``gradient``.
        labels: int64 ``[rows]``; negative: this row has no label. None: no row has.
        teacher: the teacher's logits, like ``logits``; None: there is none.
        label_weight, teacher_weight: of the two in the gradient.
        temperature: T of ``KL(softmax(teacher / T) || softmax(logits / T))``.
        softcap, teacher_softcap: logits become ``c * tanh(logits / c)`` first; None: they stay.
        gradient: whether it is wanted.

    Returns:
        (nll, kl): float32 ``[rows]`` each (float64 for float64 logits), in nats; 0 where there is no label, no teacher.

    Raises:
        InputError: shapes that do not agree, or neither labels nor a teacher.

    Example:
        >>> logits = torch.tensor([[0.0, 0.0]])
        >>> nll, kl = token_loss_(logits, labels=torch.tensor([1]))
        >>> round(nll.item(), 4), kl.item(), logits.tolist()
        (0.6931, 0.0, [[0.5, -0.5]])
    """
    rows = logits.shape[0]
    if logits.dim() != 2 or (labels is None and teacher is None):
        raise InputError(f"logits are {tuple(logits.shape)}; needed: two dimensions, and labels, a teacher or both")
    if labels is not None and (labels.shape != (rows,) or labels.dtype != torch.int64):
        raise InputError(f"labels are {tuple(labels.shape)} {labels.dtype}; {rows} rows need int64 ({rows},)")
    if teacher is not None and teacher.shape != logits.shape:
        raise InputError(f"the teacher's logits are {tuple(teacher.shape)}, the student's {tuple(logits.shape)}")
    weights = {"label_weight": label_weight, "teacher_weight": teacher_weight, "temperature": temperature}
    if _runs_kernel(logits, teacher):
        from sparsert.kernels.token_loss import token_loss_ as kernel

        nll, kl = torch.zeros(2, rows, dtype=torch.float32, device=logits.device)
        kernel(logits, labels, teacher, nll, kl, **weights, cap=softcap, teacher_cap=teacher_softcap, gradient=gradient)
        return nll, kl
    return token_loss_reference(
        logits, labels, teacher, **weights, softcap=softcap, teacher_softcap=teacher_softcap, gradient=gradient
    )


@torch.no_grad()
def token_loss_reference(
    logits: Tensor,
    labels: Tensor | None,
    teacher: Tensor | None,
    *,
    label_weight: float,
    teacher_weight: float,
    temperature: float,
    softcap: float | None,
    teacher_softcap: float | None,
    gradient: bool,
) -> tuple[Tensor, Tensor]:
    """:func:`token_loss_` of torch's operations."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    z = _capped(logits.to(wide), softcap)
    nll, kl = z.new_zeros(2, z.shape[0])
    slope = torch.zeros_like(z)
    if labels is not None:
        valid = labels >= 0
        log_q = z.log_softmax(1)
        chosen = labels.clamp(min=0)[:, None]
        nll = torch.where(valid, -log_q.gather(1, chosen).squeeze(1), nll)
        weight = label_weight * valid.to(wide)[:, None]
        slope += weight * log_q.exp()
        slope.scatter_add_(1, chosen, -weight)
    if teacher is not None:
        log_p = (_capped(teacher.to(wide), teacher_softcap) / temperature).log_softmax(1)
        log_q = (z / temperature).log_softmax(1)
        p = log_p.exp()
        kl = torch.where(p > 0, p * (log_p - log_q), 0.0).sum(1)
        slope += teacher_weight / temperature * (log_q.exp() - p)
    if gradient:
        logits.copy_(slope if softcap is None else slope * (1 - (z / softcap).square()))
    return nll, kl


def _capped(logits: Tensor, cap: float | None) -> Tensor:
    return logits if cap is None else cap * torch.tanh(logits / cap)


def _runs_kernel(logits: Tensor, teacher: Tensor | None) -> bool:
    return (
        native.has_triton()
        and all(part.is_cuda and part.dtype in _KERNEL_DTYPES for part in (logits, teacher) if part is not None)
        and all(part.stride(1) == 1 for part in (logits, teacher) if part is not None)
    )
