"""Zeros survive training: full, and by LoRA."""

from __future__ import annotations

import pytest
import torch
from tiny_llama import magnitude_prune_, make_llama
from torch import Tensor, nn

from sparsert.compress.anatomy import anatomy_of
from sparsert.compress.head_loss import label_loss
from sparsert.compress.keep_zeros import ZeroKeeper, masks_of
from sparsert.compress.text import TextWindows
from sparsert.compress.training import Trainer, TrainingOptions
from sparsert.errors import InputError, SparsityError

LINEARS = 3 * 7


def _pruned(dense: tuple[str, ...] = ()) -> nn.Module:
    model = make_llama()
    kept = {name: model.get_submodule(name).weight.clone() for name in dense}
    magnitude_prune_(model)
    for name, weight in kept.items():
        model.get_submodule(name).weight.copy_(weight)
    return model


def _train(model: nn.Module, parameters: list[nn.Parameter], keeper: ZeroKeeper | None, **options: float) -> None:
    anatomy = anatomy_of(model)
    windows = TextWindows(torch.randint(0, 211, (300,)), 12)

    def loss(tokens: Tensor, position: object) -> Tensor:
        return label_loss(anatomy, anatomy.hidden(tokens), tokens)

    settings = {"steps": 6, "batch_size": 3, "learning_rate": 1e-2, **options}
    Trainer(
        parameters,
        loss,
        windows,
        TrainingOptions(**settings),  # type: ignore[arg-type]
        after_update=None if keeper is None else keeper.apply_,
    ).train()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_full_training_keeps_every_zero_and_changes_the_rest(dtype: torch.dtype) -> None:
    dense = "model.layers.1.mlp.up_proj"
    model = _pruned((dense,)).to(dtype).requires_grad_(True)
    linears = anatomy_of(model).block_linears()
    before = {name: linear.weight.detach().clone() for name, linear in linears.items()}
    keeper = ZeroKeeper(linears)
    assert set(keeper.masks) == set(linears) - {dense} and len(keeper.masks) == LINEARS - 1
    _train(model, list(model.parameters()), keeper)
    for name, linear in linears.items():
        changed = linear.weight.detach() != before[name]
        if name == dense:
            assert float(changed.float().mean()) > 0.9
        else:
            assert not bool(linear.weight[~keeper.masks[name]].count_nonzero()), name
            assert float(changed[keeper.masks[name]].float().mean()) > 0.9, name
    assert masks_of(linears).keys() == keeper.masks.keys()


def test_the_optimizer_never_sees_a_masked_gradient() -> None:
    model = _pruned().requires_grad_(True)
    linears = anatomy_of(model).block_linears()
    keeper = ZeroKeeper(linears)
    tokens = torch.randint(0, 211, (2, 9))
    model(tokens, labels=tokens).loss.backward()
    name = "model.layers.0.mlp.gate_proj"
    gradient = linears[name].weight.grad
    assert gradient is not None and not bool(gradient[~keeper.masks[name]].count_nonzero())
    assert bool(gradient[keeper.masks[name]].count_nonzero())
    keeper.close()
    model.zero_grad()
    model(tokens, labels=tokens).loss.backward()
    assert bool(linears[name].weight.grad[~keeper.masks[name]].count_nonzero())


def test_without_a_keeper_the_zeros_are_lost() -> None:
    model = _pruned().requires_grad_(True)
    _train(model, list(model.parameters()), None)
    assert masks_of(anatomy_of(model).block_linears()) == {}


def test_spare_positions_may_learn() -> None:
    linear = nn.Linear(8, 1, bias=False)
    linear.weight.data.copy_(torch.tensor([[0.0, 0.0, 3.0, 0.0, 0.0, 0.0, 0.0, 0.0]]))
    mask = masks_of({"linear": linear})["linear"]
    assert mask.view(-1, 4).sum(1).tolist() == [2, 2] and bool(mask[0, 2])


