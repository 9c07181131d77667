"""One decoder forward for all supported architectures.

The modules know nothing of caches: attention over past tokens is a callable that the caller passes in
(:class:`Attention`), so the very same forward serves a plain causal pass (:class:`CausalAttention`),
prefill into a cache, and a decode step inside a CUDA graph. Nothing here looks at a tensor's values on
the host or lets a shape depend on them, which is what capture asks for.

Numbers follow transformers: norms in fp32 and rounded before the weight multiplies, rotary tables in
fp32 and rounded, attention by torch's scaled dot product. The module tree has one block for each block
of the layer plan that runs; numbers of skipped blocks appear nowhere.

Source: Touvron et al., "LLaMA" (2023); ``LlamaForCausalLM`` of transformers.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from sparsert.errors import InputError
from sparsert.models.config import DecoderConfig
from sparsert.models.linears import LinearGroup, meta_linear
from sparsert.models.report import LoadReport
from sparsert.models.rope import RotaryEmbedding, rotate
from sparsert.schedule import LayerPlan


class Attention(Protocol):
    """How queries see keys and values of this call and of earlier ones."""

    def __call__(self, block: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend in one block.

        Args:
            block: place of the block in the model (skipped blocks do not count).
            q: ``[batch, tokens, heads, head_dim]``, positions already applied.
            k, v: ``[batch, tokens, kv_heads, head_dim]`` of the same tokens.

        Returns:
            ``[batch, tokens, heads, head_dim]``.
        """
        ...


class CausalAttention:
    """Each token sees itself and those before it in this call; nothing is kept."""

    def __call__(self, block: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See :class:`Attention`."""
        grouped = q.shape[2] != k.shape[2]
        attended = functional.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=grouped
        )
        return attended.transpose(1, 2)


class RMSNorm(nn.Module):
    """``weight * round(x / sqrt(mean(x^2) + eps))``, the quotient in fp32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, device="meta"), requires_grad=False)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """``[..., width]`` -> the same shape and dtype."""
        exact = x.float()
        exact = exact * torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * exact.to(x.dtype)


class SelfAttention(nn.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        shapes = config.block_linears()
        self.num_heads, self.num_kv_heads = config.num_heads, config.num_kv_heads
        self.head_dim = config.head_dim
        self.qkv_proj = LinearGroup({name: shapes[f"self_attn.{name}"] for name in ("q_proj", "k_proj", "v_proj")})
        self.o_proj: nn.Module = meta_linear(shapes["self_attn.o_proj"])

    def forward(self, x: Tensor, cosine: Tensor, signed_sine: Tensor, attention: Attention, block: int) -> Tensor:
        """``[batch, tokens, hidden]`` -> the same shape."""
        heads = self.qkv_proj(x).unflatten(-1, (-1, self.head_dim))
        rotated = self.num_heads + self.num_kv_heads
        qk = rotate(heads[:, :, :rotated], cosine, signed_sine)
        attended = attention(block, qk[:, :, : self.num_heads], qk[:, :, self.num_heads :], heads[:, :, rotated:])
        output: Tensor = self.o_proj(attended.flatten(-2))
        return output


class GatedMLP(nn.Module):
    """``down(silu(gate(x)) * up(x))``."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        shapes = config.block_linears()
        self.gate_up_proj = LinearGroup({name: shapes[f"mlp.{name}"] for name in ("gate_proj", "up_proj")})
        self.down_proj: nn.Module = meta_linear(shapes["mlp.down_proj"])

    def forward(self, x: Tensor) -> Tensor:
        """``[..., hidden]`` -> the same shape."""
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        output: Tensor = self.down_proj(functional.silu(gate) * up)
        return output


class DecoderBlock(nn.Module):
    """Attention, then feed-forward, each behind a norm and added to the residual stream."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = SelfAttention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = GatedMLP(config)

    def forward(self, x: Tensor, cosine: Tensor, signed_sine: Tensor, attention: Attention, block: int) -> Tensor:
        """``[batch, tokens, hidden]`` -> the same shape."""
        x = x + self.self_attn(self.input_layernorm(x), cosine, signed_sine, attention, block)
        return x + self.mlp(self.post_attention_layernorm(x))


class DecoderModel(nn.Module):
    """A decoder whose blocks are those that a layer plan keeps. Made by ``load_model``.

    Attributes:
        config: the architecture; ``config.num_blocks`` counts the checkpoint's blocks.
        plan: which of them run; ``len(blocks) == len(plan.kept)``.
        report: how each linear layer was loaded.
    """

    report: LoadReport

    def __init__(self, config: DecoderConfig, plan: LayerPlan) -> None:
        super().__init__()
        if plan.num_blocks != config.num_blocks:
            raise InputError(f"the layer plan is for {plan.num_blocks} blocks, the model has {config.num_blocks}")
        self.config = config
        self.plan = plan
        self.report = LoadReport({}, ())
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, device="meta")
        self.blocks = nn.ModuleList([DecoderBlock(config) for _ in plan.kept])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False, device="meta")
        self.rotary = RotaryEmbedding(config.rope, config.head_dim)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """dtype of activations and values."""
        return self.embed_tokens.weight.dtype

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        attention: Attention | None = None,
        *,
        rows: Tensor | None = None,
    ) -> Tensor:
        """Logits of the next token.

        Args:
            tokens: int64 ``[batch, tokens]`` on the model's device.
            positions: int64 ``[batch, tokens]``, each below ``rotary.length``; default ``0 .. tokens - 1``.
            attention: default plain causal attention within this call.
            rows: int64 ``[batch]``: the one token of each text whose logits are wanted; default all.

        Returns:
            ``[batch, tokens, vocabulary]``, or ``[batch, vocabulary]`` with ``rows``, in the model's dtype.
        """
        if positions is None:
            self.rotary.reserve_(tokens.shape[1], self.device, self.dtype)
            positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        cosine, signed_sine = self.rotary(positions)
        x = self.embed_tokens(tokens)
        attention = attention or CausalAttention()
        for index, block in enumerate(self.blocks):
            x = block(x, cosine, signed_sine, attention, index)
        if rows is not None:
            x = x.gather(1, rows.view(-1, 1, 1).expand(-1, 1, x.shape[-1])).squeeze(1)
        logits: Tensor = self.lm_head(self.norm(x))
        return logits
