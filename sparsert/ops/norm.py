"""Residual addition and the norm behind it, as one step: what stands between two linear layers of a block.

The reference is written out in torch and runs everywhere. On a GPU one kernel does all of it in one pass:
separate torch operations would cost five launches and five trips through memory for a few kilobytes.

Source: Zhang & Sennrich, "Root Mean Square Layer Normalization" (2019); Ba et al., "Layer Normalization" (2016).
"""

from __future__ import annotations

import torch
from torch import Tensor


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