def test_half_pruned_weights_are_refused() -> None:
    model = _pruned()
    weight = model.get_submodule("model.layers.2.self_attn.k_proj").weight
    weight[0, :4] = 1.0
    with pytest.raises(SparsityError, match=r"layers.2.self_attn.k_proj: 50% .* 1 of 1152 groups keep more than 2"):
        ZeroKeeper(anatomy_of(model).block_linears())


def _lora() -> object:
    pytest.importorskip("peft")
    from sparsert.compress import low_rank

    return low_rank


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lora_merges_under_the_masks_what_was_trained(dtype: torch.dtype) -> None:
    low_rank = _lora()
    dense = "model.layers.0.self_attn.q_proj"
    model = _pruned((dense,)).to(dtype)
    masks = masks_of(anatomy_of(model).block_linears())
    base = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    adapted = low_rank.add_lora(model, low_rank.LoraSettings(rank=4, alpha=8.0), seed=3)  # type: ignore[attr-defined]
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    assert len(trained) == 2 * LINEARS and all(parameter.dtype == torch.float32 for parameter in trained)
    tokens = torch.randint(0, 211, (2, 9))
    with torch.no_grad():
        untrained = adapted(tokens).logits
    _train(adapted.get_base_model(), trained, None)
    with torch.no_grad():
        before = adapted(tokens).logits
    merged = low_rank.merge_lora(adapted)  # type: ignore[attr-defined]
    with torch.no_grad():
        after = merged(tokens).logits
    assert not torch.allclose(untrained, before, atol=1e-2)
    tolerance = 1e-4 if dtype == torch.float32 else 0.15
    torch.testing.assert_close(after.float(), before.float(), rtol=0, atol=tolerance)
    linears = anatomy_of(merged).block_linears()
    assert all(type(linear) is nn.Linear for linear in linears.values())
    assert set(masks_of(linears)) == set(masks) and dense not in masks
    for name, parameter in merged.named_parameters():
        changed = name.removesuffix(".weight") in linears
        assert torch.equal(parameter, base[name]) is not changed, name


def test_lora_on_chosen_layers_with_dropout() -> None:
    low_rank = _lora()
    model = _pruned()
    settings = low_rank.LoraSettings(rank=2, dropout=0.5, targets=("q_proj", "down_proj"))  # type: ignore[attr-defined]
    adapted = low_rank.add_lora(model, settings)  # type: ignore[attr-defined]
    trained = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert len(trained) == 3 * 2 * 2 and all("q_proj" in name or "down_proj" in name for name in trained)
    layer = adapted.get_base_model().model.layers[0].mlp.down_proj
    layer.lora_B["default"].weight.data.normal_()
    x = torch.randn(5, 160)
    adapted.train()
    assert not torch.equal(layer(x), layer(x))
    adapted.eval()
    torch.testing.assert_close(layer(x), x @ (layer.base_layer.weight + layer.get_delta_weight("default")).T)


def test_lora_settings_and_targets_are_checked() -> None:
    low_rank = _lora()
    with pytest.raises(InputError, match="no linear layer of the blocks is called 'c_attn'; there are down_proj"):
        low_rank.add_lora(make_llama(), low_rank.LoraSettings(targets=("c_attn",)))  # type: ignore[attr-defined]
    for changes, message in (({"rank": 0}, "rank is 0"), ({"alpha": 0.0}, "alpha"), ({"dropout": 1.0}, "dropout")):
        with pytest.raises(InputError, match=message):
            low_rank.LoraSettings(**changes)  # type: ignore[attr-defined]


def test_a_broken_adapter_is_not_merged() -> None:
    low_rank = _lora()
    adapted = low_rank.add_lora(_pruned(), low_rank.LoraSettings())  # type: ignore[attr-defined]
    adapted.get_base_model().model.layers[1].mlp.up_proj.lora_B["default"].weight.data[0, 0] = float("inf")
    with pytest.raises(InputError, match=r"layers.1.mlp.up_proj: the adapter has values that are not finite"):
        low_rank.merge_lora(adapted)  # type: ignore[attr-defined]
