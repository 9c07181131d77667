"""One layer at a time: every contender is checked before it is timed, and none can take the others with it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from misbehaving_layers import die_at_once, misbehave
from torch import Tensor

from sparsert.bench import contenders, cusparselt, layers
from sparsert.bench.architectures import ARCHITECTURES
from sparsert.bench.contenders import CONTENDERS, Bound, Dense, Layer, random_24
from sparsert.bench.isolation import measure_layers
from sparsert.bench.layer_task import LayerTask, Row
from sparsert.bench.layers import measure_layer, relative_error
from sparsert.bench.shapes import linear_shapes
from sparsert.errors import InputError, SparsertError

CPU_TASK = LayerTask(48, 72, (1, 9), ("dense", "ours"), "cpu", "float32", repeats=3)


def by_contender(rows: list[Row]) -> dict[str, Row]:
    return {row["contender"]: row for row in rows}


def test_shapes_of_real_models() -> None:
    fused = {(s.out_features, s.in_features) for s in linear_shapes("llama-2-7b", "fused")}
    assert fused == {(12288, 4096), (4096, 4096), (22016, 4096), (4096, 11008)}
    separate = {s.layer: (s.out_features, s.in_features) for s in linear_shapes("smollm2-135m", "separate")}
    assert separate == {"q, o": (576, 576), "k, v": (192, 576), "gate, up": (1536, 576), "down": (576, 1536)}
    assert {s.layer for s in linear_shapes("llama-2-13b")} >= {"q, k, v, o", "qkv fused", "gate_up fused"}
    assert all(s.in_features % 4 == 0 for model in ARCHITECTURES for s in linear_shapes(model))
    with pytest.raises(InputError, match="shapes of 'gpt' are not known; known are llama-2-7b"):
        linear_shapes("gpt")
    with pytest.raises(InputError, match="choose one of all, fused, separate"):
        linear_shapes("tiny", "some")


def test_every_row_stands_beside_its_check() -> None:
    for batch, rows in zip((1, 9), measure_layer(CPU_TASK), strict=True):
        found = by_contender(rows)
        assert set(found) == {"dense", "ours"}
        for row in found.values():
            assert row["batch"] == batch and row["correct"] is True and row["reason"] is None
            assert row["error"] <= max(2 * row["dense_error"], 1e-6)
            assert row["time_us"]["p20"] <= row["time_us"]["median"] <= row["time_us"]["p80"]
        dense, ours = found["dense"], found["ours"]
        assert ours["speedup"] == dense["time_us"]["median"] / ours["time_us"]["median"] and dense["speedup"] is None
        assert dense["gb_per_s"] == pytest.approx(48 * 72 * 4 / dense["time_us"]["median"] / 1e3)
        assert ours["tflop_per_s"] == pytest.approx(2 * batch * 48 * 72 / ours["time_us"]["median"] / 1e6)


def test_what_cannot_run_says_why_and_the_rest_goes_on() -> None:
    task = LayerTask(32, 64, (1,), CONTENDERS, "cpu", "float32", repeats=3, excluded={"cusparselt": "left out"})
    found = by_contender(next(measure_layer(task)))
    assert found["ours"]["correct"] and found["dense"]["correct"]
    assert "runs on cuda" in found["ours-triton"]["reason"]
    assert "runs 2:4 weights on CUDA only" in found["torch-sparse"]["reason"]
    assert found["cusparselt"]["reason"] == "left out"
    assert "are for Hopper GPUs" in found["cutlass"]["reason"]
    for name in ("ours-triton", "torch-sparse", "cusparselt", "cutlass"):
        assert found[name]["time_us"] is None and found[name]["speedup"] is None and found[name]["correct"] is None


class _Wrong(Dense):
    """Right but for one output."""

    def bind(self, x: Tensor, is_correct: Callable[[Tensor], bool]) -> Bound:
        bound = super().bind(x, is_correct)

        def call(weight: Tensor) -> Tensor:
            y = bound.call(weight)
            y[0, 0] += 1
            return y

        return Bound("wrong", bound.weights, call)


class _Raising(Dense):
    def bind(self, x: Tensor, is_correct: Callable[[Tensor], bool]) -> Bound:
        raise RuntimeError("CUDA error: a first line\nand a second one")


class _NotMade(Dense):
    def __init__(self, layer: Layer) -> None:
        raise KeyError("no such thing")


def test_wrong_results_are_never_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    makers = {"dense": Dense, "torch-sparse": _Wrong, "cusparselt": _Raising, "ours": _NotMade}
    monkeypatch.setattr(layers, "MAKERS", makers)
    task = LayerTask(32, 64, (4,), tuple(makers), "cpu", "float32", repeats=3)
    told: list[str] = []
    found = by_contender(next(measure_layer(task, told.append)))
    wrong = found["torch-sparse"]
    assert wrong["correct"] is False and wrong["time_us"] is None and wrong["speedup"] is None
    assert "more than twice dense's" in wrong["reason"] and wrong["error"] > 0.01
    assert found["cusparselt"]["reason"] == "RuntimeError: CUDA error: a first line"
    assert found["ours"]["reason"] == "KeyError: 'no such thing'"
    assert found["dense"]["correct"] is True
    assert told == ["dense", *makers, "dense", "torch-sparse", "cusparselt", "timing"]


def test_out_of_memory_ends_the_layer_not_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(*arguments: Any) -> Layer:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8 GiB.")

    monkeypatch.setattr(layers.Layer, "random", no_room)
    batches = list(measure_layer(CPU_TASK))
    assert [row["batch"] for rows in batches for row in rows] == [1, 1, 9, 9]
    assert all("CUDA out of memory" in row["reason"] for rows in batches for row in rows)


def test_relative_error() -> None:
    exact = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
    assert relative_error(torch.tensor([[3.0, 4.0]]), exact) == 0
    assert relative_error(torch.tensor([[3.0, 4.5]]), exact) == pytest.approx(0.1)
    assert relative_error(torch.tensor([[3.0, float("nan")]]), exact) == float("inf")
    assert relative_error(torch.tensor([[3.0, float("inf")]]), exact) == float("inf")
    assert relative_error(torch.ones(1, 2), torch.zeros(1, 2, dtype=torch.float64)) == 1


def test_every_contender_can_be_made() -> None:
    assert contenders.MAKERS.keys() == set(CONTENDERS)


def test_random_weights_keep_two_of_four() -> None:
    weight = random_24(64, 128, torch.bfloat16, "cpu")
    kept = (weight != 0).view(-1, 4)
    assert bool((kept.sum(-1) == 2).all())
    assert len({tuple(group) for group in kept.tolist()}) == 6, "all six patterns"


class _Library:
    """Stands in for cuSPARSELt: algorithm 1 is wrong, 2 is fast but wrong at times, 3 is slow, 4 is right."""

    def __init__(self) -> None:
        self.calls = dict.fromkeys(range(cusparselt.ALGORITHMS), 0)

    def __call__(self, algorithm: cusparselt.Algorithm, compressed: Tensor, x_t: Tensor) -> Tensor:
        if algorithm.alg_id not in (1, 2, 3, 4) or algorithm.split_k != 1:
            raise RuntimeError("cuSPARSELt refuses")
        self.calls[algorithm.alg_id] += 1
        if algorithm.alg_id == 3:
            time.sleep(0.002)
        if algorithm.alg_id == 4:
            time.sleep(0.0005)
        y = compressed @ x_t
        wrong_at_times = algorithm.alg_id == 2 and self.calls[2] > 5
        return y + 1 if algorithm.alg_id == 1 or wrong_at_times else y


def test_search_takes_the_fastest_that_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    library = _Library()
    monkeypatch.setattr(cusparselt.Algorithm, "run", lambda self, w, x_t: library(self, w, x_t))
    weight, x_t = torch.randn(8, 16), torch.randn(16, 8)
    copies = [weight.clone() for _ in range(5)]
    found = cusparselt.search(copies, x_t, lambda y: torch.allclose(y, weight @ x_t), batch=3)
    assert found.best == cusparselt.Algorithm(4, 1, -1)
    assert found.tried == 4 and found.wrong == 2, "the one that is wrong, and the one that became so"
    assert found.refused == 3 * cusparselt.ALGORITHMS - 4
    assert str(found.best) == "cuSPARSELt algorithm 4"
    assert str(cusparselt.Algorithm(7, 2, 0)) == "cuSPARSELt algorithm 7, split 2"


def test_search_that_finds_nothing_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cusparselt.Algorithm, "run", lambda self, w, x_t: torch.full((8, 8), float("nan")))
    with pytest.raises(SparsertError, match=r"none of its algorithms correctly \(64 tried, 64 wrong\)"):
        cusparselt.search([torch.randn(8, 16)], torch.randn(16, 8), lambda y: bool(y.isfinite().all()), batch=256)


def test_a_crash_a_hang_and_an_error_cost_one_contender_each() -> None:
    names = ("dense", "ours", "torch-sparse", "cusparselt")
    tasks = [LayerTask(rows, 4, (1, 2, 3), names, "cpu", "float32") for rows in (1, 2, 3)]
    start = time.monotonic()
    results = list(measure_layers(tasks, isolated=True, measure=misbehave, silence_s=3))
    assert time.monotonic() - start < 60
    assert [(index, rows[0]["batch"]) for index, rows in results] == [(i, b) for i in range(3) for b in (1, 2, 3)]
    reasons = {(index, row["batch"], row["contender"]): row["reason"] for index, rows in results for row in rows}
    crash = "cusparselt ended the process that measured it: signal SIGSEGV"
    assert [reasons[0, batch, "cusparselt"] for batch in (1, 2, 3)] == [None, crash, crash]
    assert reasons[1, 1, "torch-sparse"] == "torch-sparse ended the process that measured it: no word for 3 s, ended"
    assert reasons[1, 1, "cusparselt"] is None and reasons[1, 2, "cusparselt"] == crash
    assert reasons[2, 1, "cusparselt"] == crash, "after two crashes it is not tried again"
    assert reasons[2, 3, "ours"] == "dense ended the process that measured it: ValueError: no baseline"
    assert reasons[2, 2, "ours"] is None and reasons[2, 1, "torch-sparse"] is None


def test_a_process_that_cannot_start_is_an_error() -> None:
    with pytest.raises(SparsertError, match=r"the process that measures does not start \(exit code 7\)"):
        list(measure_layers([CPU_TASK], isolated=True, measure=die_at_once))


@pytest.mark.skipif(torch.cuda.is_available(), reason="what a GPU measures is isolated anyway")
def test_isolated_and_in_place_measure_the_same_rows() -> None:
    isolated = list(measure_layers([CPU_TASK], isolated=True))
    in_place = list(measure_layers([CPU_TASK], isolated=False))
    for (_, ours), (_, theirs) in zip(isolated, in_place, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert set(a) == set(b) and a["contender"] == b["contender"]
            assert a["error"] == pytest.approx(b["error"], rel=0.2), "same seed, same data"


class _Waiting(Dense):
    """Waits for the GPU, which no capture allows, and which leaves torch in the middle of one."""

    def bind(self, x: Tensor, is_correct: Callable[[Tensor], bool]) -> Bound:
        bound = super().bind(x, is_correct)

        def call(weight: Tensor) -> Tensor:
            y = bound.call(weight)
            y.sum().item()
            return y

        return Bound("waiting", bound.weights, call)


def _with_a_waiting_peer(task: LayerTask, tell: Callable[[str], None]) -> Iterator[list[Row]]:
    layers.MAKERS = contenders.MAKERS | {"torch-sparse": _Waiting}
    yield from measure_layer(task, tell)


@pytest.mark.gpu
def test_a_peer_that_breaks_a_capture_costs_only_itself() -> None:
    task = LayerTask(256, 512, (1, 8), ("dense", "torch-sparse", "ours"), "cuda", "bfloat16", repeats=3)
    for _, rows in measure_layers([task], isolated=True, measure=_with_a_waiting_peer):
        found = by_contender(rows)
        assert found["dense"]["correct"] and found["ours"]["speedup"] > 0
        assert found["torch-sparse"]["time_us"] is None and "captur" in found["torch-sparse"]["reason"]
