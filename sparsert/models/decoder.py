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

from typing import Any, Protocol

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from sparsert import ops
from sparsert.errors import InputError
from sparsert.models.config import DecoderConfig
from sparsert.models.linears import LinearGroup, meta_linear
from sparsert.models.report import LoadReport
from sparsert.models.rope import RotaryEmbedding
from sparsert.schedule import LayerPlan


class Attention(Protocol):
    """How the new tokens of one layer see each other and earlier ones; it knows their positions."""

    def __call__(self, slot: int, heads: Tensor, layer: SelfAttention) -> Tensor:
        """Norm and rotate heads, keep keys and values if there is a cache, and attend.

        Args:
            slot: number of the layer among the model's attention layers; its place in a cache.
            heads: ``[batch, tokens, num_heads + 2 * num_kv_heads, head_dim]``: queries, keys, values.
            layer: whose ``shape``, ``q_norm``, ``k_norm`` and ``rotary`` apply.

        Returns:
            ``[batch, tokens, num_heads, head_dim]``.
        """
        ...


class CausalAttention:
    """Each token sees itself and those before it in this call, from position 0; nothing is kept."""

    def __call__(self, slot: int, heads: Tensor, layer: SelfAttention) -> Tensor:
        """See :class:`Attention`."""
        return causal_attention(*layer.split(heads))


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of tokens among themselves; q, k, v and the result are ``[batch, tokens, heads, head_dim]``."""
    grouped = q.shape[2] != k.shape[2]
    attended = functional.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=grouped
    )
    return attended.transpose(1, 2)


class RMSNorm(nn.Module):
    """The weight of a norm; the arithmetic is :func:`sparsert.ops.residual_norm`."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, device="meta"), requires_grad=False)
        self.eps = eps

    def forward(self, x: Tensor, stream: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Add ``x`` to the residual stream and norm the sum; returns (stream, normed), each like x."""
        return ops.residual_norm(x, stream, self.weight, self.eps)


class SelfAttention(nn.Module):
    """Grouped-query attention with rotary positions.

    Attributes:
        shape: what it computes.
        rotary: tables of cosines and sines, shared by all layers.
        q_norm, k_norm: weights of norms over each head, or None.
    """

    q_norm: nn.Parameter | None
    k_norm: nn.Parameter | None

    def __init__(self, config: DecoderConfig, rotary: RotaryEmbedding) -> None:
        super().__init__()
        shapes = config.block_linears()
        self.shape = ops.AttentionShape(
            config.num_heads, config.num_kv_heads, config.head_dim, config.head_dim, scale=config.head_dim**-0.5
        )
        # not registered: the model owns the tables
        self._rotary = (rotary,)
        self.q_norm = self.k_norm = None
        self.qkv_proj = LinearGroup({name: shapes[f"self_attn.{name}"] for name in ("q_proj", "k_proj", "v_proj")})
        self.o_proj: nn.Module = meta_linear(shapes["self_attn.o_proj"])

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

    def forward(self, x: Tensor, attention: Attention, slot: int) -> Tensor:
        """``[batch, tokens, hidden]`` -> the same shape."""
        heads = self.qkv_proj(x).unflatten(-1, (-1, self.shape.head_dim))
        output: Tensor = self.o_proj(attention(slot, heads, self).flatten(-2))
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
        output: Tensor = self.down_proj(ops.activate(self.gate_up_proj(x), "silu", gated=True))
        return output


class DecoderBlock(nn.Module):
    """Attention, then feed-forward, each behind a norm and added to the residual stream.

    What a sub-block computes is added by the norm that follows it, so that addition and norm are one step.
    A half that the plan skips has no modules.
    """

    def __init__(
        self, config: DecoderConfig, rotary: RotaryEmbedding, attention: bool = True, mlp: bool = True
    ) -> None:
        super().__init__()
        if attention:
            self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
            self.self_attn = SelfAttention(config, rotary)
        if mlp:
            self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
            self.mlp = GatedMLP(config)

    def forward(
        self, x: Tensor, stream: Tensor | None, attention: Attention, slot: int | None, mlp: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Run the block.

        Args:
            x: ``[batch, tokens, hidden]``: what is still to be added to the stream.
            stream: the residual stream, or None at the start.
            slot: of the attention layer; None skips it.
            mlp: whether the feed-forward layer runs.

        Returns:
            x and stream for the next block.
        """
        if slot is not None:
            stream, normed = self.input_layernorm(x, stream)
            x = self.self_attn(normed, attention, slot)
        if mlp:
            stream, normed = self.post_attention_layernorm(x, stream)
            x = self.mlp(normed)
        return x, stream


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
        self.rotary = RotaryEmbedding(config.rope, config.head_dim)
        self.blocks = nn.ModuleList(
            [DecoderBlock(config, self.rotary, plan.runs_attention(b), plan.runs_mlp(b)) for b in plan.kept]
        )
        self._runs: dict[LayerPlan, list[tuple[int, int | None, bool]]] = {}
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False, device="meta")

    @property
    def attention_shapes(self) -> tuple[ops.AttentionShape, ...]:
        """What each attention layer computes, by slot."""
        blocks: list[Any] = list(self.blocks)
        return tuple(block.self_attn.shape for block in blocks if hasattr(block, "self_attn"))

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """dtype of activations and values."""
        return self.embed_tokens.weight.dtype

    def _runs_of(self, plan: LayerPlan) -> list[tuple[int, int | None, bool]]:
        """(place of the block, its slot or None, whether the mlp runs) of what a plan runs; slots are the model's."""
        if plan not in self._runs:
            plan.check_within(self.plan, "the loaded model")
            with_attention = [block for block in self.plan.kept if self.plan.runs_attention(block)]
            self._runs[plan] = [
                (
                    self.plan.kept.index(block),
                    with_attention.index(block) if plan.runs_attention(block) else None,
                    plan.runs_mlp(block),
                )
                for block in plan.kept
            ]
        return self._runs[plan]

    def forward(
        self,
        tokens: Tensor,
        attention: Attention | None = None,
        *,
        rows: Tensor | None = None,
        plan: LayerPlan | None = None,
    ) -> Tensor:
        """Logits of the next token.

        Args:
            tokens: int64 ``[batch, tokens]`` on the model's device.
            attention: default plain causal attention within this call, from position 0; another one needs
                ``rotary.reserve_`` for its positions.
            rows: int64 ``[batch]``: the one token of each text whose logits are wanted; default all.
            plan: run only this much of what is loaded; slots keep their numbers, so that plans can share a cache.

        Returns:
            ``[batch, tokens, vocabulary]``, or ``[batch, vocabulary]`` with ``rows``, in the model's dtype.

        Raises:
            InputError: the plan runs what is not loaded.
        """
        if attention is None:
            self.rotary.reserve_(tokens.shape[1], self.device, self.dtype)
            attention = CausalAttention()
        x, stream = self.embed_tokens(tokens), None
        for place, slot, mlp in self._runs_of(plan or self.plan):
            x, stream = self.blocks[place](x, stream, attention, slot, mlp)
        if rows is not None:
            x, stream = _pick(x, rows), _pick(stream, rows) if stream is not None else None
        logits: Tensor = self.lm_head(self.norm(x, stream)[1])
        return logits


def _pick(x: Tensor, rows: Tensor) -> Tensor:
    """``[batch, tokens, width]`` -> ``[batch, width]``: one token of each text."""
    return x.gather(1, rows.view(-1, 1, 1).expand(-1, 1, x.shape[-1])).squeeze(1)
