"""The operator: against float64, on the CPU everywhere and on every tile of the CUDA kernel on a GPU."""

from __future__ import annotations

import importlib

import pytest
import torch
from random_24 import random_24
from torch.nn.functional import linear

from sparsert import ops
from sparsert.errors import InputError, UnsupportedError
from sparsert.ops import choice as choice_module
from sparsert.ops import native
from sparsert.ops.pack import dtype_code

linear24_module = importlib.import_module("sparsert.ops.linear24")  # the package exports a function of that name

BATCHES = (1, 2, 3, 7, 8, 9, 16, 17, 33, 64, 257)
SHAPES = ((16, 64), (1, 4), (17, 100), (40, 1028), (100, 576), (1000, 260))

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def relative_error(y: torch.Tensor, reference: torch.Tensor) -> float:
    return float((y.double() - reference).norm() / reference.norm())


def check(y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """At most twice the error of a dense product in the same dtype, both against float64."""
    reference = linear(x.double(), weight.double(), None if bias is None else bias.double())
    dense_error = (linear(x, weight, bias).double() - reference).norm()
    assert y.shape == reference.shape and y.dtype == x.dtype
    # in float32 both are a few roundings off, and which is closer in a small product is luck
    roundings = 4 * torch.finfo(torch.float32).eps * reference.norm()
    assert (y.double() - reference).norm() <= 2 * dense_error + roundings


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_float64(device: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    weight = random_24(*shape, dtype=dtype, device=device)
    packed = ops.pack(weight)
    bias = torch.randn(shape[0], device=device).to(dtype)
    for batch in BATCHES:
        x = torch.randn(batch, shape[1], device=device).to(dtype)
        check(ops.linear24(x, packed, bias), x, weight, bias)
        check(ops.linear24(x, packed), x, weight, None)


@pytest.mark.skipif(native.module() is None, reason="the C++ extension is not built")
@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [*SHAPES, (576, 1536)])
def test_both_loops_of_the_cpu(shape: tuple[int, int], dtype: torch.dtype, portable: bool) -> None:
    """The one for AVX2 and the portable one, of which a processor takes the first if it can."""
    weight = random_24(*shape, dtype=dtype)
    packed = ops.pack(weight)
    for batch in (1, 2, 3, 7, 13):
        x = torch.randn(batch, shape[1])
        y = torch.full((batch + 1, shape[0]), float("nan"))
        native.module().linear24_cpu(
            packed.values.data_ptr(), packed.metadata.data_ptr(), x.data_ptr(), y.data_ptr(), batch, *shape,
            dtype_code(dtype), 2, portable=portable,
        )  # fmt: skip
        exact, sizes = x.double() @ weight.double().T, x.double().abs() @ weight.double().abs().T
        assert bool(((y[:batch] - exact).abs() <= 1e-6 * sizes).all()) and bool(y[batch].isnan().all())


@pytest.mark.skipif(native.module() is None, reason="the C++ extension is not built")
@pytest.mark.parametrize("portable", [False, True])
def test_infinities_and_subnormals_on_the_cpu(portable: bool) -> None:
    weight = torch.zeros(16, 64, dtype=torch.float16)
    weight[0, 0], weight[1, 5], weight[9, 62], weight[8, 3] = float("inf"), 2**-24, -(2**-20), float("nan")
    packed, x, y = ops.pack(weight), torch.ones(1, 64), torch.empty(1, 16)
    native.module().linear24_cpu(
        packed.values.data_ptr(), packed.metadata.data_ptr(), x.data_ptr(), y.data_ptr(), 1, 16, 64,
        dtype_code(torch.float16), 1, portable=portable,
    )  # fmt: skip
    expected = [float("inf"), 2**-24, *[0.0] * 6, float("nan"), -(2**-20), *[0.0] * 6]
    torch.testing.assert_close(y[0], torch.tensor(expected), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("device", DEVICES)
def test_leading_dimensions_and_strides(device: str) -> None:
    weight = random_24(48, 96, dtype=torch.bfloat16, device=device)
    packed = ops.pack(weight)
    options = {"device": device, "dtype": torch.bfloat16}
    for x in (
        torch.randn(2, 3, 96, **options),
        torch.randn(96, **options),
        torch.randn(96, 5, **options).t(),
        torch.randn(5, 103, **options)[:, 7:],  # rows that start at no aligned address
        torch.randn(5, 2, 96, **options)[:, 1],
        torch.randn(5, 100, **options)[:, 4:],  # 8-byte aligned rows
        torch.randn(1, 96, **options).expand(6, -1),
    ):
        check(ops.linear24(x, packed), x, weight, None)
    assert ops.linear24(torch.empty(0, 96, dtype=torch.bfloat16, device=device), packed).shape == (0, 48)


def test_rows_do_not_influence_each_other() -> None:
    """A NaN in one row of x stays in that row of y."""
    packed = ops.pack(random_24(32, 64, dtype=torch.float32))
    x = torch.randn(3, 64)
    x[1, 5] = float("nan")
    y = ops.linear24(x, packed)
    assert y[[0, 2]].isfinite().all()


@pytest.mark.parametrize("device", DEVICES)
def test_operator_registration(device: str) -> None:
    packed = ops.pack(random_24(32, 64, dtype=torch.bfloat16, device=device))
    x = torch.randn(3, 64, device=device, dtype=torch.bfloat16)
    torch.library.opcheck(torch.ops.sparsert.linear24, (x, packed.values, packed.metadata, None, 32, 64, "auto"))


@pytest.mark.parametrize("device", DEVICES)
def test_compiles_as_one_graph(device: str) -> None:
    packed = ops.pack(random_24(32, 64, dtype=torch.bfloat16, device=device))
    x = torch.randn(3, 64, device=device, dtype=torch.bfloat16)

    def function(x: torch.Tensor) -> torch.Tensor:
        return ops.linear24(x + 1, packed) * 2

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), function(x))


