"""Rotary frequencies and rotation against transformers."""

from __future__ import annotations

import pytest
import torch
from tiny_families import rope_of
from tiny_llama import LLAMA3_ROPE
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from sparsert.models import DecoderConfig
from sparsert.models.rope import RotaryEmbedding, inverse_frequencies
from sparsert.ops import rotate

ROPES = {
    "default": {"rope_type": "default", "rope_theta": 500000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0},
    "llama3": LLAMA3_ROPE,
}


@pytest.mark.parametrize("kind", ROPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotation_equals_transformers(kind: str, dtype: torch.dtype) -> None:
    head_dim, length = 24, 77
    reference_config = LlamaConfig(
        hidden_size=96, num_attention_heads=4, head_dim=head_dim, rope_parameters=ROPES[kind]
    )
    reference = LlamaRotaryEmbedding(reference_config)
    config = DecoderConfig.from_hf({**reference_config.to_dict(), "architectures": ["LlamaForCausalLM"]})
    rotary = RotaryEmbedding(rope_of(config), head_dim)
    rotary.reserve_(length, torch.device("cpu"), dtype)

    torch.manual_seed(0)
    q, k = torch.randn(2, 2, 5, 3, head_dim, dtype=dtype).unbind()  # [batch, tokens, heads, head_dim]
    positions = torch.tensor([[0, 1, 2, 3, 4], [70, 3, 76, 40, 41]])
    cosine, sine = reference(q, positions)
    expected_q, expected_k = apply_rotary_pos_emb(q, k, cosine, sine, unsqueeze_dim=2)
    tolerance = 1e-6 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(rotate(q, *rotary(positions)), expected_q, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(rotate(k, *rotary(positions)), expected_k, atol=tolerance, rtol=tolerance)


def test_llama3_stretching_uses_all_three_ranges() -> None:
    """Otherwise the comparison above would not see the formula."""
    plain = RotaryEmbedding(rope_of(DecoderConfig.from_hf(_config(ROPES["default"] | {"rope_theta": 10000.0}))), 24)
    stretched = RotaryEmbedding(rope_of(DecoderConfig.from_hf(_config(LLAMA3_ROPE))), 24)
    ratio = inverse_frequencies(plain.rope, 24) / inverse_frequencies(stretched.rope, 24)
    assert ratio[0] == 1 and ratio[-1] == 8 and bool(((ratio > 1.01) & (ratio < 7.99)).any())


def test_tables_grow_and_stay() -> None:
    rotary = RotaryEmbedding(rope_of(DecoderConfig.from_hf(_config(ROPES["default"]))), 8)
    rotary.reserve_(10, torch.device("cpu"), torch.float32)
    table = rotary.cosine
    rotary.reserve_(7, torch.device("cpu"), torch.float32)
    assert rotary.cosine is table and rotary.length == 10
    rotary.reserve_(11, torch.device("cpu"), torch.float32)
    assert rotary.length == 11 and torch.equal(rotary.cosine[:10], table)
    assert not rotary.state_dict(), "tables follow from the configuration"


def _config(rope: dict) -> dict:
    sizes = {"hidden_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 8}
    return {**sizes, "vocab_size": 9, "architectures": ["LlamaForCausalLM"], "rope_parameters": rope}
