"""What a decoder is, as data: its sizes, and for each block what its attention and feed-forward layer compute.

A :class:`DecoderConfig` is read once from the ``config.json`` of a Hugging Face checkpoint
(:mod:`sparsert.models.families`), checked, and frozen, so that nothing behind it asks a dictionary for a key
that may be missing or spelt in the way of another release, and nothing asks for the name of an architecture:
the one forward looks only at what stands here. What may differ from block to block, in models whose layers
were pruned to different widths as well as in those that mix kinds of attention, stands in the block.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from sparsert.ops import AttentionShape
from sparsert.schedule import LayerPlan


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding.

    Attributes:
        kind: ``default``, ``linear`` or ``llama3``.
        theta: base of the wavelengths.
        factor: by how much positions are stretched (linear, llama3).
        low_freq_factor, high_freq_factor: llama3: wavelengths above ``original / low`` tokens are
            stretched in full, those below ``original / high`` not at all, the rest in between.
        original_max_position_embeddings: llama3: context length of the model before stretching.
    """

    kind: str = "default"
    theta: float = 10000.0
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclasses.dataclass(frozen=True)
class NormConfig:
    """The norms of a model, which are all of one kind.

    Attributes:
        eps: added to the mean square or variance.
        centered: LayerNorm, with a bias, instead of RMSNorm.
        stored_minus_one: the checkpoint holds ``weight - 1``; the sum is formed, and used, in float32.
    """

    eps: float
    centered: bool = False
    stored_minus_one: bool = False


@dataclasses.dataclass(frozen=True)
class LinearShape:
    """Shape of one linear layer of a block."""

    out_features: int
    in_features: int
    bias: bool


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """The attention layer of a block.

    Attributes:
        shape: heads, their widths, and what is done to the scores.
        rope: rotary position embedding of the first ``shape.rotary_dim`` dimensions of a head.
        bias: whether the query, key and value projections add one.
        output_bias: whether the output projection does.
        head_norms: queries and keys are normed head by head.
    """

    shape: AttentionShape
    rope: RopeConfig
    bias: bool = False
    output_bias: bool = False
    head_norms: bool = False


@dataclasses.dataclass(frozen=True)
class MLPConfig:
    """The feed-forward layer of a block.

    Attributes:
        intermediate_size: its width.
        activation: one of :data:`sparsert.ops.ACTIVATIONS`.
        gated: ``activation(gate(x)) * up(x)``; otherwise ``activation(up(x))``.
        bias: whether its linear layers add one.
    """

    intermediate_size: int
    activation: str = "silu"
    gated: bool = True
    bias: bool = False


