"""config.json -> DecoderConfig: spellings of two releases, defaults, refusals."""

from __future__ import annotations

from typing import Any

import pytest
from tiny_families import rope_of
from tiny_llama import LLAMA3_ROPE
from transformers import LlamaConfig

from sparsert.errors import CheckpointError, UnsupportedError
from sparsert.models import DecoderConfig, NormConfig, RopeConfig

MINIMAL: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "vocab_size": 50,
}


def read(**changes: Any) -> DecoderConfig:
    return DecoderConfig.from_hf({**MINIMAL, **changes})


def test_defaults_are_those_of_llama() -> None:
    config, reference = read(), LlamaConfig(**{key: MINIMAL[key] for key in MINIMAL if key != "architectures"})
    assert config.num_kv_heads == reference.num_key_value_heads == 4
    assert config.head_dim == reference.head_dim == 16
    assert config.norm == NormConfig(reference.rms_norm_eps)
    assert config.max_position_embeddings == reference.max_position_embeddings
    assert config.tie_word_embeddings is reference.tie_word_embeddings is False
    assert rope_of(config) == RopeConfig("default", reference.rope_parameters["rope_theta"])
    assert config.eos_token_ids == ()


def test_reads_what_transformers_writes() -> None:
    written = LlamaConfig(
        hidden_size=96,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=24,
        intermediate_size=160,
        num_hidden_layers=3,
        attention_bias=True,
        tie_word_embeddings=True,
        rope_parameters=LLAMA3_ROPE,
        eos_token_id=[2, 7],
    ).to_dict()
    config = DecoderConfig.from_hf({**written, "architectures": ["LlamaForCausalLM"]})
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (6, 2, 24)
    assert config.tie_word_embeddings
    assert rope_of(config) == RopeConfig("llama3", 10000.0, 8.0, 1.0, 4.0, 32)
    assert config.bos_token_id == 1 and config.eos_token_ids == (2, 7)
    shapes = config.block_linears(2)
    assert (shapes["self_attn.o_proj"].out_features, shapes["self_attn.o_proj"].in_features) == (96, 144)
    assert shapes["self_attn.k_proj"].bias and not shapes["mlp.up_proj"].bias


@pytest.mark.parametrize("key", ["type", "rope_type"])
def test_older_rope_spelling(key: str) -> None:
    config = read(rope_theta=500000.0, rope_scaling={key: "linear", "factor": 4.0})
    assert rope_of(config) == RopeConfig("linear", 500000.0, 4.0)
    assert rope_of(read(rope_theta=500000.0, rope_scaling=None)) == RopeConfig("default", 500000.0)


def test_llama_without_architectures() -> None:
    assert DecoderConfig.from_hf({**MINIMAL, "architectures": None, "model_type": "llama"}).num_blocks == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["GPTNeoXForCausalLM"]}, "architecture GPTNeoXForCausalLM.*supported: LlamaForCausalLM"),
        ({"architectures": [], "model_type": "bloom"}, "model_type 'bloom'.*supported: LlamaForCausalLM"),
        ({"hidden_act": "quick_gelu"}, "hidden_act quick_gelu cannot be run; supported: silu, swish, gelu"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope type yarn.*supported: default, linear, llama3"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"quantization_config": {"quant_method": "gptq"}}, "method 'gptq'.*with zeros where it is pruned"),
    ],
)
def test_unsupported_lists_what_is_supported(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        read(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"vocab_size": "50"}, "vocab_size is '50'; a positive number"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"intermediate_size": 96.5}, "intermediate_size is 96.5; a whole number"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is no multiple of num_key_value_heads 3"),
        ({"hidden_size": 66}, "hidden_size 66 is no multiple of num_attention_heads 4"),
        ({"head_dim": 15}, "head_dim 15 is odd"),
        ({"eos_token_id": "</s>"}, "eos_token_id is '</s>'; it must be a token id or a list"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor is missing"),
    ],
)
def test_damaged_config_names_the_key(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read(**changes)


def test_sparse_weights_are_accepted_and_quantized_ones_are_not() -> None:
    record: dict[str, Any] = {"quant_method": "compressed-tensors", "sparsity_config": {"sparsity_structure": "2:4"}}
    for form in ("dense", "sparse-24-bitmask", "sparse-bitmask"):
        record["sparsity_config"]["format"] = form
        assert read(quantization_config=record).num_blocks == 2
    assert read(quantization_config={"quant_method": "sparsert", "version": 1}).num_blocks == 2
    record |= {"config_groups": {"group_0": {"weights": {"num_bits": 8}}}, "format": "float-quantized"}
    with pytest.raises(UnsupportedError, match=r"method 'compressed-tensors', format 'float-quantized'\) and cannot"):
        read(quantization_config=record)
    assert read(quantization_config=record | {"format": "marlin-24"}).num_blocks == 2
