"""Distillation losses against float64, their gradients, and that a student learns."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as functional
from tiny_families import make_model
from tiny_llama import make_llama
from torch import Tensor

from sparsert.compress.anatomy import anatomy_of
from sparsert.compress.distillation import Distillation, DistillationSettings, pair_blocks, state_loss
from sparsert.compress.text import TextWindows
from sparsert.compress.training import Trainer, TrainingOptions
from sparsert.errors import InputError

VOCABULARY = 211


def _tokens(rows: int = 3, length: int = 11) -> Tensor:
    return torch.randint(0, VOCABULARY, (rows, length))


def _reference_kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """``T^2 sum p (log p - log q)``, written out, float64."""
    p = (teacher.double() / temperature).exp()
    p = p / p.sum(-1, keepdim=True)
    q = (student.double() / temperature).exp()
    q = q / q.sum(-1, keepdim=True)
    return temperature**2 * (p * (p.log() - q.log())).sum(-1).mean()


@pytest.mark.parametrize("temperature", [0.7, 1.0, 3.0])
@pytest.mark.parametrize("rows_at_once", [1, 4, 10_000])
def test_logit_loss_is_the_forward_divergence(temperature: float, rows_at_once: int) -> None:
    student, teacher = make_llama(seed=1).double(), make_llama(seed=2, num_hidden_layers=4).double()
    student.requires_grad_(True)
    tokens = _tokens()
    ours, theirs = anatomy_of(student), anatomy_of(teacher)
    expected = _reference_kl(student(tokens).logits, teacher(tokens).logits, temperature)
    gradients = torch.autograd.grad(expected, list(student.parameters()))
    settings = DistillationSettings(temperature=temperature)
    loss = Distillation(ours, theirs, settings, logit_bytes=8 * VOCABULARY * rows_at_once)(tokens)
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    loss.backward()
    for parameter, gradient in zip(student.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-7)


def test_soft_caps_of_both_models_are_minded() -> None:
    student, teacher = (make_model("Gemma2", seed=seed, final_logit_softcapping=1.5) for seed in (1, 2))
    tokens = _tokens()
    ours, theirs = anatomy_of(student), anatomy_of(teacher)
    loss = Distillation(ours, theirs, DistillationSettings())(tokens)
    expected = _reference_kl(student(tokens).logits, teacher(tokens).logits, 1.0)
    assert float(loss) == pytest.approx(float(expected), rel=1e-4)


def test_a_model_differs_from_itself_by_nothing() -> None:
    model = make_llama()
    settings = DistillationSettings(state_pairs=((0, 0), (2, 2)), embedding=True, state_weight=1.0)
    loss = Distillation(anatomy_of(model), anatomy_of(model), settings)(_tokens())
    assert float(loss) == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize("kind", ["cosine", "mse"])
def test_states_and_embedding_are_compared_behind_one_projection(kind: str) -> None:
    student = make_llama(seed=1, hidden_size=48, num_hidden_layers=2).double().requires_grad_(True)
    teacher = make_llama(seed=2).double()
    settings = DistillationSettings(
        label_weight=0.5,
        logit_weight=2.0,
        state_pairs=((0, 1), (1, 2)),
        embedding=True,
        state_loss=kind,
        state_weight=0.3,
    )
    distillation = Distillation(anatomy_of(student), anatomy_of(teacher), settings, seed=5)
    projection = distillation.projection
    assert projection is not None and projection.shape == (96, 48)
    torch.testing.assert_close(projection.detach().T @ projection.detach(), torch.eye(48), rtol=0, atol=1e-5)
    tokens = _tokens()
    loss = distillation(tokens)
    ours: list[Tensor] = []
    theirs: list[Tensor] = []
    for model, found, blocks in ((student, ours, (0, 1)), (teacher, theirs, (1, 2))):
        handles = [
            model.model.layers[block].register_forward_hook(lambda m, a, o, f=found: f.append(o)) for block in blocks
        ]
        model(tokens)
        found.append(model.model.embed_tokens(tokens))
        for handle in handles:
            handle.remove()
    pairs = [(functional.linear(a.double(), projection.double()), b) for a, b in zip(ours, theirs, strict=True)]
    if kind == "cosine":
        states = [1 - ((a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))).mean() for a, b in pairs]
    else:
        states = [((a - b) ** 2).mean() for a, b in pairs]
    label = student(tokens, labels=tokens).loss
    logit = _reference_kl(student(tokens).logits, teacher(tokens).logits, 1.0)
    expected = 0.5 * label + 2.0 * logit + 0.3 * torch.stack(states).mean()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-4)
    parts = distillation.parts()
    assert parts["label_loss"] == pytest.approx(float(label.detach()), rel=1e-5)
    assert parts["state_loss"] == pytest.approx(float(torch.stack(states).mean().detach()), rel=1e-4)
    loss.backward()
    expected_gradient = torch.autograd.grad(expected, [projection, student.model.embed_tokens.weight])
    torch.testing.assert_close(projection.grad, expected_gradient[0], rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(student.model.embed_tokens.weight.grad, expected_gradient[1], rtol=1e-3, atol=1e-6)


def test_the_ratio_makes_states_as_large_as_logits_and_has_no_gradient() -> None:
    student, teacher = make_llama(seed=1).requires_grad_(True), make_llama(seed=2)
    settings = DistillationSettings(state_pairs=((1, 1),))
    distillation = Distillation(anatomy_of(student), anatomy_of(teacher), settings)
    tokens = _tokens()
    loss = distillation(tokens)
    parts = distillation.parts()
    assert float(loss.detach()) == pytest.approx(2 * parts["logit_loss"], rel=1e-5)
    loss.backward()
    combined = student.model.embed_tokens.weight.grad.clone()
    student.zero_grad()
    fixed = DistillationSettings(state_pairs=((1, 1),), state_weight=parts["logit_loss"] / parts["state_loss"])
    Distillation(anatomy_of(student), anatomy_of(teacher), fixed)(tokens).backward()
    torch.testing.assert_close(student.model.embed_tokens.weight.grad, combined, rtol=1e-4, atol=1e-8)


def test_the_teacher_is_left_alone_and_a_student_learns() -> None:
    teacher = make_llama(seed=2)
    student = make_llama(seed=1).requires_grad_(True)
    before = [parameter.clone() for parameter in teacher.parameters()]
    distillation = Distillation(anatomy_of(student), anatomy_of(teacher), DistillationSettings())
    windows = TextWindows(torch.randint(0, VOCABULARY, (400,)), 16)
    losses = []
    trainer = Trainer(
        student.parameters(),
        distillation,
        windows,
        TrainingOptions(steps=25, batch_size=4, learning_rate=5e-3, weight_decay=0),
    )
    trainer.train(callback=lambda record: losses.append(record.loss))
    assert losses[-1] < 0.5 * losses[0]
    assert all(torch.equal(a, b) for a, b in zip(before, teacher.parameters(), strict=True))
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_no_teacher_runs_where_only_labels_count() -> None:
    student, teacher = make_llama(seed=1), make_llama(seed=2)
    teacher.model.norm.weight.fill_(math.nan)
    settings = DistillationSettings(logit_weight=0.0, label_weight=1.0)
    tokens = _tokens()
    loss = Distillation(anatomy_of(student), anatomy_of(teacher), settings)(tokens)
    assert float(loss) == pytest.approx(float(student(tokens, labels=tokens).loss), rel=1e-5)


def test_pairs_follow_the_plan() -> None:
    # 30 blocks without 24-27: the student's block 23 answers for teacher's 23-27
    kept = [*range(24), 28, 29]
    assert pair_blocks(26, 30, kept, [23, 25]) == ((23, 27), (25, 29))
    assert pair_blocks(26, 30, kept) == ((13, 13), (24, 28))
    assert pair_blocks(3, 3, None, [0, 1, 2]) == ((0, 0), (1, 1), (2, 2))
    assert pair_blocks(2, 6, None) == ((0, 2), (1, 5))
    with pytest.raises(InputError, match="no block 7; its blocks are 0-5"):
        pair_blocks(6, 8, None, [7])
    with pytest.raises(InputError, match="keeps 3 blocks and the student has 4"):
        pair_blocks(4, 8, [0, 1, 2])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"logit_weight": -1.0}, "logit_weight is -1.0"),
        ({"logit_weight": 0.0}, "nothing to learn"),
        ({"logit_weight": 0.0, "label_weight": 1.0, "embedding": True}, "give state_weight a number"),
        ({"state_loss": "l1"}, "state_loss 'l1' is not known; choose one of cosine, mse"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        DistillationSettings(**settings)


def test_models_that_do_not_fit() -> None:
    student, teacher = anatomy_of(make_llama()), anatomy_of(make_llama(vocab_size=300))
    with pytest.raises(InputError, match="vocabulary has 211 entries, the teacher's 300"):
        Distillation(student, teacher, DistillationSettings())
    with pytest.raises(InputError, match="the teacher has no block 3"):
        Distillation(student, student, DistillationSettings(state_pairs=((0, 3),)))


def test_state_loss_of_known_angles() -> None:
    states = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]])
    wanted = torch.tensor([[[2.0, 0.0], [3.0, 0.0]]])
    assert float(state_loss(states, wanted)) == pytest.approx(0.5)
    assert float(state_loss(states, wanted, "mse")) == pytest.approx((1 + 9 + 4) / 4)
