"""Tiny random checkpoints of every architecture, made by transformers' own classes."""

from __future__ import annotations

from typing import Any

import torch
from tiny_llama import LLAMA3_ROPE, SIZES
from torch import Tensor, nn

from sparsert.models import DecoderConfig, RopeConfig

_DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 10000.0}

#: Name of the variant -> (family, changes). Windows are shorter than the texts of the tests.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, group 3": ("Llama", {}),
    "llama, llama3 rope, biases, tied": (
        "Llama",
        {"rope_parameters": LLAMA3_ROPE, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
    "llama, gelu": ("Llama", {"hidden_act": "gelu"}),
    "mistral, window 7": ("Mistral", {"sliding_window": 7}),
    "mistral, no window, group 1": ("Mistral", {"sliding_window": None, "num_key_value_heads": 6}),
    "qwen2, biases, no window": ("Qwen2", {}),
    "qwen2, window in the last blocks, tied": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1, "tie_word_embeddings": True},
    ),
    "qwen3, group 3": ("Qwen3", {}),
    "qwen3, window by layer type, biases, group 6": (
        "Qwen3",
        {
            "use_sliding_window": True,
            "sliding_window": 6,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "attention_bias": True,
            "num_key_value_heads": 1,
        },
    ),
    "gemma2, soft caps, window 6, tied": (
        "Gemma2",
        {
            "sliding_window": 6,
            "tie_word_embeddings": True,
            "query_pre_attn_scalar": 40,
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 4.0,
        },
    ),
    "gemma2, no caps, biases, group 1, untied": (
        "Gemma2",
        {
            "sliding_window": 9,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "attention_bias": True,
            "num_key_value_heads": 6,
        },
    ),
    "gemma3, pattern 2, two ropes, tied": (
        "Gemma3",
        {"sliding_window": 5, "sliding_window_pattern": 2, "tie_word_embeddings": True, "num_key_value_heads": 1},
    ),
    "gemma3, layer types, stretched, logit cap": (
        "Gemma3",
        {
            "sliding_window": 8,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
            "final_logit_softcapping": 5.0,
            "query_pre_attn_scalar": 30,
        },
    ),
    "nemotron, half rotary, group 3": ("Nemotron", {}),
    "nemotron, group 6, biases, quarter rotary": (
        "Nemotron",
        {
            "num_attention_heads": 12,
            "head_dim": 16,
            "attention_bias": True,
            "mlp_bias": True,
            "rope_parameters": {**_DEFAULT_ROPE, "partial_rotary_factor": 0.25},
        },
    ),
    "nemotron, tied": ("Nemotron", {"tie_word_embeddings": True, "intermediate_size": 92}),
    "phi3, fused": ("Phi3", {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": None}),
    "phi3, group 3, window 6, partial rotary, tied": (
        "Phi3",
        {
            "sliding_window": 6,
            "tie_word_embeddings": True,
            "head_dim": None,
            "rope_parameters": {**_DEFAULT_ROPE, "partial_rotary_factor": 0.5},
        },
    ),
}


def make_model(family: str, *, seed: int = 0, **changes: Any) -> Any:
    """A random model of a family in fp32, norms and biases moved away from their initial values."""
    import transformers

    torch.manual_seed(seed)
    settings = {**SIZES, **changes}
    if settings["head_dim"] is None:
        del settings["head_dim"]
    name = {"Gemma3": "Gemma3Text"}.get(family, family)
    config = getattr(transformers, f"{name}Config")(**settings)
    # eager: the only implementation that knows soft caps
    model = getattr(transformers, f"{family}ForCausalLM")._from_config(config, attn_implementation="eager")
    model = model.eval().requires_grad_(False)
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("bias") or "norm" in parameter_name:
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def make_variant(variant: str, **changes: Any) -> Any:
    """The random model of an entry of :data:`VARIANTS`."""
    family, settings = VARIANTS[variant]
    return make_model(family, **{**settings, **changes})


def prune_blocks_(model: nn.Module) -> None:
    """Zero the two smallest of every four inputs in every linear layer of a block whose width allows it."""
    for module in model.model.layers.modules():  # type: ignore[union-attr, operator]
        if isinstance(module, nn.Linear) and module.in_features % 4 == 0:
            groups = module.weight.view(-1, 4)
            groups.scatter_(1, groups.abs().argsort(dim=1)[:, :2], 0.0)


def assert_logits_close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-5) -> None:
    """Compare logits relative to the scale of all of them."""
    assert ours.shape == theirs.shape
    error = float((ours.double() - theirs.double()).abs().max() / theirs.double().abs().max())
    assert error <= tolerance, f"off by {error:.1e} of the largest logit"


def rope_of(config: DecoderConfig, block: int = 0) -> RopeConfig:
    """The rope of a block's attention."""
    attention = config.blocks[block].attention
    assert attention is not None
    return attention.rope
