"""Attention layers, and attention among the tokens of one call.

The layer knows no cache: how the new tokens see each other and earlier ones is a callable that the caller passes
in (:class:`Attention`), so the very same forward serves a plain causal pass (:class:`CausalAttention`), prefill
into a cache, and a decode step inside a CUDA graph. The arithmetic of attention is :mod:`sparsert.ops`' business.

Source: Vaswani et al., "Attention Is All You Need" (2017); Ainslie et al., "GQA" (2023).
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from sparsert import ops
from sparsert.models.config import AttentionConfig, LinearShape
from sparsert.models.linears import LinearGroup, meta_linear
from sparsert.models.rope import RotaryEmbedding


class Attention(Protocol):
    """How the new tokens of one layer see each other and earlier ones; it knows their positions."""

    def __call__(self, slot: int, heads: Tensor, layer: SelfAttention) -> Tensor | ops.Tiled:
        """Norm and rotate heads, keep keys and values if there is a cache, and attend.

        Args:
            slot: number of the layer among the model's attention layers; its place in a cache.
            heads: ``[batch, tokens, num_heads + 2 * num_kv_heads, head_dim]``: queries, keys, values.
            layer: whose ``shape``, ``q_norm``, ``k_norm`` and ``rotary`` apply.

        Returns:
            ``[batch, tokens, num_heads, head_dim]``; or, if ``layer.o_proj`` takes tiles, these with heads joined.
        """
        ...


class CausalAttention:
    """Each token sees itself and those before it in this call, from position 0; nothing is kept."""

    def __call__(self, slot: int, heads: Tensor, layer: SelfAttention) -> Tensor:
        """See :class:`Attention`."""
        return ops.causal_attention(*layer.split(heads), layer.shape)


class SelfAttention(nn.Module):
    """Grouped-query attention with rotary positions.

    Attributes:
        shape: what it computes.
        q_norm, k_norm: weights of norms over each head, or None.
        qkv_proj: the joint projection of queries, keys and values.
        o_proj: the output projection.
    """

    q_norm: nn.Parameter | None
    k_norm: nn.Parameter | None

    def __init__(self, config: AttentionConfig, linears: dict[str, LinearShape], rotary: RotaryEmbedding) -> None:
        """Make a layer without weights.

        Args:
            config: what it computes.
            linears: :meth:`DecoderConfig.block_linears` of its block.
            rotary: tables of cosines and sines, shared with other layers.
        """
        super().__init__()
        self.shape = config.shape
        # not registered: the model owns the tables
        self._rotary = (rotary,)
        self.q_norm = self.k_norm = None
        if config.head_norms:
            self.q_norm, self.k_norm = (
                nn.Parameter(torch.empty(config.shape.head_dim, device="meta"), requires_grad=False) for _ in range(2)
            )
        self.qkv_proj = LinearGroup({name: linears[f"self_attn.{name}"] for name in ("q_proj", "k_proj", "v_proj")})
        self.o_proj: nn.Module = meta_linear(linears["self_attn.o_proj"])

    @property
    def rotary(self) -> RotaryEmbedding:
        """Tables of cosines and sines."""
        return self._rotary[0]

    def split(self, heads: Tensor, positions: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Normed and rotated queries and keys, and values.

        Args:
            heads: ``[batch, tokens, num_heads + 2 * num_kv_heads, head_dim]``.
            positions: int64 ``[batch, tokens]``, each below ``rotary.length``; default ``0 .. tokens - 1``.

        Returns:
            ``[batch, tokens, heads, head_dim]`` each.
        """
        tables = self.rotary.first(heads.shape[1]) if positions is None else self.rotary(positions)
        return ops.split_heads(heads, tables[0], tables[1], self.shape, self.q_norm, self.k_norm)

    def forward(self, x: Tensor | ops.DeferredNorm, attention: Attention, slot: int) -> Tensor | ops.Tiled:
        """``[batch, tokens, hidden]`` -> ``[batch, tokens, num_heads * head_dim]``, the input of ``o_proj``."""
        heads = self.qkv_proj(x).unflatten(-1, (-1, self.shape.head_dim))
        attended = attention(slot, heads, self)
        return attended if isinstance(attended, ops.Tiled) else attended.flatten(-2)
