"""The card's bytes, from the configuration alone, are those of a model that was made."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sparsert.bench.architectures import hf_config
from sparsert.bench.card import CORNERS, amount, corner_name, predict_card, stored_bytes
from sparsert.bench.workload import Setting
from sparsert.engine.cache import KVCache
from sparsert.models import DecoderConfig
from sparsert.models.random import random_model
from sparsert.schedule import LayerPlan


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "changes", [{}, {"tie_word_embeddings": True}, {"attention_bias": True, "mlp_bias": True, "intermediate_size": 100}]
)
def test_bytes_are_those_of_the_model(sparse: bool, dtype: torch.dtype, changes: dict[str, Any]) -> None:
    config = DecoderConfig.from_hf(hf_config("tiny") | changes)
    model = random_model(config, device="cpu", dtype=dtype, plan=LayerPlan.remove(8, (4, 5)), sparse=sparse)
    card = predict_card("tiny", config, blocks_kept=6, sparse=sparse, dtype=dtype)
    assert (card.weight_bytes, card.read_bytes) == stored_bytes(model)
    model(torch.zeros(1, 64, dtype=torch.int64))  # makes rotary tables, which are no weights
    assert (card.weight_bytes, card.read_bytes) == stored_bytes(model)
    cache = KVCache(model.attention_shapes, 3, 16, torch.device("cpu"), dtype)
    assert cache.nbytes == 3 * 16 * card.kv_bytes_per_token
    assert card.corner == ("2:4 + blocks removed" if sparse else "blocks removed")


def test_two_of_four_is_nine_sixteenths() -> None:
    config = DecoderConfig.from_hf(hf_config("llama-3.1-8b"))
    dense, sparse = (
        predict_card("x", config, blocks_kept=32, sparse=sparse, dtype=torch.bfloat16) for sparse in (False, True)
    )
    linears = 32 * sum(s.out_features * s.in_features for s in config.block_linears().values()) * 2
    assert dense.weight_bytes - sparse.weight_bytes == linears * 7 // 16
    assert dense.parameters == sparse.parameters
    # the embedding is read one row at a time, the head whole
    assert dense.weight_bytes - dense.read_bytes == 128256 * 4096 * 2
    assert dense.kv_bytes_per_token == 2 * 32 * 8 * 128 * 2


def test_ceiling() -> None:
    config = DecoderConfig.from_hf(hf_config("tiny"))
    card = predict_card("tiny", config, blocks_kept=8, sparse=True, dtype=torch.bfloat16)
    setting = Setting(batch=4, input_len=100, output_len=20, num_prompts=4)
    step_bytes = card.read_bytes + 4 * 110 * card.kv_bytes_per_token
    assert card.ceiling_tok_per_s(1e9, setting) == pytest.approx(4 * 1e9 / step_bytes)
    assert card.ceiling_tok_per_s(None, setting) is None
    assert "ceiling at batch 1" in card.to_text(1e9) and "ceiling" not in card.to_text(None)


def test_names() -> None:
    assert [corner_name(s, r) for r in (False, True) for s in (False, True)] == list(CORNERS)
    assert [amount(n) for n in (7, 2048, 3e6, 24e9)] == ["7.0 B", "2.0 kB", "3.0 MB", "24.00 GB"]
