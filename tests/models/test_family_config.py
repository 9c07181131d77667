"""config.json of every family: both releases' spellings, defaults, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import transformers
from tiny_families import VARIANTS, make_variant, rope_of

from sparsert.checkpoint.layer_types import layer_types
from sparsert.checkpoint.writer import pruned_config
from sparsert.errors import CheckpointError, UnsupportedError
from sparsert.models import DecoderConfig, RopeConfig
from sparsert.models.families import FAMILIES, SUPPORTED_ARCHITECTURES
from sparsert.schedule import LayerPlan

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 50,
}


def read(architecture: str, **changes: Any) -> DecoderConfig:
    return DecoderConfig.from_hf({"architectures": [architecture], **SIZES, **changes})


def windows(config: DecoderConfig) -> list[int | None]:
    shapes = [block.attention.shape for block in config.blocks if block.attention is not None]
    return [shape.sliding_window for shape in shapes]


@pytest.mark.parametrize("architecture", SUPPORTED_ARCHITECTURES)
def test_missing_keys_are_those_of_transformers(architecture: str) -> None:
    """A config.json with sizes alone means what transformers' class makes of it."""
    family = FAMILIES[architecture]
    sizes = {**SIZES}
    if architecture == "Phi3ForCausalLM":
        sizes["num_key_value_heads"] = 4
    written = transformers.CONFIG_MAPPING[family.model_type](**sizes).to_dict()
    written = {key: value for key, value in written.items() if "token_id" not in key}
    alone = DecoderConfig.from_hf({"architectures": [architecture], **sizes})
    assert alone == DecoderConfig.from_hf({**written, "architectures": [architecture]})
    assert alone == DecoderConfig.from_hf({"model_type": family.model_type, **sizes})


@pytest.mark.parametrize("variant", VARIANTS)
def test_layer_types_are_those_of_transformers(variant: str) -> None:
    config = make_variant(variant).config
    written = config.to_dict()
    expected = written.pop("layer_types", None)
    assert layer_types(config.to_dict()) == expected
    if "layer type" not in variant:
        assert layer_types(written) == expected, "without being told"


def test_windows_follow_the_blocks_of_a_shortened_model() -> None:
    """Rules that count blocks must not move windows when a block is gone."""
    for architecture, more in (
        ("Gemma2ForCausalLM", {}),
        ("Gemma3ForCausalLM", {"sliding_window_pattern": 3}),
        ("Qwen2ForCausalLM", {"use_sliding_window": True, "max_window_layers": 4}),
    ):
        config = {"architectures": [architecture], **SIZES, "sliding_window": 6, **more}
        whole = windows(DecoderConfig.from_hf(config))
        kept = [0, 1, 3, 4, 7]
        assert windows(DecoderConfig.from_hf(pruned_config(config, LayerPlan(8, tuple(kept))))) == [
            whole[block] for block in kept
        ]
        assert 6 in whole and None in whole
        assert "layer_types" not in pruned_config(config, LayerPlan.full(8))


def test_gemma3_has_a_rope_for_each_kind_of_block() -> None:
    old = {"rope_theta": 5e5, "rope_local_base_freq": 2e4, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    config = read("Gemma3ForCausalLM", **old)
    assert rope_of(config, 0) == RopeConfig(theta=2e4) and rope_of(config, 5) == RopeConfig("linear", 5e5, 8.0)
    bare = read("Gemma3ForCausalLM")
    assert rope_of(bare, 0) == RopeConfig(theta=1e4) and rope_of(bare, 5) == RopeConfig(theta=1e6)
    assert windows(bare) == [4096] * 5 + [None] + [4096] * 2


@pytest.mark.parametrize(
    "older", [{"rope_percent": 0.25}, {"rope_percentage": 0.25}, {"partial_rotary_factor": 0.25, "rope_percent": 1.0}]
)
def test_older_names_of_nemotron(older: dict[str, Any]) -> None:
    config = read("NemotronForCausalLM", **older, kv_channels=24)
    shape = config.attention_shapes()[0]
    assert (shape.head_dim, shape.rotary_dim) == (24, 6)
    assert config.norm.centered and config.norm.stored_minus_one


def test_mistral_without_a_window() -> None:
    assert windows(read("MistralForCausalLM", sliding_window=None)) == [None] * 8
    assert windows(read("MistralForCausalLM")) == [4096] * 8


@pytest.mark.parametrize(
    ("architecture", "changes", "message"),
    [
        ("Gemma3ForConditionalGeneration", {}, "supported: LlamaForCausalLM, .*Gemma3ForCausalLM.*Phi3ForCausalLM"),
        ("DeciLMForCausalLM", {}, "architecture DeciLMForCausalLM cannot be run"),
        ("Gemma3ForCausalLM", {"use_bidirectional_attention": True}, "use_bidirectional_attention True"),
        ("Gemma3ForCausalLM", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping 50.0 cannot be run"),
        ("Phi3ForCausalLM", {"rope_scaling": {"type": "longrope"}}, "rope type longrope.*supported: default, linear"),
        ("Qwen2ForCausalLM", {"rope_scaling": {"rope_type": "yarn"}}, "rope type yarn"),
        ("Qwen2ForCausalLM", {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5.*supported: 1.0"),
        ("Qwen3ForCausalLM", {"layer_types": ["chunked_attention"] * 8}, "layer type chunked_attention"),
        ("Qwen2ForCausalLM", {"rope_parameters": {"full_attention": {}}}, "by layer type"),
        ("NemotronForCausalLM", {"hidden_act": "xielu"}, "hidden_act xielu cannot be run; supported: silu"),
    ],
)
def test_what_is_not_computed_is_refused(architecture: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        read(architecture, **changes)


@pytest.mark.parametrize(
    ("architecture", "changes", "message"),
    [
        ("Gemma2ForCausalLM", {"layer_types": ["full_attention"] * 7}, "layer_types lists 7 layers"),
        ("Gemma3ForCausalLM", {"sliding_window_pattern": 0}, "sliding_window_pattern is 0; a number of blocks"),
        ("Gemma3ForCausalLM", {"rope_parameters": {"rope_theta": 1e4}}, "must be given by layer type"),
        ("Gemma2ForCausalLM", {"sliding_window": None}, "sliding_window is missing"),
        ("NemotronForCausalLM", {"partial_rotary_factor": 0.1}, "turns 1 dimensions; need an even number from 2 to 16"),
        ("NemotronForCausalLM", {"partial_rotary_factor": 1.5}, "turns 24 dimensions"),
        ("LlamaForCausalLM", {"rope_scaling": "linear"}, "rope_parameters or rope_scaling is 'linear'; a JSON object"),
        ("LlamaForCausalLM", {"attention_bias": "yes"}, "attention_bias is 'yes'; true or false"),
    ],
)
def test_damaged_config_names_the_key(architecture: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read(architecture, **changes)
