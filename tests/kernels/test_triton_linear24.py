from __future__ import annotations

import pytest
import torch
from random_24 import apply_mask, random_weight
from torch import Tensor

from sparsert.formats import Packed24, pack_reference

pytest.importorskip("triton")

from sparsert.kernels.linear24 import SUPPORTED_DTYPES, choose_split_k, choose_tile, linear24

ON_GPU = torch.cuda.is_available()
# outputs and inputs: one group; no multiple of a row tile, a unit or a tile; a left-over unit; chunks and left-overs
SHAPES = [(1, 4), (17, 100), (33, 576), (40, 1028)]
BATCHES = [1, 2, 3, 7, 8, 9, 16, 17, 64]
if ON_GPU:
    SHAPES += [(4096, 4096), (1000, 4100), (11008, 512), (512, 14336)]
    BATCHES += [257]


def make(
    shape: tuple[int, int], batch: int, dtype: torch.dtype, device: str
) -> tuple[Tensor, Packed24, Tensor, Tensor]:
    """x, packed weight, the same weight dense, bias."""
    weight = apply_mask(*random_weight(*shape, dtype, device=device))
    x = torch.randn(batch, shape[1], device=device).to(dtype)
    bias = torch.randn(shape[0], device=device).to(dtype)
    return x, pack_reference(weight), weight, bias


def run(x: Tensor, packed: Packed24, bias: Tensor | None = None, **options: object) -> Tensor:
    return linear24(x, packed.values, packed.metadata, packed.out_features, packed.in_features, bias, **options)


def assert_as_good_as_torch(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """The error against float64 is at most twice that of torch's own linear in the same dtype."""
    exact = torch.nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    torch_error = (torch.nn.functional.linear(x, weight, bias).double() - exact).abs().max()
    # torch may be exact by luck in a tiny product; rounding the result once is what nobody can avoid
    size = exact.abs()
    if x.dtype == torch.float32:  # here the order of the sum decides: both are a few roundings of its terms off
        size = 2 * torch.nn.functional.linear(x.double().abs(), weight.double().abs())
    rounding = size.max() * torch.finfo(x.dtype).eps / 2
    error = (y.double() - exact).abs().max()
    assert bool(torch.isfinite(y).all())
    allowed = 2 * torch.maximum(torch_error, rounding)
    assert float(error) <= float(allowed), f"error {float(error)}, torch's {float(torch_error)}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("shape", SHAPES)
def test_error_is_at_most_twice_torchs(shape: tuple[int, int], batch: int, dtype: torch.dtype, device: str) -> None:
    x, packed, weight, bias = make(shape, batch, dtype, device)
    y = run(x, packed, bias)
    assert y.shape == (batch, shape[0]) and y.dtype == dtype
    assert_as_good_as_torch(y, x, weight, bias)


@pytest.mark.parametrize("batch", [1, 17, 65])
@pytest.mark.parametrize("shape", SHAPES[:4])
def test_float32(shape: tuple[int, int], batch: int, device: str) -> None:
    x, packed, weight, bias = make(shape, batch, torch.float32, device)
    assert_as_good_as_torch(run(x, packed, bias), x, weight, bias)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("shape", "batch"), [((40, 132), 131), ((150, 100), 300)])
def test_prompts(shape: tuple[int, int], batch: int, dtype: torch.dtype, device: str) -> None:
    """Several tiles of rows, the last of them not full, and on a GPU split inputs."""
    x, packed, weight, bias = make(shape, batch, dtype, device)
    assert_as_good_as_torch(run(x, packed, bias), x, weight, bias)
    assert_as_good_as_torch(run(x, packed, split_k=2), x, weight, None)


@pytest.mark.parametrize("dtype", SUPPORTED_DTYPES)
@pytest.mark.parametrize("split_k", [1, 2, 4, 8])
def test_split_k(split_k: int, dtype: torch.dtype, device: str) -> None:
    x, packed, weight, bias = make((33, 1028), 5, dtype, device)
    y = run(x, packed, bias, split_k=split_k)
    assert_as_good_as_torch(y, x, weight, bias)
    assert torch.equal(run(x, packed, bias, split_k=split_k), y)  # the parts add up in one order
    assert_as_good_as_torch(run(x, packed, split_k=split_k), x, weight, None)


def test_more_splits_than_steps(device: str) -> None:
    x, packed, weight, _ = make((20, 68), 3, torch.float16, device)
    assert_as_good_as_torch(run(x, packed, split_k=8), x, weight, None)


