"""One-shot masks of whole models: what each block sees, what stays dense, and all families."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_families import VARIANTS, make_model
from tiny_llama import BLOCK_LINEARS, make_llama, random_prompts
from torch import Tensor, nn

from sparsert.compress.anatomy import anatomy_of
from sparsert.compress.magnitude import magnitude_mask
from sparsert.compress.oneshot import OneShotSettings, maskable_linears, prune_blocks_
from sparsert.compress.sparsegpt import Hessian, sparsegpt
from sparsert.compress.wanda import InputNorms, wanda_mask
from sparsert.errors import InputError


def text(windows: int = 5, window: int = 24) -> Tensor:
    return torch.tensor(random_prompts([window] * windows))


def inputs_of(model: nn.Module, names: list[str], tokens: Tensor) -> dict[str, list[Tensor]]:
    """What goes into layers when the whole model runs."""
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(lambda m, a, name=name: found[name].append(a[0].detach()))
        for name in names
    ]
    with torch.no_grad():
        model(input_ids=tokens, use_cache=False)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "sparsegpt with update"])
def test_each_block_sees_what_the_pruned_ones_hand_on(method: str) -> None:
    model, tokens = make_llama(), text(windows=24)  # more tokens than any layer has inputs
    pruned = copy.deepcopy(model)
    settings = OneShotSettings(method.split()[0], update_weights="update" in method)
    masks = dict(prune_blocks_(anatomy_of(pruned), settings, tokens, batch_size=2))
    assert masks.keys() == maskable_linears(anatomy_of(model)).keys()
    for index in range(3):  # the same with whole forwards of the model, which is pruned a block at a time
        names = [name for name in masks if f"layers.{index}." in name]
        seen = inputs_of(model, names, tokens)
        for name in names:
            linear = model.get_submodule(name)
            statistics = (InputNorms if method == "wanda" else Hessian)(linear.in_features, tokens.device)
            statistics.add(seen[name][0])
            if method == "wanda":
                mask, updated = wanda_mask(linear.weight, statistics), linear.weight
            else:
                mask, updated = sparsegpt(linear.weight, statistics)
            assert float((mask == masks[name]).float().mean()) > 0.998, name
            linear.weight.copy_((updated if settings.update_weights else linear.weight) * masks[name])
    for name in masks:
        ours, expected = pruned.get_submodule(name).weight, model.get_submodule(name).weight
        assert float((ours - expected).norm() / expected.norm()) < 0.03, name
        assert not bool(ours[~masks[name]].any())


def test_magnitude_needs_no_text() -> None:
    model = make_llama()
    before = {name: linear.weight.clone() for name, linear in anatomy_of(model).block_linears().items()}
    masks = dict(prune_blocks_(anatomy_of(model), OneShotSettings("magnitude")))
    for name, weight in before.items():
        assert torch.equal(masks[name], magnitude_mask(weight))
        assert torch.equal(model.get_submodule(name).weight, weight * masks[name])


def test_kept_dense_layers_stay_as_they_are() -> None:
    model = make_llama()
    before = copy.deepcopy(model.state_dict())
    patterns = ["*.layers.2.*", "*.o_proj"]
    masks = dict(prune_blocks_(anatomy_of(model), OneShotSettings("wanda"), text(), keep_dense=patterns))
    assert len(masks) == 2 * (len(BLOCK_LINEARS) - 1)
    for name, tensor in model.state_dict().items():
        masked = name.removesuffix(".weight") in masks
        assert torch.equal(tensor, before[name]) != masked, name
    # a block whose layers all stay dense still hands the text on
    masks = dict(prune_blocks_(anatomy_of(make_llama()), OneShotSettings("wanda"), text(), keep_dense=["*.layers.1.*"]))
    assert any(".layers.2." in name for name in masks)


def test_given_masks_are_fitted() -> None:
    model, tokens = make_llama(), text(windows=20)
    fitted = copy.deepcopy(model)
    masks = {name: mask.clone() for name, mask in prune_blocks_(anatomy_of(model), OneShotSettings("magnitude"))}
    settings = OneShotSettings("sparsegpt", update_weights=True)
    made = dict(prune_blocks_(anatomy_of(fitted), settings, tokens, masks=masks))
    dense = make_llama()
    with torch.no_grad():
        errors = [float((m(tokens).logits - dense(tokens).logits).square().mean()) for m in (fitted, model)]
    assert errors[0] < errors[1]
    for name, mask in made.items():
        assert torch.equal(mask, masks[name])
        assert not bool(fitted.get_submodule(name).weight[~mask].any())


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_family(variant: str) -> None:
    family, changes = VARIANTS[variant]
    model = make_model(family, **changes)
    tokens = text(windows=3, window=40)  # longer than the sliding windows of these models
    whole = copy.deepcopy(model)
    anatomy = anatomy_of(model)
    masks = dict(prune_blocks_(anatomy, OneShotSettings("wanda"), tokens, batch_size=2))
    assert masks.keys() == anatomy.block_linears().keys()
    # the last block's inputs tell whether rotation and masks of every block in front of it were right
    last = f"layers.{anatomy.num_blocks - 1}."
    names = [name for name in masks if last in name]
    for name, mask in masks.items():
        if last not in name:
            whole.get_submodule(name).weight.mul_(mask)
    for name, seen in inputs_of(whole, names, tokens).items():
        norms = InputNorms(seen[0].shape[-1], tokens.device)
        norms.add(seen[0])
        expected = wanda_mask(whole.get_submodule(name).weight, norms)
        assert float((expected == masks[name]).float().mean()) > 0.998, name


def test_what_is_refused() -> None:
    anatomy = anatomy_of(make_llama())
    with pytest.raises(InputError, match="wanda needs a calibration text"):
        list(prune_blocks_(anatomy, OneShotSettings("wanda")))
    with pytest.raises(InputError, match=r"keep_dense '\*\.w1' matches no linear layer"):
        maskable_linears(anatomy, ["*.w1"])
    with pytest.raises(InputError, match="no linear layer is left to mask"):
        maskable_linears(anatomy, ["*"])
    with pytest.raises(InputError, match="method is 'random'"):
        OneShotSettings("random")
    with pytest.raises(InputError, match="magnitude changes no weights"):
        OneShotSettings("magnitude", update_weights=True)
    with pytest.raises(InputError, match="damping is 0"):
        OneShotSettings(damping=0)
