"""The check beside every speed-up: plain logits are transformers', and a broken layer is found."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_llama import LLAMA3_ROPE, magnitude_prune_, make_llama, save

from sparsert.bench.architectures import hf_config
from sparsert.bench.correctness import LogitsCheck, LogitsReference, plain_logits
from sparsert.checkpoint import open_checkpoint
from sparsert.models import DecoderConfig, load_model
from sparsert.models.random import random_model
from sparsert.nn import SparseLinear

CONFIG = DecoderConfig.from_hf(hf_config("tiny"))


@pytest.mark.parametrize("changes", [{}, {"rope_parameters": LLAMA3_ROPE}, {"attention_bias": True, "mlp_bias": True}])
def test_plain_logits_are_those_of_transformers(tmp_path: Any, changes: dict[str, Any]) -> None:
    theirs = make_llama(**changes)
    magnitude_prune_(theirs)
    model = load_model(open_checkpoint(save(theirs, tmp_path / "model")), device="cpu")
    assert model.report.count("2:4") > 0
    tokens = torch.randint(200, (3, 40))
    ours = plain_logits(model, tokens, torch.float32)
    torch.testing.assert_close(ours, theirs(tokens).logits, rtol=1e-4, atol=1e-4)
    exact = plain_logits(model, tokens, torch.float64)
    assert exact.dtype == torch.float64 and float((ours - exact).abs().max()) < 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sparse", [True, False])
def test_the_engine_passes(dtype: torch.dtype, sparse: bool) -> None:
    model = random_model(CONFIG, device="cpu", dtype=dtype, sparse=sparse)
    reference = LogitsReference(model, 16)
    for batch in (1, 3, 16):
        check = reference.check(batch)
        assert check.correct and 0 < check.error < 0.1 and check.torch_error > 0, check
    assert check.to_dict()["correct"] is True and "fp64" in check.to_dict()["check"]


@pytest.mark.parametrize("name", ["self_attn.o_proj", "mlp.down_proj", "mlp.gate_up_proj.joined"])
def test_one_broken_layer_is_found(name: str) -> None:
    """A kernel that is wrong in one layer of one block: the reference was made before it broke."""
    model = random_model(CONFIG, device="cpu", dtype=torch.bfloat16)
    reference = LogitsReference(model, 2)
    assert reference.check(2).correct
    layer = model.blocks[3].get_submodule(name)
    assert isinstance(layer, SparseLinear)
    layer.values.mul_(0.5)
    assert not reference.check(2).correct


def test_an_error_that_is_not_a_number_is_wrong() -> None:
    assert not LogitsCheck(float("nan"), 0.1).correct
    assert not LogitsCheck(0.21, 0.1).correct and LogitsCheck(0.19, 0.1).correct


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["tiny", "smollm2-135m"])
def test_the_engine_passes_on_a_gpu(name: str, dtype: torch.dtype) -> None:
    for sparse in (True, False):
        model = random_model(DecoderConfig.from_hf(hf_config(name)), device="cuda:0", dtype=dtype, sparse=sparse)
        reference = LogitsReference(model, 16)
        for batch in (1, 4, 16):
            assert reference.check(batch).correct, reference.check(batch)