@pytest.mark.parametrize("device", DEVICES)
def test_gradient_of_input_and_bias(device: str) -> None:
    weight = random_24(20, 36, dtype=torch.float32, device=device)
    packed = ops.pack(weight)
    x = torch.randn(4, 36, device=device, requires_grad=True)
    bias = torch.randn(20, device=device, requires_grad=True)
    y = ops.linear24(x, packed, bias)
    upstream = torch.randn_like(y)
    y.backward(upstream)
    torch.testing.assert_close(x.grad, upstream @ weight)
    torch.testing.assert_close(bias.grad, upstream.sum(0))


def test_inputs_that_do_not_fit() -> None:
    packed = ops.pack(random_24(32, 64, dtype=torch.bfloat16))
    with pytest.raises(InputError, match="last dimension must be in_features=64"):
        ops.linear24(torch.zeros(2, 60, dtype=torch.bfloat16), packed)
    with pytest.raises(InputError, match=r"x is torch\.float32"):
        ops.linear24(torch.zeros(2, 64), packed)
    with pytest.raises(InputError, match=r"needed: contiguous \(32,\)"):
        ops.linear24(torch.zeros(2, 64, dtype=torch.bfloat16), packed, torch.zeros(31, dtype=torch.bfloat16))
    with pytest.raises(InputError, match="choose one of auto, native, triton, dense"):
        ops.linear24(torch.zeros(2, 64, dtype=torch.bfloat16), packed, backend="cublas")


def test_a_named_backend_never_falls_back() -> None:
    packed = ops.pack(random_24(32, 64, dtype=torch.bfloat16))
    x = torch.zeros(2, 64, dtype=torch.bfloat16)
    with pytest.raises(
        UnsupportedError, match="cannot run here: triton runs on cuda, the weight is on cpu; use 'auto'"
    ):
        ops.linear24(x, packed, backend="triton")
    assert ops.linear24(x, packed, backend="dense").shape == (2, 32)


def test_explain_says_what_runs_and_why() -> None:
    choice = ops.explain(32, 64, 33, device="cpu", dtype=torch.float32)
    assert choice.kernel == "unpack" and not choice.is_fallback
    assert "not mma_sp: runs on cuda, the weight is on cpu" in str(choice)
    assert "not cpu: takes up to 32 rows of input, not 33" in str(choice)


def test_without_the_extension_the_reference_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    """No compiler at install time: same results, one warning that says why."""
    weight = random_24(40, 260, dtype=torch.bfloat16)
    x = torch.randn(3, 260, dtype=torch.bfloat16)
    expected = ops.linear24(x, ops.pack(weight))
    monkeypatch.setattr(native, "_load", lambda: (None, "the compiled extension is not there"))
    choice_module._unavailable.cache_clear()
    choice_module.choose.cache_clear()
    linear24_module._warn_fallback.cache_clear()
    try:
        assert ops.explain(40, 260, 3, device="cpu", dtype=torch.bfloat16).is_fallback
        with pytest.warns(UserWarning, match="without the compiled kernel: unavailable: the compiled extension"):
            y = ops.linear24(x, ops.pack(weight))
        torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2)
        with pytest.raises(UnsupportedError, match="the compiled extension is not there"):
            ops.linear24(x, ops.pack(weight), backend="native")
    finally:
        choice_module._unavailable.cache_clear()
        choice_module.choose.cache_clear()


