"""LoRA on frozen 2:4 linears: gradients, training, merging under the mask."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from packed_llama import pruned_llama, write_packed
from tiny_llama import random_prompts
from torch import Tensor, nn

import sparsert
from sparsert import InputError, SparseLinear, UnsupportedError, sparsify_
from sparsert.formats import packed_mask

peft = pytest.importorskip("peft")
integration = pytest.importorskip("sparsert.integrations.peft")

TARGETS = ["q_proj", "o_proj", "down_proj", "lm_head"]


def lora(model: nn.Module, **changes: Any) -> Any:
    settings = {"r": 3, "lora_alpha": 7, "target_modules": TARGETS, **changes}
    return integration.support_sparse_linears(peft.LoraConfig(**settings), model)


def randomise_(model: nn.Module, scale: float = 0.1) -> None:
    """Adapters that do something: peft starts with B = 0."""
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn_like(parameter) * scale


def tokens() -> Tensor:
    return torch.tensor(random_prompts([13, 13]))


def test_gradients_are_those_of_the_dense_model() -> None:
    dense = pruned_llama()
    sparse = copy.deepcopy(dense)
    assert len(sparsify_(sparse).packed) == 21
    models = [peft.get_peft_model(model, lora(model)) for model in (dense, sparse)]
    torch.manual_seed(1)
    randomise_(models[0])
    torch.manual_seed(1)
    randomise_(models[1])
    for model in models:
        model(tokens(), labels=tokens()).loss.backward()
    gradients = [{n: p.grad for n, p in model.named_parameters() if p.requires_grad} for model in models]
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) == 2 * (3 * 3 + 1)
    for name, gradient in gradients[0].items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6)


def test_training_lowers_the_loss_and_touches_adapters_only() -> None:
    model = pruned_llama()
    sparsify_(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model = peft.get_peft_model(model, lora(model, target_modules="all-linear"))
    assert len([m for m in model.modules() if isinstance(m, integration.SparseLoraLinear)]) == 21
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    losses = []
    for _ in range(12):
        loss = model(tokens(), labels=tokens()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    after = model.unload().state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_no_dense_copy_is_kept_for_the_backward_pass() -> None:
    layer = SparseLinear.from_linear(nn.Linear(260, 132), torch.tensor([1, 0, 0, 1]).repeat(132, 65))
    kept: list[tuple[int, ...]] = []
    x = torch.randn(5, 260, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tuple(tensor.shape)) or tensor, lambda t: t
    ):
        y = layer(x)
    y.square().sum().backward()
    assert (132, 260) not in kept and tuple(layer.values.shape) in kept
    expected = 2 * y.detach() @ layer.weight
    torch.testing.assert_close(x.grad, expected, rtol=1e-4, atol=1e-4)


def test_compiled_backward_pass() -> None:
    layer = SparseLinear.from_linear(nn.Linear(68, 36), torch.tensor([1, 0, 0, 1]).repeat(36, 17))
    x = torch.randn(5, 68, requires_grad=True)
    layer(x).square().sum().backward()
    expected, x.grad = x.grad, None
    torch.compile(layer, backend="aot_eager", fullgraph=True)(x).square().sum().backward()
    torch.testing.assert_close(x.grad, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_keeps_24_and_says_what_was_lost(dtype: torch.dtype) -> None:
    model = pruned_llama(dtype, attention_bias=True)
    sparsify_(model)
    adapted = peft.get_peft_model(model, lora(model))
    randomise_(adapted)
    layers = {n: m for n, m in adapted.get_base_model().named_modules() if isinstance(m, integration.SparseLoraLinear)}
    expected, shares, outside, whole = {}, {}, 0.0, 0.0
    for name, layer in layers.items():
        update, base = layer.get_delta_weight("default").detach().double(), layer.get_base_layer()
        mask = packed_mask(base.packed())
        expected[name] = base.weight.double() + update * mask
        shares[name] = float((update * ~mask).norm() / update.norm())
        outside, whole = outside + float((update * ~mask).norm()) ** 2, whole + float(update.norm()) ** 2
    head = adapted.get_base_model().lm_head
    whole_head = head.get_base_layer().weight + head.get_delta_weight("default")
    merged, report = integration.merge_masked(adapted)
    assert not [name for name, _ in merged.named_parameters() if "lora_" in name]
    tolerance = 1e-6 if dtype == torch.float32 else 8e-3
    for name, weight in expected.items():
        layer = merged.get_submodule(name)
        assert isinstance(layer, SparseLinear)
        torch.testing.assert_close(layer.weight.double(), weight, rtol=tolerance, atol=tolerance)
        assert int((layer.weight.view(-1, 4) != 0).sum(1).max()) <= 2
    torch.testing.assert_close(merged.lm_head.weight, whole_head.to(dtype), rtol=2 * tolerance, atol=tolerance)
    assert report.lost == pytest.approx(shares, rel=1e-2) and report.dense == ("lm_head",)
    assert report.total == pytest.approx((outside / whole) ** 0.5, rel=1e-2) and 0.5 < report.total < 0.9
    assert "9 2:4 layers merged" in str(report) and "1 dense layers merged whole" in str(report)


def test_an_update_inside_the_mask_loses_nothing() -> None:
    """Two chosen adapters; A picks inputs that every group keeps."""
    linear = nn.Linear(32, 20)
    linear.weight.data.view(-1, 4)[:, 1:3] = 0
    model = nn.Sequential(linear)
    sparsify_(model)
    adapted = peft.get_peft_model(model, lora(model, target_modules=["0"], lora_bias=True))
    randomise_(adapted)
    layer = adapted.get_base_model()[0]
    layer.lora_A["default"].weight.data.view(3, -1, 4)[..., 1:3] = 0
    x = torch.randn(7, 32)
    expected = adapted(x)
    merged, report = integration.merge_masked(adapted)
    torch.testing.assert_close(merged(x), expected, rtol=1e-5, atol=1e-5)
    assert report.total == 0.0 and report.lost == {"0": 0.0}


def test_adapters_save_and_load_on_a_model_of_our_format(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    write_packed(pruned_llama(), tmp_path / "base")
    adapted = peft.get_peft_model(*_with_config(transformers, tmp_path))
    randomise_(adapted)
    expected = adapted(tokens()).logits
    adapted.save_pretrained(tmp_path / "adapter")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    config = integration.support_sparse_linears(peft.LoraConfig.from_pretrained(tmp_path / "adapter"))
    again = peft.PeftModel.from_pretrained(base, tmp_path / "adapter", config=config)
    assert torch.equal(again(tokens()).logits, expected)
    merged, report = integration.merge_masked(again)
    assert len(report.lost) == 9
    merged.save_pretrained(tmp_path / "merged")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(loaded(tokens()).logits, merged(tokens()).logits)


def _with_config(transformers: Any, directory: Path) -> tuple[nn.Module, Any]:
    model = transformers.AutoModelForCausalLM.from_pretrained(directory / "base")
    return model, lora(model)


def test_what_cannot_be_done_is_refused() -> None:
    model = pruned_llama()
    sparsify_(model)
    with pytest.raises(InputError, match="needs the model"):
        integration.support_sparse_linears(peft.LoraConfig(target_modules="all-linear"))
    with pytest.raises(UnsupportedError, match="'pissa' changes the base weight"):
        peft.get_peft_model(copy.deepcopy(model), lora(model, init_lora_weights="pissa"))
    with pytest.raises(UnsupportedError, match="DoraLinearVariant is not supported on 2:4 layers"):
        peft.get_peft_model(copy.deepcopy(model), lora(model, use_dora=True))
    with pytest.raises(InputError, match="not a LlamaForCausalLM"):
        integration.merge_masked(model)
    adapted = peft.get_peft_model(model, lora(model))
    with pytest.raises(UnsupportedError, match=r"call sparsert.integrations.peft.merge_masked\(model\)"):
        adapted.merge_and_unload()
    broken = peft.get_peft_model(model, lora(model))
    broken.get_base_model().model.layers[1].mlp.down_proj.lora_B["default"].weight.data[3, 1] = float("nan")
    with pytest.raises(
        InputError, match=r"model\.layers\.1\.mlp\.down_proj: adapter 'default' has values that are not"
    ):
        integration.merge_masked(broken)


@pytest.mark.gpu
def test_memory_of_training_on_a_gpu() -> None:
    """Forward and backward through 2:4 layers keep less than one dense copy beside the packed weights."""
    layers = [nn.Linear(2048, 2048, bias=False, device="cuda", dtype=torch.bfloat16) for _ in range(8)]
    for layer in layers:
        layer.weight.data.view(-1, 4)[:, 1:3] = 0
    # a norm: peft asks a model's first parameter where it is
    model = nn.Sequential(*layers, nn.LayerNorm(2048, device="cuda", dtype=torch.bfloat16))
    del layers, layer
    sparsert.sparsify_(model)
    adapted = peft.get_peft_model(model, lora(model, target_modules="all-linear"))
    x = torch.randn(4, 2048, device="cuda", dtype=torch.bfloat16)
    adapted(x).square().mean().backward()  # cuBLAS takes its workspace, one for each thread
    adapted.zero_grad()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    adapted(x).square().mean().backward()
    assert torch.cuda.max_memory_allocated() - before < 3 * 2048 * 2048 * 2  # of eight dense layers, one and scratch
