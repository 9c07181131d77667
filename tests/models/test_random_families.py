"""Random models of every family, and the check that stands beside every speed-up on them."""

from __future__ import annotations

import pytest
import torch
from tiny_families import VARIANTS, make_variant

from sparsert.bench.card import predict_card, stored_bytes
from sparsert.bench.correctness import LogitsReference
from sparsert.models import DecoderConfig
from sparsert.models.random import random_model
from sparsert.nn import SparseLinear
from sparsert.schedule import LayerPlan

PLAN = LayerPlan(3, (0, 1, 2), without_attention=(1,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_engine_passes_its_check(variant: str, dtype: torch.dtype) -> None:
    config = DecoderConfig.from_hf(make_variant(variant).config.to_dict() | _named(variant))
    model = random_model(config, device="cpu", dtype=dtype, plan=PLAN)
    card = predict_card("x", config, plan=PLAN, sparse=True, dtype=dtype)
    assert (card.weight_bytes, card.read_bytes) == stored_bytes(model)
    logits = model(torch.randint(200, (2, 30)))
    assert bool(logits.isfinite().all()) and 0.3 < float(logits.float().std()) < 3
    check = LogitsReference(model, 3).check(3)
    assert check.correct and 0 < check.error < 0.1, check


def _named(variant: str) -> dict[str, list[str]]:
    return {"architectures": [f"{VARIANTS[variant][0]}ForCausalLM"]}


@pytest.mark.parametrize("variant", ["gemma2, soft caps, window 6, tied", "nemotron, half rotary, group 3"])
def test_a_broken_layer_is_found(variant: str) -> None:
    config = DecoderConfig.from_hf(make_variant(variant).config.to_dict() | _named(variant))
    model = random_model(config, device="cpu", dtype=torch.bfloat16)
    reference = LogitsReference(model, 2)
    assert reference.check(2).correct
    layer = model.blocks[1].get_submodule("mlp.down_proj")
    assert isinstance(layer, SparseLinear)
    layer.values.view(-1)[::2].mul_(0.5)  # a factor of all would be normed away behind Gemma's layer
    assert not reference.check(2).correct