def test_rows_are_copied_only_where_a_kernel_cannot_read_them() -> None:
    whole = torch.randn(6, 16, dtype=torch.bfloat16)
    assert (
        native.aligned_rows(whole, 16) is whole
        and native.aligned_rows(whole[1:, :8], 16).data_ptr() == whole[1:].data_ptr()
    )
    shifted = torch.randn(97, dtype=torch.bfloat16)[1:].view(6, 16)  # contiguous, but begins two bytes late
    for x in (shifted, whole.T, whole[:, 1:9], whole[:, ::2]):
        found = native.aligned_rows(x, 8)
        assert torch.equal(found, x) and found.is_contiguous() and found.data_ptr() % 8 == 0


# --- the CUDA kernel -------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_tile_and_split(dtype: torch.dtype) -> None:
    """Each instantiation, also those that the chooser would not take here, into poisoned outputs."""
    extension = native.module()
    names = extension.linear24_configs()
    covered: set[tuple[int, int]] = set()
    for rows, columns in ((1000, 1028), (17, 100), (256, 4096), (192, 576)):
        weight = random_24(rows, columns, dtype=dtype, device="cuda")
        packed = ops.pack(weight)
        bias = torch.randn(rows, device="cuda").to(dtype)
        for batch in (1, 3, 8, 9, 16, 17, 32, 33, 64):
            x = torch.randn(batch, columns, device="cuda").to(dtype)
            reference = linear(x.double(), weight.double(), bias.double())
            limit = 2 * relative_error(linear(x, weight, bias), reference)
            for config in range(len(names)):
                for splits in (1, 2, 3, 8):
                    y = torch.full((batch, rows), float("nan"), device="cuda", dtype=dtype)
                    try:
                        extension.linear24_cuda_with(
                            packed.values.data_ptr(), packed.metadata.data_ptr(), x.data_ptr(), bias.data_ptr(),
                            y.data_ptr(), batch, rows, columns, columns, dtype_code(dtype),
                            native.stream(x.device), config, splits,
                        )  # fmt: skip
                    except RuntimeError as error:
                        assert "cudaErrorInvalidConfiguration" in str(error)  # this tile is not built for this batch
                        continue
                    covered.add((config, splits))
                    assert relative_error(y, reference) <= limit, (names[config], splits, batch, rows, columns)
    assert len(covered) == 4 * len(names)


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 8, 16, 64])
def test_graph_capture_and_determinism(batch: int) -> None:
    """A chain of linears in one CUDA graph, replayed on new inputs, equals eager bit for bit every time."""
    layers = [ops.pack(random_24(1024, 1024, dtype=torch.bfloat16, device="cuda") * 0.05) for _ in range(6)]
    x = torch.randn(batch, 1024, device="cuda", dtype=torch.bfloat16)

    def chain(x: torch.Tensor) -> torch.Tensor:
        for packed in layers:
            x = ops.linear24(x, packed)
        return x

    chain(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = chain(x)
    for _ in range(5):
        x.copy_(torch.randn_like(x))
        y.fill_(float("nan"))
        graph.replay()
        torch.testing.assert_close(y, chain(x), rtol=0, atol=0)


@pytest.mark.gpu
def test_weights_packed_just_before_the_linear() -> None:
    """The kernel asks for weights before the previous kernel ends; one that writes them must still be waited for."""
    for _ in range(50):
        weight = random_24(256, 512, dtype=torch.bfloat16, device="cuda")
        x = torch.randn(4, 512, device="cuda", dtype=torch.bfloat16)
        expected = ops.linear24(x, ops.pack(weight, backend="reference"))
        values = torch.empty_like(ops.pack(weight).values)
        packed = ops.pack(weight)
        values.fill_(float("nan"))
        values.copy_(packed.values)
        fresh = type(packed)(values, packed.metadata, 256, 512)
        torch.testing.assert_close(ops.linear24(x, fresh), expected, rtol=0, atol=0)


@pytest.mark.gpu
def test_compiled_with_inductor() -> None:
    packed = ops.pack(random_24(128, 256, dtype=torch.bfloat16, device="cuda"))
    x = torch.randn(2, 256, device="cuda", dtype=torch.bfloat16)

    def function(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.silu(ops.linear24(x, packed))

    compiled = torch.compile(function, fullgraph=True, mode="reduce-overhead")
    for _ in range(4):
        x = torch.randn_like(x)
        torch.testing.assert_close(compiled(x).clone(), function(x), rtol=2e-2, atol=2e-2)


@pytest.mark.gpu
def test_another_stream() -> None:
    weight = random_24(512, 1024, dtype=torch.bfloat16, device="cuda")
    packed = ops.pack(weight)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        x = torch.randn(8, 1024, device="cuda", dtype=torch.bfloat16)
        y = ops.linear24(x, packed)
    stream.synchronize()
    check(y, x, weight, None)