@pytest.mark.parametrize("positions", [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)])
def test_each_pattern_alone(positions: tuple[int, int], device: str) -> None:
    """With one pattern everywhere and inputs that are powers of two, the product is exact."""
    mask = torch.zeros(18, 17, 4, dtype=torch.bool, device=device)
    mask[..., list(positions)] = True
    weight = apply_mask(torch.randint(1, 8, (18, 68), device=device).half(), mask.view(18, 68))
    x = torch.randint(0, 3, (3, 68), device=device).exp2().half()
    y = run(x, pack_reference(weight, mask.view(18, 68)))
    assert torch.equal(y.double(), x.double() @ weight.double().t())


@pytest.mark.parametrize("split_k", [1, 2])
def test_every_output_is_written_and_nothing_else(split_k: int, device: str) -> None:
    x, packed, weight, bias = make((37, 516), 9, torch.bfloat16, device)
    poisoned = torch.full((11, 64), float("nan"), dtype=torch.bfloat16, device=device)
    out = poisoned[1:10, 8:45]  # rows 64 apart
    assert run(x, packed, bias, out=out, split_k=split_k).data_ptr() == out.data_ptr()
    assert_as_good_as_torch(out, x, weight, bias)
    out.fill_(float("nan"))
    assert bool(poisoned.isnan().all())


def test_strided_rows_and_columns_of_x(device: str) -> None:
    x, packed, _, _ = make((24, 132), 6, torch.float16, device)
    wide = torch.full((6, 400), float("nan"), dtype=torch.float16, device=device)
    wide[:, 3:135] = x  # rows 400 apart, from an address that is no multiple of anything
    expected = run(x, packed)
    assert torch.equal(run(wide[:, 3:135], packed), expected)
    assert torch.equal(run(x.t().contiguous().t(), packed), expected)


def test_inputs_past_the_end_are_not_read(device: str) -> None:
    """NaN right after x must not reach the result through the zero weights of the padding."""
    x, packed, weight, _ = make((16, 68), 2, torch.float16, device)
    buffer = torch.full((3, 68), float("nan"), dtype=torch.float16, device=device)
    buffer[:2] = x
    assert_as_good_as_torch(run(buffer[:2], packed), x, weight, None)


def test_no_rows(device: str) -> None:
    _, packed, _, _ = make((16, 64), 1, torch.float16, device)
    assert run(torch.empty(0, 64, dtype=torch.float16, device=device), packed).shape == (0, 16)


def test_runs_are_identical(device: str) -> None:
    x, packed, _, bias = make((65, 772), 11, torch.bfloat16, device)
    first = run(x, packed, bias)
    assert all(torch.equal(run(x, packed, bias), first) for _ in range(3))


def test_arguments_that_do_not_fit(device: str) -> None:
    x, packed, _, _ = make((16, 64), 2, torch.float16, device)
    with pytest.raises(ValueError, match=r"x \(2, 60\) torch\.float16, need \[M, 64\]"):
        run(x[:, :60], packed)
    with pytest.raises(ValueError, match=r"torch\.bfloat16, need .* torch\.float16"):
        run(x.bfloat16(), packed)
    with pytest.raises(ValueError, match=r"got out \(2, 17\)"):
        run(x, packed, out=x.new_empty(2, 17))


def test_table_of_tiles() -> None:
    for batch in (1, 16, 17, 64, 65, 4096):
        tile = choose_tile(batch, torch.bfloat16)
        assert tile.block_m >= 16 and tile.block_n % 32 == 0 and tile.block_k % 32 == 0
    # a small layer is split until it fills the GPU, a large one or a short one is not
    assert choose_split_k(programs=16, steps=32, multiprocessors=132) > 1
    assert choose_split_k(programs=448, steps=32, multiprocessors=132) == 1
    assert choose_split_k(programs=1, steps=4, multiprocessors=132) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 16, 64])
@pytest.mark.parametrize("shape", [(1024, 4096), (4096, 1028)])  # the first is split along k
def test_cuda_graph(shape: tuple[int, int], batch: int) -> None:
    x, packed, weight, bias = make(shape, batch, torch.bfloat16, "cuda")
    run(x, packed, bias)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run(x, packed, bias)
    for _ in range(3):
        x.normal_()
        y.fill_(float("nan"))
        graph.replay()
        assert torch.equal(y, run(x, packed, bias))
        assert_as_good_as_torch(y, x, weight, bias)


@pytest.mark.gpu
def test_second_device_is_not_assumed() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    x, packed, weight, bias = make((128, 256), 4, torch.float16, "cuda:1")
    assert_as_good_as_torch(run(x, packed, bias), x, weight, bias)