@dataclasses.dataclass(frozen=True)
class BlockConfig:
    """One block; None stands for a layer that the model does not have there."""

    attention: AttentionConfig | None
    mlp: MLPConfig | None


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """A decoder-only transformer.

    Attributes:
        architecture: the Hugging Face class name.
        hidden_size: width of the residual stream.
        vocab_size: rows of the embedding and of the head.
        blocks: all blocks of the checkpoint, before any is skipped.
        norm: the kind of norm.
        post_norms: what a layer computes is normed as well, before it is added to the stream.
        fused_tensors: the checkpoint stores query, key and value as one tensor, and gate and up as one.
        body_prefixes: how names of tensors inside the model may begin, the usual one first.
        embedding_scale: factor of the embedding, rounded to the model's dtype; None: no factor.
        logit_softcap: logits become ``softcap * tanh(logit / softcap)``; None: they stay.
        tie_word_embeddings: the head uses the embedding's matrix.
        max_position_embeddings: longest sequence that the model was made for, in tokens.
        bos_token_id: first token of a text, if the model has one.
        eos_token_ids: tokens that end a text; may be empty.
    """

    architecture: str
    hidden_size: int
    vocab_size: int
    blocks: tuple[BlockConfig, ...]
    norm: NormConfig
    post_norms: bool
    fused_tensors: bool
    body_prefixes: tuple[str, ...]
    embedding_scale: float | None
    logit_softcap: float | None
    tie_word_embeddings: bool
    max_position_embeddings: int
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> DecoderConfig:
        """Read the content of a ``config.json``.

        Raises:
            UnsupportedError: architecture, activation, rope type, key or quantisation that the forward does
                not compute; the message lists what it does.
            CheckpointError: a size is missing, of the wrong type, or contradicts another.
        """
        from sparsert.models.families import read_config

        return read_config(config)

    @property
    def num_blocks(self) -> int:
        """Blocks in the checkpoint, before any is skipped."""
        return len(self.blocks)

    def running(self, block: int, plan: LayerPlan | None = None) -> BlockConfig:
        """A block without the layers that a plan skips; default all run."""
        config = self.blocks[block]
        if plan is None:
            return config
        return BlockConfig(
            config.attention if plan.runs_attention(block) else None, config.mlp if plan.runs_mlp(block) else None
        )

    def block_linears(self, block: int, plan: LayerPlan | None = None) -> dict[str, LinearShape]:
        """The linear layers of a block by their name inside it, in the order they run; without what a plan skips."""
        hidden, config = self.hidden_size, self.running(block, plan)
        linears: dict[str, LinearShape] = {}
        if config.attention is not None:
            shape, bias = config.attention.shape, config.attention.bias
            queries, keys = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
            linears["self_attn.q_proj"] = LinearShape(queries, hidden, bias)
            linears["self_attn.k_proj"] = LinearShape(keys, hidden, bias)
            linears["self_attn.v_proj"] = LinearShape(keys, hidden, bias)
            linears["self_attn.o_proj"] = LinearShape(hidden, queries, config.attention.output_bias)
        if config.mlp is not None:
            width, bias = config.mlp.intermediate_size, config.mlp.bias
            if config.mlp.gated:
                linears["mlp.gate_proj"] = LinearShape(width, hidden, bias)
            linears["mlp.up_proj"] = LinearShape(width, hidden, bias)
            linears["mlp.down_proj"] = LinearShape(hidden, width, bias)
        return linears

    def block_norms(self, block: int, plan: LayerPlan | None = None) -> dict[str, int]:
        """Widths of the norms of a block by their name inside it; without what a plan skips."""
        config, norms = self.running(block, plan), {}
        for part, layer in (("attention", config.attention), ("mlp", config.mlp)):
            if layer is not None:
                norms[f"{part}_norm"] = self.hidden_size
                if self.post_norms:
                    norms[f"{part}_post_norm"] = self.hidden_size
        if config.attention is not None and config.attention.head_norms:
            norms["self_attn.q_norm"] = norms["self_attn.k_norm"] = config.attention.shape.head_dim
        return norms

    def attention_shapes(self, plan: LayerPlan | None = None) -> tuple[AttentionShape, ...]:
        """What the attention layers compute, in order; without what a plan skips."""
        running = [self.running(block, plan).attention for block in range(self.num_blocks)]
        return tuple(attention.shape for attention in running if attention is not None)

    def rope_tables(self, plan: LayerPlan | None = None) -> tuple[tuple[RopeConfig, int], ...]:
        """The different ropes of the attention layers, each with the width of its tables; without what a plan skips."""
        running = [self.running(block, plan).attention for block in range(self.num_blocks)]
        kinds = [(attention.rope, attention.shape.rotary_dim) for attention in running if attention is not None]
        return tuple(dict.fromkeys(kinds))

    @property
    def num_heads(self) -> int:
        """Query heads of the block that has most; this and the following three are for estimates and summaries."""
        return max((shape.num_heads for shape in self.attention_shapes()), default=0)

    @property
    def num_kv_heads(self) -> int:
        """Key/value heads of the block that has most."""
        return max((shape.num_kv_heads for shape in self.attention_shapes()), default=0)

    @property
    def head_dim(self) -> int:
        """Width of a head in the block that has the widest."""
        return max((shape.head_dim for shape in self.attention_shapes()), default=0)

    @property
    def intermediate_size(self) -> int:
        """Width of the widest feed-forward layer."""
        return max((block.mlp.intermediate_size for block in self.blocks if block.mlp is not None), default=0)
