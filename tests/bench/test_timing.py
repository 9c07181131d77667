"""Timing: who runs how often and in which order, and that captures clean up after themselves."""

from __future__ import annotations

import pytest
import torch

from sparsert.bench.timing import (
    ROTATE_BYTES,
    Replay,
    copies_for,
    dense_rate,
    measure_roofs,
    read_bandwidth,
    spread,
    time_calls,
    time_in_turn,
)


def test_enough_copies_to_leave_the_cache() -> None:
    for weight_bytes in (10**3, 10**6, 18_874_368, 33_554_432, 10**9):
        copies = copies_for(weight_bytes)
        assert copies >= 3
        assert copies == 512 or copies * weight_bytes >= ROTATE_BYTES
    assert copies_for(1) == 512, "bounded for tiny layers"
    assert copies_for(10, "cpu") == 3


def test_spread_of_few_and_many() -> None:
    assert spread([7.0]) == {"p20": 7.0, "median": 7.0, "p80": 7.0}
    assert spread([float(i) for i in range(100, 0, -1)]) == {"p20": 21.0, "median": 51.0, "p80": 81.0}


def test_contenders_run_in_turn() -> None:
    order: list[str] = []
    replays = {name: Replay(lambda name=name: order.append(name), 1, "cpu") for name in ("a", "b")}
    order.clear()
    times = time_in_turn(replays, repeats=3)
    assert order[-6:] == ["a", "b"] * 3
    assert set(times) == {"a", "b"} and all(time["p20"] <= time["median"] <= time["p80"] for time in times.values())


def test_time_is_of_one_call() -> None:
    import time

    measured = time_calls(lambda: time.sleep(0.01), 5, device="cpu", repeats=3)
    assert 1900 < measured["median"] < 10_000, "10 ms over 5 calls, in microseconds"


def test_errors_come_through() -> None:
    def fail() -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        time_calls(fail, 1, device="cpu")


def test_roofs_on_a_cpu() -> None:
    roofs = measure_roofs("cpu", torch.float32)
    assert set(roofs) == {"read_bytes_per_s", "dense_flop_per_s"}
    assert 1e8 < (roofs["read_bytes_per_s"] or 0) < 1e13
    assert 1e8 < (roofs["dense_flop_per_s"] or 0) < 1e15


@pytest.mark.gpu
def test_a_graph_runs_what_was_captured() -> None:
    count = torch.zeros(1, device="cuda")
    replay = Replay(lambda: [count.add_(1) for _ in range(4)], 4, "cuda")
    torch.cuda.synchronize()
    before = float(count)
    microseconds = replay.run()
    torch.cuda.synchronize()
    assert float(count) == before + 4
    assert 0 < microseconds < 1e4


@pytest.mark.gpu
def test_a_failed_capture_leaves_the_device_usable() -> None:
    x = torch.ones(8, device="cuda")
    calls = []

    def fails_when_captured() -> None:
        calls.append(1)
        x.add_(1)
        if len(calls) > 1:
            raise RuntimeError("cannot be captured")

    with pytest.raises(RuntimeError, match="cannot be captured"):
        Replay(fails_when_captured, 1, "cuda")
    assert time_calls(lambda: x.mul(2), 1, repeats=3)["median"] > 0


@pytest.mark.gpu
def test_what_cannot_be_captured_is_timed_as_it_is() -> None:
    x = torch.ones(1024, device="cuda")
    assert Replay(lambda: x.sum().item(), 1, "cuda", graph=False).run() > 0


@pytest.mark.gpu
def test_roofs_of_a_gpu_are_plausible() -> None:
    pytest.importorskip("triton")
    first, second = read_bandwidth(), read_bandwidth()
    assert first is not None and second is not None
    # wide, since other tests may run on this GPU at the same time
    assert 1e11 < first < 2e13 and 1e11 < second < 2e13
    assert dense_rate() > 1e13
