"""The kernel for prompts of GPUs other than Hopper, which a Hopper GPU runs as well: every config against float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from random_24 import random_24
from torch.nn.functional import linear, silu

from sparsert import ops
from sparsert.formats import Packed24
from sparsert.ops import choice as choice_module
from sparsert.ops import native
from sparsert.ops.pack import dtype_code

pytestmark = pytest.mark.gpu

CONFIGS = 3


def relative_error(y: torch.Tensor, reference: torch.Tensor) -> float:
    return ((y.double() - reference).norm() / reference.norm()).item()


def pairs_of(exact: torch.Tensor) -> torch.Tensor:
    """SiLU(gate) * factor, of outputs whose row tiles are gates and factors in turn."""
    by_tile = exact.unflatten(-1, (-1, 2, 16))
    return (silu(by_tile[..., 0, :]) * by_tile[..., 1, :]).flatten(-2)


def run_named(
    choice: tuple[int, int],
    x: torch.Tensor,
    packed: Packed24,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    *,
    columns: int | None = None,
    kind: int | None = None,
    gated: bool = False,
    workspace: torch.Tensor | None = None,
) -> None:
    """The kernel with a given (config, splits); y may have more rows than x."""
    native.module().gemm24_mma_cuda(
        packed.values.data_ptr(), packed.metadata.data_ptr(), x.data_ptr(), native.address(bias), y.data_ptr(),
        x.shape[0], packed.out_features, packed.in_features if columns is None else columns, x.stride(0),
        (0 if gated else -1) if kind is None else kind, gated, native.address(workspace), dtype_code(x.dtype),
        native.stream(x.device), choice,
    )  # fmt: skip


# outputs and inputs: less than a tile of 16, no multiple of a row tile, of a block's outputs, of 32, 64 or 256 inputs
SHAPES = [(1, 8), (200, 136), (272, 320), (96, 72), (1000, 1000), (640, 576), (288, 4096), (160, 14336)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_config(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """With and without a gate, a bias and split inputs, into poisoned outputs, of inputs with NaN behind each row."""
    extension = native.module()
    rows, columns = shape
    weight = random_24(rows, columns, dtype=dtype, device="cuda")
    packed, some_bias = ops.pack(weight), torch.randn(rows, device="cuda").to(dtype)
    chunks = -(-columns // 256)
    assert len(extension.gemm24_mma_configs()) == CONFIGS
    for batch in (1, 17, 65, 129, 300):
        wide = torch.full((batch, columns + 8), torch.nan, device="cuda", dtype=dtype)
        x = wide[:, :columns]
        x.normal_()
        for bias in (some_bias, None):
            exact = linear(x.double(), weight.double(), None if bias is None else bias.double())
            limit = 2 * relative_error(linear(x, weight, bias), exact) + 1e-6
            for config in range(CONFIGS):
                for splits in sorted({1, min(3, chunks), min(8, chunks)}):
                    size = splits * batch * -(-rows // 16) * 16 if splits > 1 else 0
                    assert extension.gemm24_mma_workspace(batch, rows, columns, (config, splits)) == 4 * size
                    workspace = torch.full((size,), torch.nan, device="cuda")
                    for gated in (False, True) if rows % 32 == 0 else (False,):
                        y = torch.full((batch + 2, rows // 2 if gated else rows), torch.nan, device="cuda", dtype=dtype)
                        run_named((config, splits), x, packed, bias, y, gated=gated, workspace=workspace)
                        error = relative_error(y[:batch], pairs_of(exact) if gated else exact)
                        case = (config, splits, gated, batch, bias is not None)
                        assert error <= (2 * limit if gated else limit), case
                        assert bool(y[batch:].isnan().all()), case


def test_refused_arguments() -> None:
    packed = ops.pack(random_24(32, 512, dtype=torch.bfloat16, device="cuda"))
    x = torch.zeros(70, 512, device="cuda", dtype=torch.bfloat16)
    y = torch.zeros(70, 40, device="cuda", dtype=torch.bfloat16)
    small = ops.pack(random_24(16, 512, dtype=torch.bfloat16, device="cuda"))
    workspace = torch.zeros(1 << 16, device="cuda")
    for refused in (
        lambda: run_named((99, 1), x, packed, None, y),
        lambda: run_named((0, 3), x, packed, None, y, workspace=workspace),  # two chunks of inputs
        lambda: run_named((0, 2), x, packed, None, y),  # split without a workspace
        lambda: run_named((0, 1), x, packed, None, y, columns=508),
        lambda: run_named((0, 1), x.flatten()[1 : 1 + 64 * 512].view(64, 512), packed, None, y),
        lambda: run_named((0, 1), x, packed, None, y, kind=0),  # an activation without a gate
        lambda: run_named((0, 1), x, packed, None, y, kind=1, gated=True),  # a gate other than SiLU
        lambda: run_named((0, 1), x, small, None, y, gated=True),  # half of a pair of row tiles
    ):
        with pytest.raises(RuntimeError, match="gemm24_mma: cudaError"):
            refused()


@pytest.fixture
def without_wgmma(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A Hopper GPU takes what the others take."""
    others = tuple(row for row in choice_module.CAPABILITIES if row.kernel != "wgmma_sp")
    monkeypatch.setattr(choice_module, "CAPABILITIES", others)
    choice_module.choose.cache_clear()
    yield
    choice_module.choose.cache_clear()


