"""The kernel for prompts and large batches on Hopper: every config against float64 on a GPU; which kernel runs what."""

from __future__ import annotations

import pytest
import torch
from random_24 import random_24
from torch.nn.functional import linear, silu

from sparsert import ops
from sparsert.ops import choice as choice_module
from sparsert.ops import native
from sparsert.ops.pack import dtype_code

#: Of a Hopper GPU: rows 17 and more by wgmma.sp; of others: mma.sp, above 64 in large tiles.
EXPECTED = {
    (9, 0): {1: "mma_sp", 16: "mma_sp", 17: "wgmma_sp", 64: "wgmma_sp", 65: "wgmma_sp", 9000: "wgmma_sp"},
} | {
    capability: {1: "mma_sp", 16: "mma_sp", 17: "mma_sp", 64: "mma_sp", 65: "mma_sp_gemm", 9000: "mma_sp_gemm"}
    for capability in ((8, 0), (8, 6), (8, 9), (10, 0), (12, 0))
}


@pytest.mark.parametrize("capability", EXPECTED)
def test_choice_by_gpu_and_rows(capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(native, "cuda_reason", lambda device, exact=False: None)
    choice_module._unavailable.cache_clear()
    choice_module.choose.cache_clear()
    try:
        device = torch.device("cuda")
        for rows, kernel in EXPECTED[capability].items():
            choice = choice_module.choose(device, torch.bfloat16, rows, "native")
            assert choice.kernel == kernel and not choice.is_fallback
        small = str(choice_module.choose(device, torch.bfloat16, 3))
        assert ("not wgmma_sp: takes no less than 17 rows of input, not 3" in small) == (capability == (9, 0))
        assert ("not wgmma_sp: runs on GPUs of compute capability 9.0 only" in small) == (capability != (9, 0))
        assert choice_module.choose(device, torch.float32, 100).kernel == "unpack"
        assert choice_module.choose(device, torch.float16, 512, "triton").kernel == "triton"
        assert choice_module.choose(device, torch.float16, 513, "triton").kernel == "unpack"
        # small layers stay with mma.sp a little longer
        small_layer = 576 * 1536
        for rows, kernel in {17: "mma_sp", 32: "mma_sp", 33: EXPECTED[capability][64]}.items():
            assert choice_module.choose(device, torch.bfloat16, rows, "native", small_layer).kernel == kernel
    finally:
        choice_module._unavailable.cache_clear()
        choice_module.choose.cache_clear()


def test_without_cuda_kernels_triton_serves_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    monkeypatch.setattr(native, "cuda_reason", lambda device, exact=False: "built without CUDA kernels")
    choice_module._unavailable.cache_clear()
    choice_module.choose.cache_clear()
    try:
        choice = choice_module.choose(torch.device("cuda"), torch.bfloat16, 500)
        assert choice.kernel == "triton" and choice.is_fallback
        assert "not mma_sp_gemm: unavailable: built without CUDA kernels" in str(choice)
    finally:
        choice_module._unavailable.cache_clear()
        choice_module.choose.cache_clear()


@pytest.mark.parametrize(("built", "kernel"), [(("80", "90"), "mma_sp_gemm"), (("80", "90a"), "wgmma_sp")])
def test_a_build_without_hoppers_own_instructions(
    built: tuple[str, ...], kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Code for sm_90 runs on a Hopper and has no wgmma, which would end the process."""
    state = {"available": True, "cuda": True, "architectures": list(built), "reason": None}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(native, "status", lambda: state)
    caches = (native.cuda_reason, choice_module._unavailable, choice_module.choose)
    for cache in caches:
        cache.cache_clear()
    try:
        device = torch.device("cuda")
        assert choice_module.choose(device, torch.bfloat16, 1).kernel == "mma_sp"
        prompt = choice_module.choose(device, torch.bfloat16, 4096)
        assert prompt.kernel == kernel and prompt.is_fallback == (kernel != "wgmma_sp")
        if prompt.is_fallback:
            assert "sm_90a; reinstall with -C cmake.define.SPARSERT_CUDA_ARCHS=90a" in str(prompt)
    finally:
        for cache in caches:
            cache.cache_clear()


def hopper() -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("wgmma.sp is of compute capability 9.0")


def relative_error(y: torch.Tensor, reference: torch.Tensor) -> float:
    return ((y.double() - reference).norm() / reference.norm()).item()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(256, 256), (272, 320), (96, 72), (200, 136), (640, 4096), (1000, 1000)])
def test_every_config(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Also those that the chooser would not take here, with and without a gate, into poisoned outputs."""
    hopper()
    extension = native.module()
    rows, columns = shape
    weight = random_24(rows, columns, dtype=dtype, device="cuda")
    packed, bias = ops.pack(weight), torch.randn(rows, device="cuda").to(dtype)
    workspace = torch.empty(64 << 20, dtype=torch.uint8, device="cuda")
    covered = set()
    for batch in (1, 33, 130, 700):
        x = torch.randn(batch, columns, device="cuda").to(dtype)
        reference = linear(x.double(), weight.double(), bias.double())
        limit = 2 * relative_error(linear(x, weight, bias), reference)
        pairs = None
        if rows % 32 == 0:
            by_tile = reference.view(batch, rows // 32, 2, 16)
            pairs = (silu(by_tile[:, :, 0]) * by_tile[:, :, 1]).flatten(1)
        for config, (name, outputs, tokens, split) in enumerate(extension.gemm24_configs()):
            for cluster in (1, 3, 8) if split else (1, 2):
                for even in (False,) if split or outputs != 128 or -(-batch // tokens) > 8 else (False, True):
                    for gated in (False, True) if pairs is not None else (False,):
                        y = torch.full((batch + 2, rows // 2 if gated else rows), torch.nan, device="cuda", dtype=dtype)
                        extension.gemm24_cuda(
                            packed.values.data_ptr(), packed.metadata.data_ptr(), x.data_ptr(), bias.data_ptr(),
                            y.data_ptr(), batch, rows, columns, columns, 0 if gated else -1, gated,
                            workspace.data_ptr(), dtype_code(dtype), native.stream(x.device), (config, cluster, even),
                        )  # fmt: skip
                        case = (name, cluster, even, gated, batch)
                        error = relative_error(y[:batch], pairs if gated and pairs is not None else reference)
                        assert error <= (2 * limit if gated else limit), case
                        assert bool(y[batch:].isnan().all()), case
                        covered.add((config, cluster, even))
    assert len(covered) == 3 * 4 + 2 * 5 + 2 * 3  # splits, whole tiles, even work


@pytest.mark.gpu
def test_refused_arguments() -> None:
    hopper()
    extension, packed = native.module(), ops.pack(random_24(32, 64, dtype=torch.bfloat16, device="cuda"))
    x = torch.zeros(64, 64, device="cuda", dtype=torch.bfloat16)

    def call(choice: tuple[int, int, bool], columns: int = 64, address: int = 0, kind: int = -1, gated: bool = False):
        extension.gemm24_cuda(
            packed.values.data_ptr(), packed.metadata.data_ptr(), x.data_ptr() + address, 0, x.data_ptr(), 32, 32,
            columns, 64, kind, gated, 0, dtype_code(x.dtype), native.stream(x.device), choice,
        )  # fmt: skip

    for refused in (
        lambda: call((99, 1, False)),
        lambda: call((1, 3, False)),  # more blocks than share activations
        lambda: call((1, 2, True)),  # even work without a workspace
        lambda: call((1, 1, False), columns=60),
        lambda: call((1, 1, False), address=2),
        lambda: call((1, 1, False), kind=1, gated=True),  # a gate other than SiLU
    ):
        with pytest.raises(RuntimeError, match="gemm24: cudaError"):
            refused()


@pytest.mark.gpu
def test_layers_of_a_step_go_through_it() -> None:
    """Rows that the copy engine cannot read, a slice, an odd width: copied, and right."""
    hopper()
    summaries = " ".join(ops.explain(28672, 4096, 1 << exponent).summary for exponent in range(5, 14))
    assert "dealt out evenly" in summaries and "shared by 2 blocks" in summaries
    for rows, columns in ((96, 76), (128, 256)):
        weight = random_24(rows, columns, dtype=torch.bfloat16, device="cuda")
        packed = ops.pack(weight)
        for x in (
            torch.randn(40, columns + 3, device="cuda", dtype=torch.bfloat16)[:, 1 : columns + 1],
            torch.randn(columns, 40, device="cuda", dtype=torch.bfloat16).T,
            torch.randn(2, 20, columns, device="cuda", dtype=torch.bfloat16),
        ):
            exact = linear(x.double(), weight.double())
            assert relative_error(ops.linear24(x, packed), exact) <= 2 * relative_error(linear(x, weight), exact)
            found = ops.linear24_open(x, packed, activation="silu", gated=True)
            by_tile = exact.unflatten(-1, (-1, 2, 16))
            pairs = (silu(by_tile[..., 0, :]) * by_tile[..., 1, :]).flatten(-2)
            assert isinstance(found, torch.Tensor) and relative_error(found, pairs) < 1e-2


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [64, 512, 1024])
def test_captured_and_repeatable(batch: int) -> None:
    """Two chains at a time on two streams, each with its own sums in a workspace, equal eager runs bit for bit."""
    hopper()
    layers = [ops.pack(random_24(6144, 6144, dtype=torch.bfloat16, device="cuda") * 0.02) for _ in range(3)]
    inputs = [torch.randn(batch, 6144, device="cuda", dtype=torch.bfloat16) for _ in range(2)]

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
