"""The loss of a transformers model on windows of text: what every decision of this room is measured by.

Mean negative log-likelihood in nats a token; ``exp`` of it is the perplexity. Windows are read in batches, logits in
chunks (:mod:`sparsert.compress.head_loss`), so memory follows from one batch of hidden states. A loss that is not
finite is an error at once: an order or a plan made of NaN would look like any other.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from sparsert.compress.anatomy import Anatomy
from sparsert.compress.head_loss import label_loss
from sparsert.errors import InputError

#: Gives the number that a key stands for: computes it, or knows it from an earlier run that was killed.
Remember = Callable[[str, Callable[[], float]], float]


def compute_always(key: str, compute: Callable[[], float]) -> float:
    """The :data:`Remember` that remembers nothing."""
    return compute()


def check_windows(anatomy: Anatomy, windows: Tensor) -> None:
    """Check that windows can be scored.

    Args:
        windows: int64 ``[windows, length]`` of token ids.

    Raises:
        InputError: no window, a window of fewer than two tokens, or ids outside the vocabulary.
    """
    if windows.ndim != 2 or windows.dtype != torch.int64:
        raise InputError(f"windows of text must be int64 [windows, tokens], got {windows.dtype} {list(windows.shape)}")
    if windows.shape[0] < 1 or windows.shape[1] < 2:
        raise InputError(
            f"there are {windows.shape[0]} windows of {windows.shape[1]} tokens; at least one of two tokens is "
            f"needed, give more text or a shorter window"
        )
    vocabulary = anatomy.embedding.num_embeddings
    low, high = int(windows.min()), int(windows.max())
    if low < 0 or high >= vocabulary:
        raise InputError(
            f"windows hold the token id {low if low < 0 else high}, the model's vocabulary is 0-{vocabulary - 1}; "
            f"use the model's own tokenizer"
        )


def batches_of(windows: Tensor, batch_size: int, device: torch.device) -> list[Tensor]:
    """Windows in batches on a device.

    Raises:
        InputError: batch size below 1.
    """
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}; it must be at least 1")
    return [batch.to(device) for batch in windows.split(batch_size)]


def mean_loss(anatomy: Anatomy, windows: Tensor, *, batch_size: int = 1) -> float:
    """Mean negative log-likelihood of the tokens of windows behind each first one.

    Args:
        anatomy: the model; it is run in evaluation mode and left as it was.
        windows: int64 ``[windows, length]``.
        batch_size: windows in one forward.

    Returns:
        Nats a token.

    Raises:
        InputError: windows that cannot be scored, or a loss that is not finite.
    """
    check_windows(anatomy, windows)
    was_training = anatomy.model.training
    anatomy.model.eval()
    try:
        with torch.no_grad():
            total = torch.zeros((), dtype=torch.float64)
            for batch in batches_of(windows, batch_size, anatomy.embedding.weight.device):
                total += label_loss(anatomy, anatomy.hidden(batch), batch).double().cpu() * batch.shape[0]
    finally:
        anatomy.model.train(was_training)
    return finite(float(total) / windows.shape[0], "the loss")


def perplexity(anatomy: Anatomy, windows: Tensor, *, batch_size: int = 8) -> float:
    """``exp`` of :func:`mean_loss`: perplexity of windows, each read on its own."""
    return math.exp(mean_loss(anatomy, windows, batch_size=batch_size))


def finite(value: float, what: str) -> float:
    """The value, if it is a number.

    Raises:
        InputError: it is NaN or infinite.
    """
    if not math.isfinite(value):
        raise InputError(
            f"{what} is {value}; check the weights (`sparsert inspect`), or compute in bfloat16 or float32"
        )
    return value
