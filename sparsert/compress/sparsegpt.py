"""SparseGPT: prune a weight column by column and let the columns behind make up for what is lost.

With H = X^T X of the layer's inputs, removing w_k costs w_k^2 / [H^-1]_kk if the weights behind it are updated by
-w_k / [H^-1]_kk * [H^-1]_k,k+1:. All rows share one order of columns, so one Cholesky factor of H^-1 serves all of
them: its row k holds what is needed once columns 0 ... k-1 are done. At each fourth column the mask of the next four is
chosen, from the weights as updated so far.

    columns    |  done  | block of 128: column by column |  updated once a block, by a product of matrices  |

Update and mask are separate results: MaskLLM's prior is the mask alone, on the original weights. Given a mask, the same
pass only updates weights. Cost: the Hessian and its factor in fp32, ``in_features^2`` twice.

Source: Frantar and Alistarh, "SparseGPT: Massive Language Models Can be Accurately Pruned in One-Shot" (arXiv
2301.00774), algorithm 1; damping and block size as published.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsert.compress.magnitude import two_largest
from sparsert.errors import InputError
from sparsert.formats.nibbles import check_matrix

#: Columns between two updates of all that is behind them, a multiple of 4.
BLOCK_SIZE = 128

#: Added to the diagonal, as a share of its mean.
DAMPING = 0.01


class Hessian:
    """X^T X of the inputs of a linear layer, over all tokens that it has seen.

    Attributes:
        products: float32 ``[in_features, in_features]``, the mean over tokens.
        tokens: seen so far.
    """

    def __init__(self, in_features: int, device: torch.device) -> None:
        self.products = torch.zeros(in_features, in_features, device=device)
        self.tokens = 0

    def add(self, inputs: Tensor) -> None:
        """Count in what went into the layer, ``[..., in_features]``."""
        rows = inputs.reshape(-1, inputs.shape[-1]).float()
        seen = self.tokens + rows.shape[0]
        # a running mean: the sum over a long text would leave fp32 little room
        self.products.addmm_(rows.t() / seen, rows, beta=self.tokens / seen)
        self.tokens = seen


def sparsegpt(
    weight: Tensor,
    hessian: Hessian,
    *,
    mask: Tensor | None = None,
    damping: float = DAMPING,
    block_size: int = BLOCK_SIZE,
    name: str = "weight",
) -> tuple[Tensor, Tensor]:
    """Mask and updated weight of a layer.

    Args:
        weight: ``[out_features, in_features]``, a floating dtype; not changed.
        hessian: of the layer's inputs, on the weight's device.
        mask: 2:4 mask to update the weights under; default: chosen here.
        damping: share of the diagonal's mean that is added to it.
        block_size: columns of a block, a multiple of 4.
        name: tensor name for errors.

    Returns:
        ``(mask, updated)``: bool, True keeps; and the weight in its dtype, zero where the mask says so.

    Raises:
        InputError: no text was seen, inputs that are not finite, a Hessian that cannot be factored, or a weight that
            cannot be masked.
    """
    rows, columns = check_matrix(weight, name)
    if block_size < 4 or block_size % 4:
        raise InputError(f"block_size is {block_size}; it must be a positive multiple of 4")
    if mask is not None and mask.shape != weight.shape:
        raise InputError(f"{name}: the mask is {tuple(mask.shape)}, the weight {tuple(weight.shape)}; they must agree")
    w = weight.float().clone()
    dead = hessian.products.diagonal() == 0
    w[:, dead] = 0  # an input that is always zero needs no weight
    inverse = _inverse_factor(hessian, damping, name)
    scale = inverse.diagonal()
    kept = torch.empty(rows, columns, dtype=torch.bool, device=w.device) if mask is None else mask.bool().clone()
    for begin in range(0, columns, block_size):
        end = min(begin + block_size, columns)
        block = w[:, begin:end].clone()
        errors = torch.empty_like(block)
        for column in range(end - begin):
            at = begin + column
            if mask is None and column % 4 == 0:
                group = slice(at, at + 4)
                kept[:, group] = two_largest((block[:, column : column + 4] / scale[group]).square())
            pruned = torch.where(kept[:, at], block[:, column], 0.0)
            error = (block[:, column] - pruned) / scale[at]
            # this column becomes what is left of it; those behind it in the block make up for the rest
            block[:, column + 1 :].addr_(error, inverse[at, at + 1 : end], alpha=-1)
            block[:, column] = pruned
            errors[:, column] = error
        w[:, begin:end] = block
        w[:, end:].addmm_(errors, inverse[begin:end, end:], alpha=-1)
    updated = w.to(weight.dtype)
    if not bool(updated.isfinite().all()):
        raise InputError(
            f"{name}: the updated weights are not finite; use more calibration text or a larger damping than {damping}"
        )
    return kept, updated


def _inverse_factor(hessian: Hessian, damping: float, name: str) -> Tensor:
    """Upper Cholesky factor of the inverse of the damped Hessian."""
    if hessian.tokens == 0:
        raise InputError(f"{name}: no calibration text reached this layer; give at least one window")
    h = hessian.products.clone()
    diagonal = h.diagonal()
    if not bool(h.isfinite().all()):
        raise InputError(
            f"{name}: its inputs overflow or are NaN; run the model in bfloat16 or float32, or look for damaged weights"
        )
    diagonal[diagonal == 0] = 1
    diagonal += damping * diagonal.mean()
    try:
        return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    except torch.linalg.LinAlgError as error:
        raise InputError(
            f"{name}: the Hessian of its inputs cannot be factored with damping {damping}; use more calibration text "
            "or a larger damping"
        ) from error
