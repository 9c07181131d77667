"""The architectures that run: for each a few facts, and a function that reads one block of its ``config.json``.

An architecture is an entry of :data:`FAMILIES` and nothing else: no class, no branch in the forward. What a
function returns is what the forward computes, so a reader of this file sees all that tells one family from
another. Keys that do not change the forward (dropout, initialiser range, cache switches) are ignored; keys that
would change it into something it does not compute are refused by name, before a tensor is read.

Defaults of missing keys are those of the configuration classes of transformers.

Source: configuration and modeling files of transformers 5.23, each family's own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from sparsert.checkpoint.layer_types import SLIDING_ATTENTION
from sparsert.checkpoint.quantization import unsupported_quantization
from sparsert.errors import CheckpointError, UnsupportedError
from sparsert.models.config import (
    AttentionConfig,
    BlockConfig,
    DecoderConfig,
    MLPConfig,
    NormConfig,
    RopeConfig,
)
from sparsert.models.config_values import ConfigValues, token_ids
from sparsert.models.per_layer import block_values
from sparsert.models.rope_config import read_rope, read_rope_by_type, rotary_share
from sparsert.ops import AttentionShape
from sparsert.schedule import SKIP_NAMES

#: Hugging Face's names of activations -> those of :data:`sparsert.ops.ACTIVATIONS`.
SUPPORTED_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu2": "relu2",
}

#: Keys that would make any family compute something else.
_REFUSED_KEYS = (
    "block_configs",
    "layer_head_num",
    "layer_inter_size",
    "attention_chunk_size",
    "use_bidirectional_attention",
)


@dataclasses.dataclass(frozen=True)
class Family:
    """What tells an architecture from the others.

    Attributes:
        model_type: ``model_type`` of its configuration.
        read_block: what holds for one block -> what it computes.
        defaults: values of missing keys.
        aliases: older names of keys.
        eps_key: where the norms' epsilon stands.
        centered, stored_minus_one: of the norms, see :class:`NormConfig`.
        post_norms, fused_tensors, body_prefixes: as in :class:`DecoderConfig`.
        scaled_embedding: the embedding is multiplied by the square root of its width.
        refused_keys: keys that must be missing or null, beside those that no family may have.
    """

    model_type: str
    read_block: Callable[[ConfigValues], BlockConfig]
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    eps_key: str = "rms_norm_eps"
    centered: bool = False
    stored_minus_one: bool = False
    post_norms: bool = False
    fused_tensors: bool = False
    body_prefixes: tuple[str, ...] = ("model.",)
    scaled_embedding: bool = False
    refused_keys: tuple[str, ...] = ()


def _llama(values: ConfigValues) -> BlockConfig:
    bias = values.flag("attention_bias")
    attention = _attention(values, read_rope(values), bias=bias, output_bias=bias)
    return BlockConfig(attention, _mlp(values, bias=values.flag("mlp_bias")))


def _mistral(values: ConfigValues) -> BlockConfig:
    return BlockConfig(
        _attention(values, read_rope(values), window=values.optional_size("sliding_window")), _mlp(values)
    )


def _qwen2(values: ConfigValues) -> BlockConfig:
    return BlockConfig(_attention(values, read_rope(values), bias=True, window=_window_by_type(values)), _mlp(values))


def _qwen3(values: ConfigValues) -> BlockConfig:
    bias = values.flag("attention_bias")
    attention = _attention(
        values, read_rope(values), bias=bias, output_bias=bias, window=_window_by_type(values), head_norms=True
    )
    return BlockConfig(attention, _mlp(values))


def _gemma2(values: ConfigValues) -> BlockConfig:
    bias = values.flag("attention_bias")
    attention = _attention(
        values, read_rope(values), bias=bias, output_bias=bias, window=_window_by_type(values),
        scale=values.number("query_pre_attn_scalar") ** -0.5, softcap=values.optional_number("attn_logit_softcapping"),
    )  # fmt: skip
    return BlockConfig(attention, _mlp(values, activation_key="hidden_activation"))


def _gemma3(values: ConfigValues) -> BlockConfig:
    bias = values.flag("attention_bias")
    attention = _attention(
        values, read_rope_by_type(values), bias=bias, output_bias=bias, window=_window_by_type(values),
        scale=values.number("query_pre_attn_scalar") ** -0.5, head_norms=True,
    )  # fmt: skip
    return BlockConfig(attention, _mlp(values, activation_key="hidden_activation"))


def _nemotron(values: ConfigValues) -> BlockConfig:
    bias = values.flag("attention_bias")
    attention = _attention(values, read_rope(values, partial=True), bias=bias, output_bias=bias, partial=True)
    return BlockConfig(attention, _mlp(values, gated=False, bias=values.flag("mlp_bias")))


def _phi3(values: ConfigValues) -> BlockConfig:
    window = values.optional_size("sliding_window")
    return BlockConfig(_attention(values, read_rope(values, partial=True), window=window, partial=True), _mlp(values))


_LLAMA_DEFAULTS = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "max_position_embeddings": 2048}
_QWEN_DEFAULTS = {
    **_LLAMA_DEFAULTS,
    "max_position_embeddings": 32768,
    "num_key_value_heads": 32,
    "sliding_window": 4096,
}
_GEMMA_DEFAULTS = {
    "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-6,
    "head_dim": 256,
    "num_key_value_heads": 4,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
}

#: Every architecture that runs, by the class name in config.json.
FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family("llama", _llama, _LLAMA_DEFAULTS),
    "MistralForCausalLM": Family(
        "mistral",
        _mistral,
        {**_LLAMA_DEFAULTS, "max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
    ),
    "Qwen2ForCausalLM": Family("qwen2", _qwen2, _QWEN_DEFAULTS),
    "Qwen3ForCausalLM": Family("qwen3", _qwen3, {**_QWEN_DEFAULTS, "head_dim": 128}),
    "Gemma2ForCausalLM": Family(
        "gemma2",
        _gemma2,
        {
            **_GEMMA_DEFAULTS,
            "max_position_embeddings": 8192,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
        stored_minus_one=True,
        post_norms=True,
        scaled_embedding=True,
    ),
    "Gemma3ForCausalLM": Family(
        "gemma3_text",
        _gemma3,
        {**_GEMMA_DEFAULTS, "max_position_embeddings": 131072},
        stored_minus_one=True,
        post_norms=True,
        body_prefixes=("model.", "model.language_model.", "language_model.model."),
        scaled_embedding=True,
        # the key exists and transformers' attention does not use it
        refused_keys=("attn_logit_softcapping",),
    ),
    "NemotronForCausalLM": Family(
        "nemotron",
        _nemotron,
        {"hidden_act": "relu2", "norm_eps": 1e-5, "max_position_embeddings": 4096, "partial_rotary_factor": 0.5},
        aliases={"rope_percent": "partial_rotary_factor", "rope_percentage": "partial_rotary_factor",
                 "kv_channels": "head_dim"},
        eps_key="norm_eps",
        centered=True,
        stored_minus_one=True,
    ),
    "Phi3ForCausalLM": Family(
        "phi3", _phi3, {**_LLAMA_DEFAULTS, "rms_norm_eps": 1e-5, "max_position_embeddings": 4096}, fused_tensors=True
    ),
}  # fmt: skip

#: Values of ``architectures[0]`` in config.json that can be run.
SUPPORTED_ARCHITECTURES = tuple(FAMILIES)


def read_config(config: Mapping[str, Any]) -> DecoderConfig:
    """Read the content of a ``config.json``; see :meth:`DecoderConfig.from_hf`."""
    architecture = _architecture(config)
    family = FAMILIES[architecture]
    _check_stored_plain(config)
    filled = _filled(config, family)
    values = ConfigValues(filled)
    for key in (*_REFUSED_KEYS, *family.refused_keys):
        if filled.get(key):
            raise UnsupportedError(
                f"config.json: {key} {filled[key]!r} cannot be run with {architecture}; supported: null"
            )
    hidden_size = values.size("hidden_size")
    return DecoderConfig(
        architecture=architecture,
        hidden_size=hidden_size,
        vocab_size=values.size("vocab_size"),
        blocks=tuple(
            _without_skipped(family.read_block(block), block)
            for block in block_values(filled, filled["num_hidden_layers"])
        ),
        norm=NormConfig(values.number(family.eps_key), family.centered, family.stored_minus_one),
        post_norms=family.post_norms,
        fused_tensors=family.fused_tensors,
        body_prefixes=family.body_prefixes,
        embedding_scale=hidden_size**0.5 if family.scaled_embedding else None,
        logit_softcap=values.optional_number("final_logit_softcapping"),
        tie_word_embeddings=values.flag("tie_word_embeddings"),
        max_position_embeddings=values.size("max_position_embeddings"),
        bos_token_id=next(iter(token_ids(config, "bos_token_id")), None),
        eos_token_ids=token_ids(config, "eos_token_id"),
    )


def _architecture(config: Mapping[str, Any]) -> str:
    names = config.get("architectures") or []
    if names:
        architecture = str(names[0])
    else:
        # a configuration saved without its model names no class
        by_type = {family.model_type: name for name, family in FAMILIES.items()}
        model_type = config.get("model_type")
        architecture = by_type.get(str(model_type), f"model_type {model_type!r}")
    ConfigValues(config).check_supported("architecture", architecture, SUPPORTED_ARCHITECTURES)
    return architecture


def _check_stored_plain(config: Mapping[str, Any]) -> None:
    """Refuse weights whose values are quantized; how they are packed is the checkpoint's business."""
    reason = unsupported_quantization(config)
    if reason is not None:
        raise UnsupportedError(
            f"config.json: {reason} and cannot be loaded; give the checkpoint in bfloat16, float16 or float32, with "
            f"zeros where it is pruned"
        )


