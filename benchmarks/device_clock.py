"""The clock of the pytest-benchmark files: device time from CUDA events, the wall clock on a CPU.

pytest-benchmark reads a clock before and after a function. Here the function runs a :class:`Replay`, which
times itself, and moves this clock on by the seconds of one of its calls. So the statistics are those of one
call, without launches, Python or waiting, and ``--benchmark-json`` has the same columns everywhere.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from pytest_benchmark.fixture import BenchmarkFixture

from sparsert.bench.records import machine_facts
from sparsert.bench.timing import Replay

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32

_ROUNDS = {"cuda": 15, "cpu": 5}

_spent = 0.0


def device_seconds() -> float:
    """Seconds of the calls measured so far; give it to ``pytest.mark.benchmark(timer=...)``."""
    return _spent


def measure(benchmark: BenchmarkFixture, replay: Replay, *, nbytes: int, **info: Any) -> None:
    """Benchmark a replay.

    Args:
        benchmark: pytest-benchmark's fixture, of a test with the timer :func:`device_seconds`.
        replay: what to run; it is run once when benchmarks are disabled.
        nbytes: bytes that one call has to move, for ``gb_per_s`` in ``extra_info``.
        info: further keys of ``extra_info``.
    """

    def run() -> None:
        global _spent
        _spent += replay.run() * 1e-6

    benchmark.pedantic(run, rounds=_ROUNDS[DEVICE.type], warmup_rounds=3)
    facts = _facts()
    benchmark.extra_info |= {"gpu": facts["gpu"], "commit": facts["commit"], "nbytes": nbytes, **info}
    if benchmark.stats is not None:  # None when benchmarks are disabled
        benchmark.extra_info["gb_per_s"] = nbytes / benchmark.stats.stats.median / 1e9


@functools.cache
def _facts() -> dict[str, Any]:
    return machine_facts(DEVICE)
