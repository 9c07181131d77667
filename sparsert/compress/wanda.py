"""Wanda: in every group of four inputs the two stay whose |weight| times the norm of its input is largest.

    score[n, k] = |W[n, k]| * |X[:, k]|_2

One pass of the calibration text and no update of weights: the cheapest mask that looks at data. It gives up what
follows from inputs being correlated, which SparseGPT takes into account.

Source: Sun et al., "A Simple and Effective Pruning Approach for Large Language Models" (arXiv 2306.11695), equation 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsert.compress.magnitude import magnitude_mask
from sparsert.errors import InputError


class InputNorms:
    """Sums of squares of each input of a linear layer, over all tokens that it has seen.

    Attributes:
        squares: float32 ``[in_features]``.
        tokens: seen so far.
    """

    def __init__(self, in_features: int, device: torch.device) -> None:
        self.squares = torch.zeros(in_features, device=device)
        self.tokens = 0

    def add(self, inputs: Tensor) -> None:
        """Count in what went into the layer, ``[..., in_features]``."""
        rows = inputs.reshape(-1, inputs.shape[-1]).float()
        self.squares += rows.square().sum(0)
        self.tokens += rows.shape[0]


def wanda_mask(weight: Tensor, norms: InputNorms, *, name: str = "weight") -> Tensor:
    """2:4 mask by Wanda's score.

    Args:
        weight: ``[out_features, in_features]``, a floating dtype.
        norms: of the layer's inputs, on the weight's device.
        name: tensor name for errors.

    Returns:
        bool like ``weight``; True keeps.

    Raises:
        InputError: no text was seen, inputs that are not finite, or what :func:`magnitude_mask` refuses.

    Example:
        >>> norms = InputNorms(4, torch.device("cpu"))
        >>> norms.add(torch.tensor([[3.0, 1.0, 1.0, 1.0]]))
        >>> wanda_mask(torch.tensor([[1.0, 2.0, 0.5, -2.5]]), norms).int().tolist()
        [[1, 0, 0, 1]]
    """
    if norms.tokens == 0:
        raise InputError(f"{name}: no calibration text reached this layer; give at least one window")
    if not bool(norms.squares.isfinite().all()):
        raise InputError(
            f"{name}: its inputs overflow or are NaN; run the model in bfloat16 or float32, or look for damaged weights"
        )
    # the mean instead of the sum keeps the score in range; it changes no order
    scores = weight.float().abs() * (norms.squares / norms.tokens).sqrt()
    return magnitude_mask(scores, name=name)
