"""Residual addition and the norm behind it, as one step: what stands between two linear layers of a block.

The reference is written out in torch and runs everywhere. On a GPU one kernel does all of it in one pass:
separate torch operations would cost five launches and five trips through memory for a few kilobytes.

Source: Zhang & Sennrich, "Root Mean Square Layer Normalization" (2019); Ba et al., "Layer Normalization" (2016).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from sparsert.ops import native
from sparsert.ops.pack import dtype_code
from sparsert.ops.tiles import Tiled, to_rows

#: The kernel reads 16 bytes at a time.
_VECTOR = 8


@dataclasses.dataclass(frozen=True)
class DeferredNorm:
    """An RMSNorm whose division is left to the next linear layer, which divides its sums instead of its input.

    Dividing needs the whole row, so a norm between two layers is a kernel of its own; what it multiplies with and the
    squares it sums up are at hand where the row is made. Made by :func:`sparsert.ops.linear24_close` and taken by
    :func:`sparsert.ops.linear24_open`.

    Attributes:
        weighted: ``[..., width]``, perhaps in tiles: the stream times the norm's weight, rounded.
        squares: float32 ``[rows, parts]``: sums of squares of parts of the stream.
        eps: of the norm.
    """

    weighted: Tensor | Tiled
    squares: Tensor
    eps: float

    def resolve(self) -> Tensor:
        """The normed tensor, ``[..., width]``."""
        weighted = to_rows(self.weighted)
        scale = torch.rsqrt(self.squares.sum(-1, keepdim=True) / weighted.shape[-1] + self.eps)
        return (weighted.float() * scale.view(*weighted.shape[:-1], 1)).to(weighted.dtype)


def residual_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    *,
    bias: Tensor | None = None,
    post_weight: Tensor | None = None,
    centered: bool = False,
) -> tuple[Tensor, Tensor]:
    """Add what a sub-block computed to the residual stream, and norm the sum for the next one.

        stream = residual + (post_norm(x) if there is a post_weight else x)
        normed = norm(stream)

    Args:
        x: ``[..., width]``: a sub-block's output, or the stream itself when there is no ``residual``.
        residual: like x, or None at the start of the model.
        weight: ``[width]``, either in x's dtype (the quotient is rounded before the product, as Llama does) or in
            float32 (rounded after it, as Gemma does; its ``1 + weight`` is formed by the loader).
        eps: added to the mean square or variance.
        bias: ``[width]`` in the weight's dtype, added at the end; LayerNorm only.
        post_weight: ``[width]``: norms x itself before the addition (Gemma 2 and 3), same eps and kind of norm.
        centered: LayerNorm (mean taken off) instead of RMSNorm.

    Returns:
        (stream, normed), both like x. The stream is rounded to x's dtype before it is normed.
    """
    if _takes(x, weight, bias, post_weight):
        return _cuda(x, residual, weight, eps, bias, post_weight, centered)
    if post_weight is not None:
        x = _norm(x, post_weight, None, eps, centered)
    stream = x if residual is None else residual + x
    return stream, _norm(stream, weight, bias, eps, centered)


def _norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, centered: bool) -> Tensor:
    if centered:
        return torch.nn.functional.layer_norm(
            x.float(), x.shape[-1:], weight.float(), None if bias is None else bias.float(), eps
        ).to(x.dtype)
    exact = x.float()
    exact = exact * torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + eps)
    if weight.dtype == x.dtype:
        return weight * exact.to(x.dtype)
    return (weight.float() * exact).to(x.dtype)


def _takes(x: Tensor, weight: Tensor, bias: Tensor | None, post_weight: Tensor | None) -> bool:
    """Whether the CUDA kernel runs it; a width that is no multiple of 8 is left to torch."""
    if not native.fuses(x) or x.shape[-1] % _VECTOR or x.numel() == 0:
        return False
    extension: Any = native.module()
    same_type = all(tensor is None or tensor.dtype == weight.dtype for tensor in (bias, post_weight))
    return weight.dtype in (x.dtype, torch.float32) and same_type and x.shape[-1] <= extension.residual_norm_max_width()


def _cuda(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    bias: Tensor | None,
    post_weight: Tensor | None,
    centered: bool,
) -> tuple[Tensor, Tensor]:
    x = x.contiguous()
    residual = None if residual is None else residual.contiguous()
    changes = residual is not None or post_weight is not None
    stream, normed = torch.empty_like(x) if changes else x, torch.empty_like(x)
    extension: Any = native.module()
    with torch.cuda.device(x.device):
        extension.residual_norm_cuda(
            x.data_ptr(), native.address(residual), weight.data_ptr(), native.address(bias),
            native.address(post_weight), stream.data_ptr() if changes else 0, normed.data_ptr(),
            x.numel() // x.shape[-1], x.shape[-1], eps,
            centered, weight.dtype == torch.float32, dtype_code(x.dtype), native.stream(x.device),
        )  # fmt: skip
    return stream, normed
