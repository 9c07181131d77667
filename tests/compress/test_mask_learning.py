"""Mask learning: logits, prior, the loss of a step, and that it finds masks that a prior does not have."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny_families import VARIANTS, make_model
from tiny_llama import make_llama, random_prompts
from torch import Tensor, nn
from torch.nn import functional

from sparsert.compress.anatomy import anatomy_of
from sparsert.compress.magnitude import magnitude_mask
from sparsert.compress.mask_learning import MaskLearner, MaskSettings, first_logits, recompute_blocks_
from sparsert.compress.text import TextWindows
from sparsert.compress.training import Position, Trainer, TrainingOptions
from sparsert.errors import InputError
from sparsert.ops import hard_mask, masked_weight

START = Position(0, 0, 0.0, 7)


def text(windows: int = 4, window: int = 20) -> Tensor:
    return torch.tensor(random_prompts([window] * windows))


def magnitude_masks(model: nn.Module) -> dict[str, Tensor]:
    return {name: magnitude_mask(linear.weight) for name, linear in anatomy_of(model).block_linears().items()}


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_first_logits_put_the_prior_ahead(device: str) -> None:
    weight = torch.randn(60, 80, device=device)
    prior = magnitude_mask(weight).cpu()  # as it comes from a file
    logits = first_logits("a", weight, MaskSettings(prior_strength=3), prior, seed=1)
    # noise of one deviation against a lead of three
    assert logits.device == weight.device
    assert float((hard_mask(logits, (60, 80)).cpu() == prior).float().mean()) > 0.95
    best, worst = logits.max(1).values - logits.median(1).values, logits.median(1).values - logits.min(1).values
    assert float(best.mean()) == pytest.approx(0.03, rel=0.3) and float(worst.mean()) == pytest.approx(0.03, rel=0.3)
    none = first_logits("a", weight, MaskSettings(), None, seed=1)
    assert float(none.std()) == pytest.approx(0.01, rel=0.05)
    assert not torch.equal(none, first_logits("b", weight, MaskSettings(), None, seed=1))
    assert torch.equal(none, first_logits("a", weight, MaskSettings(), None, seed=1))
    half = first_logits("a", weight, MaskSettings(logit_dtype="bfloat16"), None, seed=1)
    assert half.dtype == torch.bfloat16 and half.shape == (1200, 6)


def test_schedules() -> None:
    settings = MaskSettings()
    assert settings.controls_at(0.0) == (100.0, 4.0, 1e-5)
    assert settings.controls_at(1.0) == pytest.approx((500.0, 0.05, 0.0))


def test_modes_are_the_models_they_say() -> None:
    model, tokens = make_llama(), text()
    dense, masks = model(tokens).logits, magnitude_masks(model)
    pruned = copy.deepcopy(model)
    for name, mask in masks.items():
        pruned.get_submodule(name).weight.mul_(mask)
    # a prior so strong that noise does not matter
    learner = MaskLearner(anatomy_of(model), MaskSettings(prior_strength=100), prior=masks)
    with torch.no_grad():
        with learner.running("dense"):
            assert torch.equal(model(tokens).logits, dense)
        with learner.running("hard"):
            torch.testing.assert_close(model(tokens).logits, pruned(tokens).logits)
        learner(tokens, START)
        soft = model(tokens).logits
    assert not torch.allclose(soft, dense, atol=0.05)
    assert all(torch.equal(mask, masks[name]) for name, mask in learner.masks())
    learner.finish_()
    assert all(type(model.get_submodule(name)) is nn.Linear for name in masks)
    torch.testing.assert_close(model(tokens).logits, pruned(tokens).logits)


def loss_and_gradient(learner: MaskLearner, tokens: Tensor, position: Position = START) -> tuple[float, list[Tensor]]:
    loss = learner(tokens, position)
    return float(loss.detach()), list(torch.autograd.grad(loss, learner.parameters))


def test_the_loss_is_that_of_the_text_under_soft_masks() -> None:
    model, tokens = make_llama(), text()
    learner = MaskLearner(anatomy_of(model), MaskSettings(regularisation=0), prior=magnitude_masks(model))
    loss, gradients = loss_and_gradient(learner, tokens)
    logits = model(tokens).logits[:, :-1]  # the same noise still
    plain = functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    assert loss == pytest.approx(float(plain.detach()), rel=1e-5)
    for ours, expected in zip(gradients, torch.autograd.grad(plain, learner.parameters), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-6)
    assert all(bool(gradient.any()) for gradient in gradients)


def test_distillation_is_the_divergence_from_the_dense_model() -> None:
    model, tokens = make_llama(), text()
    dense = copy.deepcopy(model)
    settings = MaskSettings(regularisation=0, distillation=0.25)
    learner = MaskLearner(anatomy_of(model), settings, prior=magnitude_masks(model))
    loss, gradients = loss_and_gradient(learner, tokens)
    logits = model(tokens).logits[:, :-1].flatten(0, 1)
    teacher = dense(tokens).logits[:, :-1].flatten(0, 1).softmax(-1)
    divergence = (teacher * (teacher.log() - logits.log_softmax(-1))).sum(-1).mean()
    expected = 0.75 * functional.cross_entropy(logits, tokens[:, 1:].flatten()) + 0.25 * divergence
    assert loss == pytest.approx(float(expected.detach()), rel=1e-4)
    for ours, plain in zip(gradients, torch.autograd.grad(expected, learner.parameters), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-3, atol=1e-6)


def test_regularisation_rewards_large_weights_and_counts_once_an_update() -> None:
    model, tokens = make_llama(), text()
    learner = MaskLearner(anatomy_of(model), MaskSettings(regularisation=0.5), prior=magnitude_masks(model))
    _, gradients = loss_and_gradient(learner, tokens)
    _, halves = loss_and_gradient(learner, tokens, Position(0, 0, 0.0, 7, share=0.5))
    learner.settings = MaskSettings(regularisation=0)
    _, without = loss_and_gradient(learner, tokens)
    controls = learner._controls * torch.tensor([1.0, 1.0, 0.0])
    reward = torch.zeros(())
    for number, layer in enumerate(learner.layers.values()):
        masked = masked_weight(layer.weight, layer.logits, controls, learner._seeds[number : number + 1])
        reward = reward - 0.5 * masked.square().sum()
    of_reward = torch.autograd.grad(reward, learner.parameters)
    for full, half, plain, extra in zip(gradients, halves, without, of_reward, strict=True):
        torch.testing.assert_close(full - plain, extra, rtol=1e-2, atol=1e-4)
        torch.testing.assert_close(half - plain, extra / 2, rtol=1e-2, atol=1e-4)


def test_every_part_of_every_step_draws_its_own_masks() -> None:
    model, tokens = make_llama(), text()
    learner = MaskLearner(anatomy_of(model), MaskSettings())
    positions = [START, Position(1, 0, 0.0, 7), Position(0, 1, 0.0, 7), Position(0, 0, 0.0, 8)]
    losses = [float(learner(tokens, position).detach()) for position in positions]
    assert len(set(losses)) == 4
    assert float(learner(tokens, START).detach()) == losses[0]


def test_recomputation_changes_nothing() -> None:
    tokens = text()
    results = []
    for recompute in (False, True):
        model = make_llama()
        learner = MaskLearner(anatomy_of(model), MaskSettings(distillation=0.5), prior=magnitude_masks(model))
        if recompute:
            recompute_blocks_(learner.anatomy)
        results.append(loss_and_gradient(learner, tokens))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-6)
    for one, other in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)


def learn(model: nn.Module, windows: TextWindows, prior: dict[str, Tensor], state: str, **changes: Any) -> MaskLearner:
    learner = MaskLearner(anatomy_of(model), MaskSettings(**changes), prior=prior, seed=3)
    options = TrainingOptions(
        steps=60, batch_size=8, learning_rate=5e-3, epsilon=1e-5, optimizer_state=state, autocast=False
    )
    Trainer(learner.parameters, learner, windows, options).train()
    return learner


@pytest.mark.parametrize(
    ("state", "changes"),
    [
        ("float32", {}),
        ("float32", {"distillation": 1.0}),
        ("bfloat16", {"logit_dtype": "bfloat16"}),
        ("int8", {"logit_dtype": "bfloat16"}),
    ],
)
def test_learned_masks_beat_their_prior(state: str, changes: dict[str, Any]) -> None:
    """The model is its own source of text: it likes what it says, and magnitude masks spoil that."""
    model = make_llama(num_hidden_layers=2)
    prior = magnitude_masks(model)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, 211, (64, 1), generator=generator)
    with torch.no_grad():
        for _ in range(15):
            likely = (model(tokens).logits[:, -1] * 4).softmax(-1)
            tokens = torch.cat([tokens, torch.multinomial(likely, 1, generator=generator)], dim=1)
    windows = TextWindows(tokens.flatten().int(), 16)
    learner = learn(model, windows, prior, state, **changes)
    rows = torch.stack([windows[index] for index in range(64)])

    def likelihood() -> float:
        with torch.no_grad():
            logits = model(rows).logits[:, :-1]
        return float(functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()))

    with learner.running("dense"):
        dense = likelihood()
    with learner.running("hard"):
        learned = likelihood()
    assert learner.certainty() > 0.6
    learner.finish_()
    assert likelihood() == pytest.approx(learned, rel=1e-5)
    fresh = make_llama(num_hidden_layers=2)
    for name, mask in prior.items():
        fresh.get_submodule(name).weight.mul_(mask)
    with torch.no_grad():
        logits = fresh(rows).logits[:, :-1]
    magnitude = float(functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()))
    assert dense < magnitude
    # 16-bit logits and 8-bit moments among them: all reach the same
    assert learned - dense < 0.7 * (magnitude - dense), (dense, learned, magnitude)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_family_takes_a_step(variant: str) -> None:
    family, changes = VARIANTS[variant]
    model = make_model(family, **changes)
    learner = MaskLearner(anatomy_of(model), MaskSettings(distillation=0.5), prior=magnitude_masks(model))
    _, gradients = loss_and_gradient(learner, text())
    assert all(bool(gradient.isfinite().all()) and bool(gradient.any()) for gradient in gradients)


def test_what_is_refused() -> None:
    model = make_llama()
    masks = magnitude_masks(model)
    first = next(iter(masks))
    with pytest.raises(InputError, match=r"o_proj: the prior has no mask for it"):
        MaskLearner(
            anatomy_of(make_llama()), MaskSettings(), prior={n: m for n, m in masks.items() if "o_proj" not in n}
        )
    with pytest.raises(InputError, match=r"the prior's mask is \(144, 4\), the weight \(144, 96\)"):
        MaskLearner(anatomy_of(make_llama()), MaskSettings(), prior={**masks, first: masks[first][:, :4]})
    for changes, message in (
        ({"final_temperature": 0.0}, "final_temperature is 0.0; it must be above 0"),
        ({"distillation": 1.5}, "distillation is 1.5"),
        ({"regularisation": -1.0}, "regularisation is -1.0"),
        ({"logit_dtype": "int8"}, "logit_dtype is 'int8'"),
    ):
        with pytest.raises(InputError, match=message):
            MaskSettings(**changes)
