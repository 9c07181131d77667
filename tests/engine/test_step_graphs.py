"""Steps as CUDA graphs: kept by key, state put back after the warm-up, the longest unused let go of."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparsert.engine import graphs
from sparsert.engine.graphs import StepGraphs

pytestmark = pytest.mark.gpu


def test_state_changes_once_a_run() -> None:
    state = torch.zeros(3, device="cuda")
    steps = StepGraphs([state])

    def step() -> Tensor:
        return state.add_(1) * 2

    for run in range(1, 4):
        assert steps.run("double", step).tolist() == [2 * run] * 3
        assert state.tolist() == [run] * 3
    assert len(steps) == 1 and steps.capture_s > 0


def test_the_longest_unused_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "_MOST_GRAPHS", 2)
    calls: list[str] = []
    state = torch.ones(1, device="cuda")
    steps = StepGraphs([])

    def run(key: str) -> None:
        def step() -> Tensor:
            calls.append(key)
            return state + ord(key)

        assert float(steps.run(key, step)) == 1 + ord(key)

    for key in "abacab":
        run(key)
    captured = [key for key, previous in zip(calls, [None, *calls], strict=False) if key != previous]
    assert captured == ["a", "b", "c", "b"] and len(steps) == 2
    before = steps.capture_s
    steps.clear()
    assert len(steps) == 0 and steps.capture_s == before
