"""Packing a dense 2:4 weight and unpacking it again, which loading a model does once for every layer."""

from __future__ import annotations

import pytest
import torch
from device_clock import DEVICE, DTYPE, device_seconds, measure
from pytest_benchmark.fixture import BenchmarkFixture

from sparsert import ops
from sparsert.bench.contenders import random_24
from sparsert.bench.timing import Replay, copies_for

SHAPES = ((4096, 4096), (28672, 4096)) if DEVICE.type == "cuda" else ((64, 96), (128, 64))


@pytest.fixture(scope="module", params=SHAPES, ids=lambda shape: f"{shape[0]}x{shape[1]}")
def weight(request: pytest.FixtureRequest) -> torch.Tensor:
    torch.manual_seed(0)
    return random_24(*request.param, DTYPE, DEVICE)


@pytest.mark.benchmark(group="pack24", timer=device_seconds)
@pytest.mark.parametrize("direction", ["pack", "unpack"])
def test_pack24(benchmark: BenchmarkFixture, weight: torch.Tensor, direction: str) -> None:
    packed = ops.pack(weight)
    assert torch.equal(ops.unpack(packed), weight)
    copies = [weight.clone() for _ in range(copies_for(weight.nbytes, DEVICE))]

    def pack_all() -> None:
        for copy in copies:
            ops.pack(copy)

    def unpack_all() -> None:
        for _ in copies:
            ops.unpack(packed)

    # packing waits for the device, to read how many groups broke the rule, so it cannot be captured
    replay = Replay(pack_all if direction == "pack" else unpack_all, len(copies), DEVICE, graph=direction == "unpack")
    measure(benchmark, replay, nbytes=weight.nbytes + packed.nbytes)