def _filled(config: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """The configuration with older names replaced and missing keys filled in; what is null stays null."""
    filled = dict(config)
    for old, name in family.aliases.items():
        if filled.get(old) is not None and filled.get(name) is None:
            filled[name] = filled[old]
    filled = {**family.defaults, **filled}
    values = ConfigValues(filled)
    filled["num_hidden_layers"] = values.size("num_hidden_layers")
    filled.setdefault("model_type", family.model_type)
    heads = filled.get("num_attention_heads")
    if heads is None or isinstance(heads, list):
        return filled
    heads, hidden_size = values.size("num_attention_heads"), values.size("hidden_size")
    if filled.get("num_key_value_heads") is None:
        filled["num_key_value_heads"] = heads
    if filled.get("head_dim") is None:
        # of the whole model: a block that keeps fewer heads keeps their width
        if hidden_size % heads:
            raise CheckpointError(
                f"config.json: hidden_size {hidden_size} is no multiple of num_attention_heads {heads} "
                f"and there is no head_dim; add it"
            )
        filled["head_dim"] = hidden_size // heads
    return filled


def _without_skipped(block: BlockConfig, values: ConfigValues) -> BlockConfig:
    skipped = {SKIP_NAMES[name] for name in values.get("skip")}
    return BlockConfig(None if "attention" in skipped else block.attention, None if "mlp" in skipped else block.mlp)


def _attention(
    values: ConfigValues,
    rope: RopeConfig,
    *,
    bias: bool = False,
    output_bias: bool = False,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    partial: bool = False,
    head_norms: bool = False,
) -> AttentionConfig:
    heads = values.size("num_attention_heads")
    kv_heads = values.size("num_key_value_heads", heads)
    head_dim = values.size("head_dim")
    if heads % kv_heads:
        raise CheckpointError(
            f"{values.where}: num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}"
        )
    if head_dim % 2:
        raise CheckpointError(f"{values.where}: head_dim {head_dim} is odd; rotary embeddings turn pairs")
    share = rotary_share(values) if partial else 1.0
    rotary_dim = int(head_dim * share)
    if rotary_dim % 2 or not 0 < rotary_dim <= head_dim:
        raise CheckpointError(
            f"{values.where}: partial_rotary_factor {share} of head_dim {head_dim} turns {rotary_dim} "
            f"dimensions; need an even number from 2 to {head_dim}"
        )
    shape = AttentionShape(
        heads, kv_heads, head_dim, rotary_dim, head_dim**-0.5 if scale is None else scale, window, softcap,
        norm_eps=values.number("rms_norm_eps") if head_norms else 1e-6,
    )  # fmt: skip
    return AttentionConfig(shape, rope, bias, output_bias, head_norms)


def _mlp(
    values: ConfigValues, *, gated: bool = True, bias: bool = False, activation_key: str = "hidden_act"
) -> MLPConfig:
    name = values.get(activation_key)
    values.check_supported(activation_key, name, SUPPORTED_ACTIVATIONS)
    return MLPConfig(values.size("intermediate_size"), SUPPORTED_ACTIVATIONS[name], gated, bias)


def _window_by_type(values: ConfigValues) -> int | None:
    return values.size("sliding_window") if values.get("layer_type") == SLIDING_ATTENTION else None
