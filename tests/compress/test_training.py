"""The training loop: what a step does, that a resumed run is the same run, and how it stops."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from sparsert.compress.parallel import Processes
from sparsert.compress.text import TextWindows
from sparsert.compress.training import Position, Trainer, TrainingOptions
from sparsert.errors import CheckpointError, InputError, TrainingError


class Bigrams(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.table = nn.Parameter(torch.randn(23, 23, generator=generator) * 0.1)
        self.positions: list[Position] = []

    def loss(self, tokens: Tensor, position: Position) -> Tensor:
        self.positions.append(position)
        noise = torch.randn(23, generator=torch.Generator().manual_seed(position.step * 1000 + position.part))
        logits = self.table[tokens[:, :-1]] + 0.01 * noise
        return functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def text() -> TextWindows:
    tokens = torch.randint(0, 23, (2000,), generator=torch.Generator().manual_seed(1))
    tokens[1::2] = (tokens[::2] * 3 + 1) % 23  # something to learn
    return TextWindows(tokens, 10)


def make(model: Bigrams, **changes: Any) -> Trainer:
    options: dict[str, Any] = {"steps": 12, "batch_size": 6, "learning_rate": 0.05, "warmup_steps": 2, **changes}
    return Trainer([model.table], model.loss, text(), TrainingOptions(**options))


def test_it_learns_and_reports() -> None:
    model, records = Bigrams(), []
    trainer = make(model, steps=30)
    trainer.train(callback=records.append)
    assert [record.step for record in records] == list(range(1, 31))
    assert records[-1].loss < records[0].loss - 0.2
    assert records[0].tokens == 60 and records[0].gradient_norm > 0 and records[0].seconds > 0
    assert records[0].learning_rate == pytest.approx(0.025)
    assert records[-1].learning_rate == pytest.approx(0.05 * 0.01)
    assert [position.step for position in model.positions] == list(range(30))
    assert model.positions[0].progress == 0 and model.positions[-1].progress == 1


def test_parts_of_a_batch_add_up_to_the_batch() -> None:
    whole, parts = Bigrams(), Bigrams()
    whole.loss = lambda tokens, position: Bigrams.loss(whole, tokens, Position(0, 0, 0.0, 0))  # type: ignore[method-assign]
    parts.loss = lambda tokens, position: Bigrams.loss(parts, tokens, Position(0, 0, 0.0, 0))  # type: ignore[method-assign]
    make(whole).train(until=3)
    make(parts, micro_batch=4).train(until=3)  # 4 windows and then 2
    torch.testing.assert_close(whole.table, parts.table, rtol=1e-4, atol=1e-6)


def test_every_part_has_a_number_of_its_own() -> None:
    model = Bigrams()
    make(model, micro_batch=2).train_step()
    assert [position.part for position in model.positions] == [0, 1, 2]


@pytest.mark.parametrize("optimizer_state", ["float32", "bfloat16"])
def test_a_resumed_run_is_the_same_run(optimizer_state: str) -> None:
    model = Bigrams()
    trainer = make(model, optimizer_state=optimizer_state)
    trainer.train(until=5)
    state = copy.deepcopy(trainer.state_dict())
    trainer.train()

    resumed = Bigrams()
    again = make(resumed, optimizer_state=optimizer_state)
    again.load_state_dict(state)
    assert again.step == 5
    again.train()
    assert again.step == 12
    assert torch.equal(resumed.table, model.table)


def test_schedules() -> None:
    cosine = TrainingOptions(steps=11, learning_rate=2.0, final_learning_rate=0.5)
    assert [cosine.learning_rate_at(step) for step in (0, 5, 10)] == pytest.approx([2.0, 1.5, 1.0])
    constant = TrainingOptions(steps=11, learning_rate=2.0, schedule="constant", warmup_steps=4)
    assert [constant.learning_rate_at(step) for step in (0, 3, 4, 10)] == pytest.approx([0.5, 2.0, 2.0, 2.0])
    assert TrainingOptions(steps=1, learning_rate=2.0).learning_rate_at(0) == 2.0


def test_gradients_are_clipped() -> None:
    model = Bigrams()
    before = model.table.detach().clone()
    options = TrainingOptions(steps=1, batch_size=6, learning_rate=0.1, clip_norm=1e-9, epsilon=1e-3, weight_decay=0.0)
    trainer = Trainer([model.table], model.loss, text(), options)
    record = trainer.train_step()
    assert record.gradient_norm > 1e-3
    # a gradient far below epsilon moves nothing
    assert float((model.table - before).detach().abs().max()) < 1e-6


def test_after_update_sees_the_new_weights() -> None:
    model = Bigrams()
    kept = torch.rand(23, 23) < 0.5

    def mask() -> None:
        with torch.no_grad():
            model.table.mul_(kept)

    Trainer([model.table], model.loss, text(), TrainingOptions(steps=2, batch_size=2), after_update=mask).train()
    assert not bool(model.table[~kept].any()) and bool(model.table[kept].all())


def test_a_loss_that_is_no_number_stops_before_the_update() -> None:
    model = Bigrams()
    before = model.table.detach().clone()

    def loss(tokens: Tensor, position: Position) -> Tensor:
        return model.loss(tokens, position) * (float("nan") if position.step == 1 else 1.0)

    trainer = Trainer([model.table], loss, text(), TrainingOptions(steps=5, batch_size=2))
    trainer.train_step()
    after_first = model.table.detach().clone()
    assert not torch.equal(before, after_first)
    with pytest.raises(TrainingError, match=r"step 2: the loss is nan .* the update was not made"):
        trainer.train()
    assert torch.equal(model.table, after_first)
    assert trainer.step == 1


def test_what_is_refused() -> None:
    model = Bigrams()
    for changes, message in (
        ({"steps": 0}, "steps is 0; it must be at least 1"),
        ({"micro_batch": 0}, "micro_batch is 0"),
        ({"learning_rate": 0.0}, r"learning_rate is 0\.0; it must be positive"),
        ({"clip_norm": -1.0}, r"clip_norm is -1\.0"),
        ({"beta2": 1.0}, r"beta2 is 1\.0"),
        ({"schedule": "step"}, "choose one of cosine, linear, constant"),
        ({"weight_decay": float("nan")}, "weight_decay is nan"),
    ):
        with pytest.raises(InputError, match=message):
            make(model, **changes)
    with pytest.raises(InputError, match="there is nothing to train"):
        Trainer([], model.loss, text(), TrainingOptions(steps=1))
    processes = Processes("cpu")
    processes.count = 4
    with pytest.raises(InputError, match="batch_size is 6, no multiple of the 4 processes"):
        Trainer([model.table], model.loss, text(), TrainingOptions(steps=1, batch_size=6), processes=processes)
    state = make(model).state_dict()
    other = Trainer([nn.Parameter(torch.zeros(3))], model.loss, text(), TrainingOptions(steps=1))
    with pytest.raises(CheckpointError, match="the training state holds 1 tensors"):
        other.load_state_dict(state)
