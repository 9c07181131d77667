"""Attention of one new token per text over a KV cache: head norms, rotation, append, split over the context.

Prompts are the business of :mod:`sparsert.ops.prompt_attention`; both share heads and masks, which are here.

The reference is written out in torch and runs everywhere. On a GPU one kernel does all of it, for the head widths
that models have; :func:`explain_attention` says when it does not.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from sparsert.ops import native
from sparsert.ops.norm import residual_norm
from sparsert.ops.pack import dtype_code
from sparsert.ops.sdpa import scaled_dot_product
from sparsert.ops.tiles import Tiled, empty_tiles, worth_tiling


@dataclasses.dataclass(frozen=True)
class AttentionShape:
    """What one attention layer computes, without its weights.

    Attributes:
        num_heads, num_kv_heads: query and key/value heads; the first is a multiple of the second.
        head_dim: width of one head.
        rotary_dim: leading dimensions of a head that are rotated, in halves; even, at most ``head_dim``.
        scale: of the scores.
        sliding_window: a token sees itself and the ``sliding_window - 1`` before it; None: all.
        softcap: scores become ``softcap * tanh(score / softcap)``; None: they stay.
        norm_eps: of the head norms, where there are any.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary_dim: int
    scale: float
    sliding_window: int | None = None
    softcap: float | None = None
    norm_eps: float = 1e-6


