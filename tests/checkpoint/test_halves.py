"""Names of tensors to halves of a block, with norms in front of each half and on both sides."""

from __future__ import annotations

import pytest

from sparsert.checkpoint.halves import half_of


@pytest.mark.parametrize(
    ("inside", "in_front", "both_sides"),
    [
        ("self_attn.q_proj.weight", "attention", "attention"),
        ("self_attn.q_norm.weight", "attention", "attention"),
        ("mlp.down_proj.compressed", "mlp", "mlp"),
        ("input_layernorm.weight", "attention", "attention"),
        ("post_attention_layernorm.bias", "mlp", "attention"),
        ("pre_feedforward_layernorm.weight", "mlp", "mlp"),
        ("post_feedforward_layernorm.weight", "mlp", "mlp"),
        ("mlp_extra.weight", None, None),
        ("", None, None),
    ],
)
def test_half_of(inside: str, in_front: str | None, both_sides: str | None) -> None:
    assert half_of(inside, post_norms=False) == in_front
    assert half_of(inside, post_norms=True) == both_sides
