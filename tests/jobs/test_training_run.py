"""Runs on disk: killed at any point they go on to the same result; other runs, full disks and damage are told apart."""

from __future__ import annotations

import errno
import json
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from sparsert.compress.text import TextWindows
from sparsert.compress.training import Position, Trainer, TrainingOptions
from sparsert.errors import CheckpointError, InputError
from sparsert.jobs import training_run
from sparsert.jobs.training_run import TrainingRun, read_log

IDENTITY = {"options": {"steps": 9, "schedule": "linear", "save_every": 2}, "weights": "abc"}


class Killed(BaseException):
    """Stands for the end of the process: nothing may catch it."""


def make(kill_at: int | None = None) -> tuple[nn.Parameter, Trainer]:
    table = nn.Parameter(torch.zeros(11, 11))

    def loss(tokens: Tensor, position: Position) -> Tensor:
        if position.step == kill_at:
            raise Killed
        return functional.cross_entropy(table[tokens[:, :-1]].flatten(0, 1), tokens[:, 1:].flatten())

    windows = TextWindows(torch.randint(0, 11, (300,), generator=torch.Generator().manual_seed(2)), 6)
    return table, Trainer([table], loss, windows, TrainingOptions(steps=9, batch_size=4, learning_rate=0.1))


def train(output: Path, kill_at: int | None = None, *, resume: bool = False, identity: Any = IDENTITY) -> Tensor:
    table, trainer = make(kill_at)
    with TrainingRun(output, identity, resume=resume) as run:
        run.train(trainer, description="test", save_every=2, step_values=lambda: {"extra": 1.5})
    return table.detach()


def test_a_killed_run_goes_on_to_the_same_result(tmp_path: Path) -> None:
    expected = train(tmp_path / "whole")
    for kill_at in (1, 2, 5, 8):
        output = tmp_path / f"killed{kill_at}"
        with pytest.raises(Killed):
            train(output, kill_at)
        assert torch.equal(train(output, resume=True), expected)
        log = read_log(tmp_path / f"killed{kill_at}.training")
        assert [line["step"] for line in log] == list(range(1, 10))
        whole = read_log(tmp_path / "whole.training")
        assert [line["loss"] for line in log] == [line["loss"] for line in whole]
        assert whole[0]["extra"] == 1.5


def test_resume_with_nothing_there_begins_and_finish_keeps_the_log(tmp_path: Path) -> None:
    train(tmp_path / "new", resume=True)
    with TrainingRun(tmp_path / "new", IDENTITY, resume=True) as run:
        assert run.state_file.is_file()
        run.finish()
        assert not run.state_file.exists() and run.log_file.is_file()
    assert sorted(path.name for path in (tmp_path / "new.training").iterdir()) == [".lock", "log.jsonl", "run.json"]


def test_another_run_is_refused_and_names_what_differs(tmp_path: Path) -> None:
    train(tmp_path / "out")
    with pytest.raises(InputError, match="holds a run that has not ended; go on with --resume"):
        train(tmp_path / "out")
    other = {"options": {"steps": 10, "schedule": "linear", "save_every": 7}, "weights": "abd"}
    with pytest.raises(InputError, match=r"differs in options\.steps, weights; give it the same"):
        train(tmp_path / "out", resume=True, identity=other)
    same = {"options": {"steps": 9, "schedule": "linear", "save_every": 7, "output": "elsewhere"}, "weights": "abc"}
    train(tmp_path / "out", resume=True, identity=same)


def test_two_processes_do_not_share_a_directory(tmp_path: Path) -> None:
    with (
        TrainingRun(tmp_path / "out", IDENTITY, resume=False),
        pytest.raises(InputError, match="another process is at work"),
        TrainingRun(tmp_path / "out", IDENTITY, resume=True),
    ):
        pass


def test_a_full_disk_leaves_the_last_state_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = train(tmp_path / "whole")
    real, calls = torch.save, []

    def save(state: Any, file: Path) -> None:
        calls.append(state["step"])
        if len(calls) == 3:
            file.write_bytes(b"half a state")
            raise OSError(errno.ENOSPC, "No space left on device")
        real(state, file)

    monkeypatch.setattr(training_run.torch, "save", save)
    with pytest.raises(CheckpointError, match=r"No space left on device.*go on with --resume"):
        train(tmp_path / "full")
    assert calls == [2, 4, 6]
    assert torch.load(tmp_path / "full.training" / "state.pt")["step"] == 4
    assert not list((tmp_path / "full.training").glob("*.partial"))
    assert torch.equal(train(tmp_path / "full", resume=True), expected)


@pytest.mark.parametrize("share", [0.02, 0.5, 0.99])
def test_a_state_that_the_disk_cuts_off(tmp_path: Path, share: float) -> None:
    """By a real limit, since torch's writer reports it in words that depend on where it was cut off."""
    expected = train(tmp_path / "whole")
    _, trainer = make()
    torch.save(trainer.state_dict(), tmp_path / "state.pt")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(share * (tmp_path / "state.pt").stat().st_size), limits[1]))
    try:
        with pytest.raises(CheckpointError, match=r"full\.training: cannot be written .*go on with --resume"):
            train(tmp_path / "full")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list((tmp_path / "full.training").glob("*.partial"))
    assert torch.equal(train(tmp_path / "full", resume=True), expected)


def test_a_damaged_state_is_an_error(tmp_path: Path) -> None:
    train(tmp_path / "out")
    state = tmp_path / "out.training" / "state.pt"
    whole = state.read_bytes()
    for damage in (whole[: len(whole) // 2], b"nonsense", b""):
        state.write_bytes(damage)
        with pytest.raises(CheckpointError, match=r"state\.pt"):
            train(tmp_path / "out", resume=True)


def test_other_runtime_errors_pass_through(tmp_path: Path) -> None:
    _, trainer = make()

    def fail() -> dict[str, float]:
        raise RuntimeError("a bug")

    with TrainingRun(tmp_path / "out", IDENTITY, resume=False) as run, pytest.raises(RuntimeError, match="a bug"):
        run.train(trainer, description="test", save_every=0, step_values=fail)


def test_evaluations_stand_in_the_log(tmp_path: Path) -> None:
    _, trainer = make()
    with TrainingRun(tmp_path / "out", IDENTITY, resume=False) as run:
        run.train(trainer, description="t", save_every=0, evaluate=lambda: {"perplexity": 3.0}, evaluate_every=4)
    steps = [line["step"] for line in read_log(tmp_path / "out.training") if "perplexity" in line]
    assert steps == [4, 8, 9]
    assert json.loads((tmp_path / "out.training" / "run.json").read_text()) == IDENTITY