def rotate(heads: Tensor, cosine: Tensor, signed_sine: Tensor) -> Tensor:
    """Turn each head by its position.

    Args:
        heads: ``[..., heads, head_dim]``.
        cosine, signed_sine: ``[..., 1, rotary_dim]``; the first ``rotary_dim`` dimensions are turned, in halves,
            by ``x * cosine + roll(x, rotary_dim / 2) * signed_sine``.
    """
    width = cosine.shape[-1]
    turned = heads[..., :width]
    turned = torch.addcmul(turned * cosine, turned.roll(width // 2, dims=-1), signed_sine)
    return turned if width == heads.shape[-1] else torch.cat([turned, heads[..., width:]], dim=-1)


def split_heads(
    heads: Tensor,
    cosine: Tensor,
    signed_sine: Tensor,
    shape: AttentionShape,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of a layer's joint projection: heads normed, then rotated.

    Args:
        heads: ``[..., num_heads + 2 * num_kv_heads, head_dim]``: queries, keys, values.
        cosine, signed_sine: ``[..., 1, rotary_dim]`` of the tokens' positions.
        q_norm, k_norm: ``[head_dim]``: weights of an RMSNorm over each head (Qwen 3, Gemma 3), rounding as in
            :func:`sparsert.ops.residual_norm`.

    Returns:
        q ``[..., num_heads, head_dim]``, k and v ``[..., num_kv_heads, head_dim]``.
    """
    q, k, v = heads.split([shape.num_heads, shape.num_kv_heads, shape.num_kv_heads], dim=-2)
    if q_norm is not None:
        q = residual_norm(q, None, q_norm, shape.norm_eps)[1]
    if k_norm is not None:
        k = residual_norm(k, None, k_norm, shape.norm_eps)[1]
    return rotate(q, cosine, signed_sine), rotate(k, cosine, signed_sine), v


def keep_heads(
    heads: Tensor,
    keys: Tensor,
    values: Tensor,
    rows: Tensor,
    positions: Tensor,
    cosine: Tensor,
    signed_sine: Tensor,
    shape: AttentionShape,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`split_heads` of many tokens, whose keys and values are also kept in a cache; one kernel on a GPU.

    Args:
        heads: ``[tokens, num_heads + 2 * num_kv_heads, head_dim]``; may be overwritten by the result.
        keys, values: ``[rows, num_kv_heads, length, head_dim]``, changed in place.
        rows, positions: int64 ``[tokens]``: where in the cache each token goes; no two to one place.
        cosine, signed_sine: ``[tokens, 1, rotary_dim]`` of the tokens' positions.
        shape, q_norm, k_norm: as in :func:`split_heads`.

    Returns:
        q ``[tokens, num_heads, head_dim]``, k and v ``[tokens, num_kv_heads, head_dim]``, perhaps views of heads.
    """
    if (
        native.fuses(heads)
        and heads.shape[0] > 0
        and native.module().prompt_heads_takes(shape.head_dim, shape.rotary_dim)
        and all(tensor.is_contiguous() for tensor in (heads, keys, values, cosine, signed_sine, rows, positions))
        and heads.data_ptr() % 16 == 0
    ):
        norm_is_float = any(norm is not None and norm.dtype == torch.float32 for norm in (q_norm, k_norm))
        with torch.cuda.device(heads.device):
            native.module().prompt_heads_cuda(
                heads.data_ptr(), keys.data_ptr(), values.data_ptr(), rows.data_ptr(), positions.data_ptr(),
                cosine.data_ptr(), signed_sine.data_ptr(), native.address(q_norm), native.address(k_norm),
                keys.shape[2], heads.shape[0], shape.num_heads, shape.num_kv_heads, shape.head_dim, cosine.shape[-1],
                shape.norm_eps, norm_is_float, dtype_code(heads.dtype), native.stream(heads.device),
            )  # fmt: skip
        q, k, v = heads.split([shape.num_heads, shape.num_kv_heads, shape.num_kv_heads], dim=1)
        return q, k, v
    q, k, v = split_heads(heads, cosine, signed_sine, shape, q_norm, k_norm)
    # [rows, length, kv_heads, head_dim], the cache's memory
    keys.transpose(1, 2).index_put_((rows, positions), k)
    values.transpose(1, 2).index_put_((rows, positions), v)
    return q, k, v


def decode_attention(
    heads: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    cosine: Tensor,
    signed_sine: Tensor,
    shape: AttentionShape,
    window: int,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    *,
    settled: bool = False,
    tiled: bool = False,
) -> Tensor | Tiled:
    """One decode step of one layer: norm and rotate, append to the cache, attend.

    Args:
        heads: ``[batch, num_heads + 2 * num_kv_heads, head_dim]`` of one new token per text.
        keys, values: ``[rows, num_kv_heads, length, head_dim]``, rows >= batch; changed in place: the new token's
            go to position ``lengths[row]``.
        lengths: int64 ``[batch]`` on the device: tokens in the cache before this step, each below ``window``.
        cosine, signed_sine: ``[positions, rotary_dim]``: the tables, of which row ``lengths[row]`` is used.
        shape: what the layer computes.
        window: positions of the cache that may be read; at most ``length``.
        q_norm, k_norm: as in :func:`split_heads`.
        settled: promise that ``lengths`` and the cache were last written at least two kernels ago on this stream
            (in a decoder a norm and a projection stand in between). The kernel then reads them while the preceding
            one still runs.
        tiled: the result may be in tiles, ``(batch, num_heads * head_dim)``, where that is worth it.

    Returns:
        ``[batch, num_heads, head_dim]``, dtype of heads; or that in tiles.
    """
    if (
        native.fuses(heads)
        and explain_attention(shape, heads.device, heads.dtype) is None
        and keys.is_contiguous()
        and values.is_contiguous()
    ):
        return _cuda(heads, keys, values, lengths, cosine, signed_sine, shape, window, q_norm, k_norm, settled, tiled)
    batch, kv_heads, head_dim = heads.shape[0], shape.num_kv_heads, shape.head_dim
    q, k, v = split_heads(heads, cosine[lengths].unsqueeze(1), signed_sine[lengths].unsqueeze(1), shape, q_norm, k_norm)
    # one row of the cache for each text and head; no shape depends on a length, so this can be captured
    first = torch.arange(batch * kv_heads, device=lengths.device) * keys.shape[2]
    rows = first + lengths.repeat_interleave(kv_heads, output_size=batch * kv_heads)
    keys.view(-1, head_dim).index_copy_(0, rows, k.reshape(-1, head_dim))
    values.view(-1, head_dim).index_copy_(0, rows, v.reshape(-1, head_dim))
    position = torch.arange(window, device=lengths.device)
    visible = position <= lengths.unsqueeze(1)
    if shape.sliding_window is not None:
        visible &= position > lengths.unsqueeze(1) - shape.sliding_window
    past_keys, past_values = keys[:batch, :, :window], values[:batch, :, :window]
    return masked_attention(q.unsqueeze(1), past_keys, past_values, visible.unsqueeze(1), shape).squeeze(1)


def masked_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, shape: AttentionShape) -> Tensor:
    """Attention where a mask says which tokens see which; all operations can be captured in a CUDA graph.

    Args:
        q: ``[batch, queries, num_heads, head_dim]``, rotated.
        k, v: ``[batch, num_kv_heads, keys, head_dim]``, as a cache holds them.
        visible: bool ``[batch, queries, keys]``, or with 1 in the place of batch; each query must see some key.
        shape: scale and soft cap; its sliding window is the mask's business.

    Returns:
        The shape of q.
    """
    batch, queries, _, head_dim = q.shape
    kv_heads, group = shape.num_kv_heads, shape.num_heads // shape.num_kv_heads
    # [batch, kv_heads, group * queries, head_dim]: keys are read without a copy for each query head of a group
    grouped = q.unflatten(2, (kv_heads, group)).permute(0, 2, 3, 1, 4).reshape(batch, kv_heads, -1, head_dim)
    visible = visible.repeat(1, group, 1).unsqueeze(1)
    if shape.softcap is None:
        mask = torch.zeros_like(visible, dtype=q.dtype).masked_fill_(~visible, -torch.inf)
        attended = scaled_dot_product(grouped, k, v, mask=mask.expand(-1, kv_heads, -1, -1), scale=shape.scale)
    else:
        scores = (grouped @ k.transpose(-1, -2)).float() * shape.scale
        scores = shape.softcap * torch.tanh(scores / shape.softcap)
        attended = scores.masked_fill_(~visible, -torch.inf).softmax(-1).to(v.dtype) @ v
    return attended.unflatten(2, (group, queries)).permute(0, 3, 1, 2, 4).flatten(2, 3)


def explain_attention(shape: AttentionShape, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why decode attention of this shape runs on torch's operations; None when the CUDA kernel takes it."""
    if device.type != "cuda":
        return f"there is no attention kernel for {device.type}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"the attention kernel computes in bfloat16 and float16, not in {dtype}"
    reason = native.cuda_reason(device)
    if reason is not None:
        return reason
    extension: Any = native.module()
    if not extension.decode_attention_takes(shape.head_dim):
        return f"the attention kernel is made for heads of 32, 64, 96, 128 and 256 values, not {shape.head_dim}"
    return None


def _cuda(
    heads: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    cosine: Tensor,
    signed_sine: Tensor,
    shape: AttentionShape,
    window: int,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    settled: bool,
    tiled: bool = False,
    warps: int = 0,
    splits: int = 0,
) -> Tensor | Tiled:
    if heads.stride(-1) != 1 or heads.stride(-2) != shape.head_dim:
        heads = heads.contiguous()
    batch, width = heads.shape[0], shape.num_heads * shape.head_dim
    tiles = empty_tiles(torch.Size((batch, width)), heads) if tiled and worth_tiling(batch, width) else None
    out = heads.new_empty((batch, shape.num_heads, shape.head_dim)) if tiles is None else tiles.data
    norm_is_float = any(norm is not None and norm.dtype == torch.float32 for norm in (q_norm, k_norm))
    extension: Any = native.module()
    with torch.cuda.device(heads.device):
        extension.decode_attention_cuda(
            heads.data_ptr(), keys.data_ptr(), values.data_ptr(), lengths.data_ptr(), cosine.data_ptr(),
            signed_sine.data_ptr(), native.address(q_norm), native.address(k_norm), out.data_ptr(), heads.stride(0),
            keys.shape[2], heads.shape[0], shape.num_heads, shape.num_kv_heads, shape.head_dim, cosine.shape[-1],
            shape.sliding_window or 0, shape.scale, shape.softcap or 0.0, shape.norm_eps, norm_is_float,
            tiles is not None, settled, window, warps, splits, dtype_code(heads.dtype), native.stream(heads.device),
        )  # fmt: skip
    return out if tiles is None else tiles
