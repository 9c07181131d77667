"""sparsify_ on models of other makers: encoders, vision, encoder-decoder, torch's own modules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from random_24 import random_mask
from torch import Tensor, nn

from sparsert import SparseLinear, sparsify_

transformers = pytest.importorskip("transformers")

_SIZES = {"hidden_size": 36, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 68}


def prune_(model: nn.Module, *, without: tuple[str, ...] = ()) -> None:
    """A random 2:4 mask on every linear but those whose name ends so."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and not name.endswith(without or ("no such name",)):
            module.weight.data *= random_mask(*module.weight.shape)


def bert() -> tuple[nn.Module, dict[str, Tensor]]:
    config = transformers.BertConfig(vocab_size=51, num_labels=3, **_SIZES)
    mask = torch.ones(2, 9, dtype=torch.int64)
    mask[1, 5:] = 0
    return transformers.BertForSequenceClassification(config), {
        "input_ids": torch.randint(0, 51, (2, 9)),
        "attention_mask": mask,
    }


def vit() -> tuple[nn.Module, dict[str, Tensor]]:
    config = transformers.ViTConfig(image_size=24, patch_size=8, num_labels=5, **_SIZES)
    return transformers.ViTForImageClassification(config), {"pixel_values": torch.randn(3, 3, 24, 24)}


@pytest.mark.parametrize("make", [bert, vit])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_encoders_compute_what_the_pruned_dense_model_does(make: Any, dtype: torch.dtype) -> None:
    model, inputs = make()
    model = model.eval().to(dtype)
    inputs = {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}
    prune_(model, without=("classifier",))
    linears = {name for name, module in model.named_modules() if type(module) is nn.Linear}
    with torch.no_grad():
        expected = model(**inputs).logits
        report = sparsify_(model)
        actual = model(**inputs).logits
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
    assert set(report.packed) == linears - {"classifier"} and len(report.packed) >= 12
    assert report.dense == {"classifier": "more than half of its values are not zero"}
    assert not any(type(module) is nn.Linear for name, module in model.named_modules() if name != "classifier")
    text = str(report)
    assert f"{len(report.packed)} linears packed 2:4" in text and ".*." in text and "(2x)" in text
    assert "  dense: classifier: more than half of its values are not zero" in text


def test_a_model_that_reads_the_weights_dtype() -> None:
    """T5 converts to ``wo.weight.dtype``; a decoder with cross-attention and a tied head."""
    config = transformers.T5Config(
        vocab_size=61, d_model=36, d_kv=12, d_ff=68, num_layers=2, num_heads=3, decoder_start_token_id=0
    )
    model = transformers.T5ForConditionalGeneration(config).eval()
    prune_(model, without=("lm_head",))
    inputs = {"input_ids": torch.randint(0, 61, (2, 7)), "decoder_input_ids": torch.randint(0, 61, (2, 4))}
    with torch.no_grad():
        expected = model(**inputs).logits
        report = sparsify_(model)
        torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-4, atol=1e-5)
    assert set(report.dense) == {"lm_head"} and "shared with another module" in report.dense["lm_head"]


def test_linear_weights_that_are_no_linear_layers_are_reported() -> None:
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=40, n_embd=36, n_layer=2, n_head=3))
    report = sparsify_(gpt2)
    assert report.packed == () and "Conv1D stores its weight transposed" in report.dense["transformer.h.1.mlp.c_fc"]

    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    stack = nn.Sequential(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(32, 8)).eval()
    prune_(stack)
    x = torch.randn(3, 5, 32)
    with torch.no_grad():
        expected = stack(x)
        report = sparsify_(stack)
        torch.testing.assert_close(stack(x), expected, rtol=1e-4, atol=1e-5)
    assert report.packed == ("1",) and isinstance(stack[1], SparseLinear)
    reasons = {name.rpartition(".")[2]: reason for name, reason in report.dense.items()}
    assert reasons == {
        "in_proj_weight": "a bare parameter of nn.MultiheadAttention, no nn.Linear",
        "out_proj": "a NonDynamicallyQuantizableLinear, whose forward may differ from nn.Linear's",
        "linear1": "nn.TransformerEncoderLayer hands its weight to a fused operator",
        "linear2": "nn.TransformerEncoderLayer hands its weight to a fused operator",
    }
