"""The 2:4 linear and its dense counterpart on the layers that the engine runs, checked, then timed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from device_clock import DEVICE, DTYPE, device_seconds, measure
from pytest_benchmark.fixture import BenchmarkFixture

from sparsert.bench.contenders import MAKERS, Layer
from sparsert.bench.layers import LEAST_TOLERANCE, relative_error
from sparsert.bench.shapes import LinearShape, linear_shapes
from sparsert.bench.timing import Replay

ON_GPU = DEVICE.type == "cuda"
SHAPES = linear_shapes("llama-3.1-8b" if ON_GPU else "tiny", "fused")
BATCHES = (1, 16, 64, 1024) if ON_GPU else (1, 9)


@pytest.fixture(scope="module", params=SHAPES, ids=lambda shape: f"{shape.out_features}x{shape.in_features}")
def layer(request: pytest.FixtureRequest) -> Layer:
    shape: LinearShape = request.param
    torch.manual_seed(0)
    return Layer.random(shape.out_features, shape.in_features, DTYPE, DEVICE)


@pytest.mark.benchmark(group="linear24", timer=device_seconds)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("contender", ["dense", "ours"])
def test_linear24(benchmark: BenchmarkFixture, layer: Layer, contender: str, batch: int) -> None:
    x = torch.randn(batch, layer.weight.shape[1], device=DEVICE).to(DTYPE)
    reference = torch.nn.functional.linear(x.double(), layer.weight.double())
    dense_error = relative_error(torch.nn.functional.linear(x, layer.weight), reference)
    made = MAKERS[contender](layer)
    bound = made.bind(x, lambda y: True)
    error = relative_error(bound.call(bound.weights[0]), reference)
    assert error <= max(2 * dense_error, LEAST_TOLERANCE)

    def run_all() -> None:
        weight: Any
        for weight in bound.weights:
            bound.call(weight)

    replay = Replay(run_all, len(bound.weights), DEVICE)
    measure(benchmark, replay, nbytes=made.weight_bytes, kernel=bound.kernel, error=error, dense_error=dense_error)
