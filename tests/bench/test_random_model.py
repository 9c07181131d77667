"""Random models: packed 2:4 on their device, finite through many blocks, and never two dense layers at once."""

from __future__ import annotations

import gc

import pytest
import torch

from sparsert import ops
from sparsert.bench.architectures import hf_config
from sparsert.errors import InputError
from sparsert.models import DecoderConfig, DecoderModel
from sparsert.models.random import prune_at_random_, random_model
from sparsert.nn import SparseLinear
from sparsert.schedule import LayerPlan

CONFIG = DecoderConfig.from_hf(hf_config("tiny"))


def sparse_layers(model: DecoderModel) -> list[SparseLinear]:
    return [module for module in model.modules() if isinstance(module, SparseLinear)]


def test_masks_are_two_of_four_and_all_six_kinds() -> None:
    weight = torch.randn(64, 512)
    kept = (prune_at_random_(weight).view(-1, 4) != 0).int()
    assert bool((kept.sum(1) == 2).all())
    codes, counts = (kept @ torch.tensor([8, 4, 2, 1], dtype=torch.int32)).unique(return_counts=True)
    assert codes.tolist() == [3, 5, 6, 9, 10, 12]
    share = counts / counts.sum()
    assert bool(((share > 0.14) & (share < 0.19)).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_sparse_model_runs_and_holds_nothing_dense(dtype: torch.dtype) -> None:
    model = random_model(CONFIG, device="cpu", dtype=dtype, plan=LayerPlan.remove(8, (4,)))
    assert model.plan.kept == (0, 1, 2, 3, 5, 6, 7)
    # qkv, o, gate_up and down of each block
    assert len(sparse_layers(model)) == 4 * 7
    assert model.report.count("2:4") == 7 * 7 and model.report.count("dense") == 0
    assert "model.layers.5.mlp.down_proj.weight" in model.report.linears
    assert "model.layers.4.mlp.down_proj.weight" not in model.report.linears
    weight = ops.unpack(sparse_layers(model)[0].packed())
    assert bool(((weight.view(-1, 4) != 0).sum(1) == 2).all())
    logits = model(torch.randint(512, (2, 9)))
    assert logits.dtype == dtype and bool(logits.isfinite().all())
    assert 0.3 < float(logits.float().std()) < 3


def test_dense_model_has_no_zeros() -> None:
    model = random_model(CONFIG, device="cpu", dtype=torch.bfloat16, sparse=False)
    assert not sparse_layers(model) and model.report.count("dense") == 7 * 8
    for name, parameter in model.named_parameters():
        assert int((parameter == 0).sum()) <= parameter.numel() // 1000, name


def test_activations_stay_finite_through_many_blocks_in_bf16() -> None:
    deep = DecoderConfig.from_hf(hf_config("tiny") | {"num_hidden_layers": 80})
    for sparse in (True, False):
        model = random_model(deep, device="cpu", dtype=torch.bfloat16, sparse=sparse)
        logits = model(torch.randint(512, (1, 16))).float()
        assert bool(logits.isfinite().all()) and 0.3 < float(logits.std()) < 3


def test_same_seed_same_weights() -> None:
    first, again, other = (random_model(CONFIG, device="cpu", dtype=torch.float32, seed=s) for s in (3, 3, 4))
    tokens = torch.randint(512, (1, 5))
    assert torch.equal(first(tokens), again(tokens))
    assert not torch.equal(first(tokens), other(tokens))


def test_tied_head_and_odd_width() -> None:
    changes = {"tie_word_embeddings": True, "intermediate_size": 102, "attention_bias": True}
    model = random_model(DecoderConfig.from_hf(hf_config("tiny") | changes), device="cpu", dtype=torch.float32)
    assert model.lm_head.weight is model.embed_tokens.weight
    # an input width that is no multiple of four cannot be 2:4
    assert model.report.linears["model.layers.0.mlp.down_proj.weight"].kind == "dense"
    assert bool(model(torch.randint(512, (1, 5))).isfinite().all())


def test_a_plan_of_another_model_is_refused() -> None:
    with pytest.raises(InputError, match="for 9 blocks, the model has 8"):
        random_model(CONFIG, device="cpu", dtype=torch.float32, plan=LayerPlan.full(9))


@pytest.mark.gpu
def test_making_it_needs_little_more_than_what_stays() -> None:
    config = DecoderConfig.from_hf(hf_config("llama-3.1-8b") | {"num_hidden_layers": 8, "vocab_size": 1024})
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    model = random_model(config, device="cuda", dtype=torch.bfloat16)
    stays = torch.cuda.memory_allocated() - before
    peak = torch.cuda.max_memory_allocated() - before
    layer = 14336 * 4096 * 2
    # one dense layer, its packed copy, and gate and up once more while they are joined
    assert peak - stays < 3 * layer
    assert stays == pytest.approx(model.report.stored_bytes + 2 * 1024 * 4096 * 2, rel=0.01)
    assert bool(model(torch.randint(1024, (1, 32), device="cuda")).isfinite().all())