@pytest.mark.usefixtures("without_wgmma")
@pytest.mark.parametrize("shape", [(96, 76), (128, 256)])
def test_through_the_operators(shape: tuple[int, int]) -> None:
    """Rows that cannot be read in 16 bytes, a slice, an odd width: copied, and right. A gate is part of the kernel."""
    rows, columns = shape
    weight = random_24(rows, columns, dtype=torch.bfloat16, device="cuda")
    packed = ops.pack(weight)
    assert "tile 128 outputs x 64 tokens" in ops.explain(rows, columns, 90).summary
    for x in (
        torch.randn(90, columns + 3, device="cuda", dtype=torch.bfloat16)[:, 1 : columns + 1],
        torch.randn(columns, 90, device="cuda", dtype=torch.bfloat16).T,
        torch.randn(3, 30, columns, device="cuda", dtype=torch.bfloat16),
    ):
        exact = linear(x.double(), weight.double())
        assert relative_error(ops.linear24(x, packed), exact) <= 2 * relative_error(linear(x, weight), exact)
        found = ops.linear24_open(x, packed, activation="silu", gated=True)
        assert isinstance(found, torch.Tensor) and relative_error(found, pairs_of(exact)) < 1e-2
        apart = ops.linear24_open(x, packed, activation="gelu", gated=True)  # another activation: a kernel of its own
        assert isinstance(apart, torch.Tensor) and apart.shape == found.shape


@pytest.mark.usefixtures("without_wgmma")
def test_no_scratch_of_the_weights_size() -> None:
    packed = ops.pack(random_24(8192, 4096, dtype=torch.bfloat16, device="cuda"))
    x = torch.randn(2048, 4096, device="cuda", dtype=torch.bfloat16)
    assert ops.explain(8192, 4096, 2048).kernel == "mma_sp_gemm"
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    y = ops.linear24(x, packed)
    assert torch.cuda.max_memory_allocated() - before == y.nbytes


@pytest.mark.usefixtures("without_wgmma")
@pytest.mark.parametrize("batch", [70, 1024])
def test_captured_and_repeatable(batch: int) -> None:
    """Two chains at a time on two streams, with split inputs and without, equal eager runs bit for bit."""
    layers = [ops.pack(random_24(2048, 2048, dtype=torch.bfloat16, device="cuda") * 0.03) for _ in range(3)]
    inputs = [torch.randn(batch, 2048, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    assert ("inputs split" in ops.explain(2048, 2048, batch).summary) == (batch == 70)

    def chain(x: torch.Tensor) -> torch.Tensor:
        for packed in layers:
            x = ops.linear24(x, packed)
        return x

    expected = [chain(x) for x in inputs]
    torch.cuda.synchronize()
    graphs, outputs = [torch.cuda.CUDAGraph() for _ in inputs], []
    for graph, x in zip(graphs, inputs, strict=True):
        with torch.cuda.graph(graph):
            outputs.append(chain(x))
    streams = [torch.cuda.Stream() for _ in inputs]
    for _ in range(5):
        for stream, graph, y in zip(streams, graphs, outputs, strict=True):
            with torch.cuda.stream(stream):
                y.fill_(torch.nan)
                graph.replay()
        torch.cuda.synchronize()
        for y, right in zip(outputs, expected, strict=True):
            torch.testing.assert_close(y, right, rtol=0, atol=0)


@pytest.mark.parametrize(("multiprocessors", "capability"), [(108, 80), (84, 86), (128, 89), (132, 90), (170, 120)])
def test_choice(multiprocessors: int, capability: int) -> None:
    """Of any GPU: large tiles for much work, split inputs for little, never more splits than chunks."""
    extension = native.module()
    most = {0: 0, 1: 0}
    for rows, columns in ((28672, 4096), (4096, 14336), (4096, 4096), (1024, 4096), (3072, 576), (16, 64)):
        for batch in (65, 128, 500, 2000, 9000):
            config, splits, name = extension.gemm24_mma_choice(batch, rows, columns, multiprocessors, capability)
            assert 0 <= config < CONFIGS and 1 <= splits <= min(8, -(-columns // 256))
            assert name.startswith(extension.gemm24_mma_configs()[config][0])
            assert (f"inputs split over {splits} blocks" in name) == (splits > 1)
            most[int(rows * batch >= 28672 * 2000)] = max(most[int(rows * batch >= 28672 * 2000)], splits)
    assert most[0] >= 4 and most[1] == 1
    assert extension.gemm24_mma_choice(9000, 28672, 4096, multiprocessors, capability)[0] == 0
