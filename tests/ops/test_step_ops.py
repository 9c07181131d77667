"""Norm, activation, gated linear and decode attention: torch's operations everywhere, the CUDA kernels on a GPU.

What is right is written out here in float64, apart from the code under test.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as functional
from random_24 import random_24
from torch import Tensor

from sparsert import ops
from sparsert.errors import InputError
from sparsert.formats import interleave_outputs
from sparsert.ops import native

GPU = pytest.param("cuda", marks=pytest.mark.gpu)
DEVICES = ["cpu", GPU]


def dtypes_of(device: str) -> list[torch.dtype]:
    return [torch.float32] if device == "cpu" else [torch.bfloat16, torch.float16, torch.float32]


def assert_close(found: Tensor, exact: Tensor, roundings: float = 4, what: str = "") -> None:
    """The rms error is a few roundings of the format."""
    assert found.shape == exact.shape
    error = (found.double() - exact).square().mean().sqrt() / exact.square().mean().sqrt().clamp(min=1e-30)
    assert float(error) <= roundings * torch.finfo(found.dtype).eps, (float(error), what)


# ------------------------------------------------------------------------------------------------------------ norm


def exact_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, centered: bool) -> Tensor:
    x = x.double()
    if centered:
        x = x - x.mean(-1, keepdim=True)
    y = x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()
    return y if bias is None else y + bias.double()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("width", [8, 64, 576, 1000, 4096, 9216])
@pytest.mark.parametrize("kind", ["rms", "rms in float", "post", "layer"])
def test_residual_norm(device: str, width: int, kind: str) -> None:
    generator = torch.Generator().manual_seed(width)
    for dtype in dtypes_of(device):
        for rows in ((1,), (3, 5)):

            def random(*shape: int, of: torch.dtype = dtype) -> Tensor:
                return torch.randn(*shape, generator=generator).to(device, of)

            x, residual = random(*rows, width) + 0.5, random(*rows, width)
            of = torch.float32 if kind != "rms" else dtype
            weight = random(width, of=of) + 1
            bias = random(width, of=of) if kind == "layer" else None
            post = random(width, of=of) + 1 if kind == "post" else None
            centered = kind == "layer"
            stream, normed = ops.residual_norm(
                x, residual, weight, 1e-5, bias=bias, post_weight=post, centered=centered
            )
            added = x.double() if post is None else exact_norm(x, post, None, 1e-5, centered)
            assert_close(stream, residual.double() + added)
            # of the stream as it is stored
            assert_close(normed, exact_norm(stream, weight, bias, 1e-5, centered))
            same, normed = ops.residual_norm(x, None, weight, 1e-5, bias=bias, centered=centered)
            assert torch.equal(same, x)
            assert_close(normed, exact_norm(x, weight, bias, 1e-5, centered))


@pytest.mark.parametrize("device", DEVICES)
def test_layer_norm_of_a_large_mean(device: str) -> None:
    """The variance of numbers far from zero is not lost."""
    x = torch.randn(4, 512, generator=torch.Generator().manual_seed(0)).add_(100).to(device)
    x = x.half() if device == "cuda" else x
    weight = torch.ones(512, device=device)
    normed = ops.residual_norm(x, None, weight, 1e-5, centered=True)[1]
    assert_close(normed, exact_norm(x, weight, None, 1e-5, True), roundings=50 if device == "cpu" else 4)


def test_norm_has_gradients() -> None:
    x = torch.randn(2, 16, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(16, dtype=torch.float64, requires_grad=True)
    ops.residual_norm(x.float(), None, weight.float(), 1e-5)[1].sum().backward()
    assert x.grad is not None and weight.grad is not None


# ------------------------------------------------------------------------------------------------------ activation


def exact_activation(x: Tensor, kind: str) -> Tensor:
    x = x.double()
    if kind == "silu":
        return x / (1 + (-x).exp())
    if kind == "relu2":
        return x.clamp(min=0).square()
    if kind == "gelu":
        return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ops.ACTIVATIONS)
def test_activate(device: str, kind: str) -> None:
    generator = torch.Generator().manual_seed(1)
    for dtype in dtypes_of(device):
        for width in (16, 48, 1000, 14336):
            x = (3 * torch.randn(5, 2 * width, generator=generator)).to(device, dtype)
            gate, up = x.double().chunk(2, dim=-1)
            assert_close(ops.activate(x, kind, gated=True), exact_activation(gate, kind) * up)
            assert_close(ops.activate(x, kind, gated=False), exact_activation(x, kind))
            if width % 16 == 0:
                turns = torch.stack([part.unflatten(-1, (-1, 16)) for part in x.chunk(2, dim=-1)], dim=-2).flatten(-3)
                assert torch.equal(
                    ops.activate(turns, kind, gated=True, interleaved=True), ops.activate(x, kind, gated=True)
                )


def test_unknown_activation() -> None:
    with pytest.raises(InputError, match="'swish' is not known; choose of silu, gelu, gelu_tanh, relu2"):
        ops.activate(torch.ones(2), "swish", gated=False)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["silu", "gelu_tanh"])
def test_linear_with_gate(device: str, kind: str) -> None:
    generator = torch.Generator().manual_seed(2)
    shapes = [(48, 96), (160, 64)] if device == "cpu" else [(48, 96), (1536, 576), (11008, 4096), (592, 260)]
    for dtype in dtypes_of(device):
        for width, columns in shapes:
            gate, up = (random_24(width, columns, dtype=dtype, device=device) for _ in range(2))
            packed = interleave_outputs(ops.pack(gate), ops.pack(up))
            assert torch.equal(ops.unpack(packed).unflatten(0, (-1, 2, 16))[:, 1].flatten(0, 1), up)
            for batch in (1, 3, 8, 16, 17, 64, 70):
                x = torch.randn(batch, columns, generator=generator).to(device, dtype)
                bias = torch.randn(2 * width, generator=generator).to(device, dtype)
                found = ops.linear24_open(x, packed, bias, activation=kind, gated=True)
                turns = bias.double().unflatten(0, (-1, 2, 16))
                sums = [
                    functional.linear(x.double(), weight.double()) + turns[:, place].flatten()
                    for place, weight in enumerate((gate, up))
                ]
                exact = exact_activation(sums[0], kind) * sums[1]
                plain = ops.activate(ops.linear24(x, packed, bias), kind, gated=True, interleaved=True)
                error, plain_error = ((y.double() - exact).norm() for y in (found, plain))
                assert error <= plain_error * 1.5 + 1e-6 * exact.norm()


@pytest.mark.parametrize("device", DEVICES)
def test_linear_with_activation(device: str) -> None:
    for dtype in dtypes_of(device):
        weight = random_24(100, 64, dtype=dtype, device=device)
        for batch in (1, 16, 33):
            x = torch.randn(batch, 64, device=device).to(dtype)
            found = ops.linear24_open(x, ops.pack(weight), activation="relu2")
            exact = exact_activation(functional.linear(x.double(), weight.double()), "relu2")
            assert_close(found, exact, roundings=8)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(64, 96, 48), (576, 1536, 960), (4096, 4096, 6144), (4096, 11008, 22016)])
def test_sub_block_closes_and_next_opens(device: str, shape: tuple[int, int, int]) -> None:
    """Layer, addition, norm, layer: as exact with the division put off as with a norm in between."""
    if device == "cpu" and shape[0] > 1000:
        pytest.skip("for a GPU")
    width, first, last = shape
    generator = torch.Generator().manual_seed(4)
    for dtype in dtypes_of(device):
        close_weight, open_weight = (
            random_24(rows, columns, dtype=dtype, device=device) for rows, columns in ((width, first), (last, width))
        )
        packed, following = ops.pack(close_weight), ops.pack(open_weight)
        weight = (torch.randn(width, generator=generator) + 1).to(device, dtype)
        bias, next_bias = (torch.randn(size, generator=generator).to(device, dtype) for size in (width, last))
        for batch in (1, 2, 8, 13, 16, 40):
            x = torch.randn(batch, first, generator=generator).to(device, dtype)
            stream = (8 * torch.randn(batch, width, generator=generator)).to(device, dtype)
            closed, normed = ops.linear24_close(x, packed, bias, stream, weight, 1e-5)
            if device == "cuda":
                assert isinstance(normed, ops.DeferredNorm) == (ops.fuses24(x) and dtype == torch.bfloat16)
            exact_stream = functional.linear(x.double(), close_weight.double(), bias.double()) + stream.double()
            assert_close(closed, exact_stream)
            exact_norm_of_it = exact_norm(closed, weight, None, 1e-5, False)
            assert_close(normed.resolve() if isinstance(normed, ops.DeferredNorm) else normed, exact_norm_of_it)
            y = ops.linear24_open(normed, following, next_bias)
            exact = functional.linear(exact_norm_of_it, open_weight.double(), next_bias.double())
            plain = ops.residual_norm(closed, None, weight, 1e-5)[1]
            error = (y.double() - exact).norm()
            plain_error = (functional.linear(plain, open_weight, next_bias).double() - exact).norm()
            assert error <= 1.3 * plain_error + 1e-6 * exact.norm()


def in_tiles(x: Tensor) -> ops.Tiled:
    """Rows into tiles, value by value as the picture in ops/tiles.py says."""
    rows, width = x.shape
    tiles = 1 if rows <= 8 else 2
    data = torch.full((width // 32, tiles, 4, 8, 8), torch.nan, dtype=x.dtype, device=x.device)
    row, k = torch.meshgrid(torch.arange(rows), torch.arange(width), indexing="ij")
    data[k // 32, row // 8, k % 32 // 8, row % 8, k % 8] = x
    return ops.Tiled(data, x.shape)


def test_tiles_to_rows() -> None:
    for rows, width in ((1, 64), (8, 128), (11, 64), (16, 192)):
        x = torch.randn(rows, width)
        assert torch.equal(in_tiles(x).to_rows(), x) and ops.to_rows(x) is x
    x = torch.randn(6, 64)
    assert torch.equal(ops.Tiled(in_tiles(x).data, torch.Size((2, 3, 64))).to_rows(), x.view(2, 3, 64))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(960, 576), (6144, 4096), (4096, 11008), (64, 64)])
def test_tiles_change_nothing(shape: tuple[int, int]) -> None:
    """Bit for bit what rows give, in and out, whatever lies in the padding."""
    for dtype in (torch.bfloat16, torch.float16):
        packed = ops.pack(random_24(*shape, dtype=dtype, device="cuda"))
        bias = torch.randn(shape[0], device="cuda").to(dtype)
        weight = torch.randn(shape[0], device="cuda").to(dtype)
        for batch in (1, 5, 8, 9, 16):
            x = torch.randn(batch, shape[1], device="cuda").to(dtype)
            expected = ops.linear24_open(x, packed, bias)
            found = ops.linear24_open(in_tiles(x), packed, bias)
            assert isinstance(expected, Tensor) and torch.equal(ops.to_rows(found), expected)
            tiled = ops.linear24_open(x, packed, bias, tiled=True)
            assert isinstance(tiled, ops.Tiled) == (batch >= 5)
            assert torch.equal(ops.to_rows(tiled), expected)
            gated = [
                ops.to_rows(ops.linear24_open(way, packed, bias, activation="silu", gated=True, tiled=tiled))
                for way, tiled in ((x, False), (in_tiles(x), True))
            ]
            assert torch.equal(*gated)
            stream = torch.randn(batch, shape[0], device="cuda").to(dtype)
            closed = [ops.linear24_close(way, packed, bias, stream, weight, 1e-5) for way in (x, in_tiles(x))]
            assert torch.equal(closed[0][0], closed[1][0])
            if dtype == torch.bfloat16:
                first, second = (normed for _, normed in closed)
                assert isinstance(first, ops.DeferredNorm) and isinstance(second, ops.DeferredNorm)
                assert isinstance(first.weighted, ops.Tiled) == (batch >= 5)
                exact = exact_norm(closed[0][0], weight, None, 1e-5, False)
                assert_close(first.resolve(), exact)
                assert torch.equal(first.resolve(), second.resolve())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(16, 8), (17, 40), (100, 72), (1000, 4096), (31, 1000), (50, 33)])
def test_dense_linear(device: str, shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(5)
    for dtype in dtypes_of(device):
        weight = torch.randn(shape, generator=generator).to(device, dtype)
        bias = torch.randn(shape[0], generator=generator).to(device, dtype)
        for batch in (1, 2, 7, 8, 9, 16):
            # rows of a wider tensor, and leading dimensions
            x = torch.randn(batch, 1, shape[1] + 8, generator=generator).to(device, dtype)[..., : shape[1]]
            for added in (bias, None):
                y = ops.dense_linear(x, weight, added)
                exact = functional.linear(x.double(), weight.double(), None if added is None else added.double())
                plain = functional.linear(x, weight, added).double()
                assert y.shape == exact.shape and y.dtype == dtype
                assert (y.double() - exact).norm() <= 1.5 * (plain - exact).norm() + 1e-6 * exact.norm()


@pytest.mark.gpu
def test_which_dense_layers_have_a_kernel() -> None:
    from sparsert.ops.dense import takes_dense

    def x(rows: int, width: int = 64) -> Tensor:
        return torch.ones(rows, width, device="cuda", dtype=torch.bfloat16)

    built = native.cuda_reason(torch.device("cuda")) is None
    assert takes_dense(x(8), x(3)) == built
    assert not takes_dense(x(9), x(3)) and not takes_dense(x(1, 36), x(3, 36)) and not takes_dense(x(1).float(), x(3))


def test_a_gate_needs_an_activation() -> None:
    packed = ops.pack(random_24(32, 32, dtype=torch.float32, device="cpu"))
    with pytest.raises(InputError, match="a gate needs an activation"):
        ops.linear24_open(torch.ones(1, 32), packed, gated=True)
    with pytest.raises(InputError, match="'tanh' is not known"):
        ops.linear24_open(torch.ones(1, 32), packed, activation="tanh")


# ------------------------------------------------------------------------------------------------------- attention


def exact_attention(
    heads: Tensor, keys: Tensor, values: Tensor, length: int, angles: Tensor, shape: ops.AttentionShape,
    q_norm: Tensor | None, k_norm: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """One text in float64: (attended [heads, dim], new key, new value [kv_heads, dim])."""

    def turn(x: Tensor) -> Tensor:
        half = shape.rotary_dim // 2
        a, b = x[..., :half], x[..., half : 2 * half]
        cosine, sine = angles.cos(), angles.sin()
        return torch.cat([a * cosine - b * sine, b * cosine + a * sine, x[..., 2 * half :]], dim=-1)

    def norm(x: Tensor, weight: Tensor | None) -> Tensor:
        return x if weight is None else exact_norm(x, weight, None, shape.norm_eps, False)

    q, k, v = heads.double().split([shape.num_heads, shape.num_kv_heads, shape.num_kv_heads])
    q, k = turn(norm(q, q_norm)), turn(norm(k, k_norm))
    begin = 0 if shape.sliding_window is None else max(0, length + 1 - shape.sliding_window)
    group = shape.num_heads // shape.num_kv_heads
    attended = []
    for head in range(shape.num_heads):
        seen = torch.cat([keys[head // group, :length].double(), k[head // group].unsqueeze(0)])[begin:]
        scores = seen @ q[head] * shape.scale
        if shape.softcap is not None:
            scores = shape.softcap * torch.tanh(scores / shape.softcap)
        seen = torch.cat([values[head // group, :length].double(), v[head // group].unsqueeze(0)])[begin:]
        attended.append(scores.softmax(0) @ seen)
    return torch.stack(attended), k, v


SHAPES = {
    "one head a key": ops.AttentionShape(4, 4, 64, 64, 0.125),
    "group 3": ops.AttentionShape(9, 3, 64, 64, 0.125),
    "group 4": ops.AttentionShape(32, 8, 128, 128, 128**-0.5),
    "group 6, partial rotation": ops.AttentionShape(24, 4, 96, 48, 96**-0.5),
    "group 8": ops.AttentionShape(16, 2, 128, 128, 128**-0.5),
    "group 12": ops.AttentionShape(24, 2, 32, 32, 32**-0.5),
    "wide heads, window": ops.AttentionShape(8, 4, 256, 256, 1 / 16, sliding_window=37),
    "softcap": ops.AttentionShape(8, 4, 256, 256, 1 / 16, softcap=20.0),
    "window of one": ops.AttentionShape(4, 2, 64, 64, 0.125, sliding_window=1),
    "a width without a kernel": ops.AttentionShape(6, 2, 40, 20, 40**-0.5),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("normed", [False, True])
def test_decode_attention(device: str, name: str, normed: bool) -> None:
    shape = SHAPES[name]
    generator = torch.Generator().manual_seed(3)
    lengths = [0, 1, 15, 16, 17, 100, 299] if device == "cpu" else [0, 1, 15, 16, 63, 64, 200, 511, 1000, 2047]
    capacity = max(lengths) + 5
    window = capacity - 3
    frequencies = 1 / 10000 ** (torch.arange(shape.rotary_dim // 2, dtype=torch.float64) / (shape.rotary_dim // 2))
    angles = torch.outer(torch.arange(capacity, dtype=torch.float64), frequencies)
    for dtype in dtypes_of(device):

        def random(*sizes: int, of: torch.dtype = dtype) -> Tensor:
            return torch.randn(*sizes, generator=generator).to(device, of)

        rows = len(lengths)
        heads = random(rows, shape.num_heads + 2 * shape.num_kv_heads, shape.head_dim)
        keys, values = (random(rows + 1, shape.num_kv_heads, capacity, shape.head_dim) for _ in range(2))
        q_norm, k_norm = (random(shape.head_dim, of=torch.float32) + 1 if normed else None for _ in range(2))
        cosine = angles.cos().repeat(1, 2).to(device, dtype)
        signed_sine = torch.cat([-angles.sin(), angles.sin()], dim=1).to(device, dtype)
        for row, length in enumerate(lengths):  # whatever lies behind a text must not be seen
            keys[row, :, length:] = torch.nan if device == "cuda" and takes(shape, dtype) else 1e4
            values[row, :, length:] = torch.nan if device == "cuda" and takes(shape, dtype) else 1e4
        before = keys.clone(), values.clone()
        there = torch.tensor(lengths, device=device)
        results = {
            "default": ops.decode_attention(
                heads, keys, values, there, cosine, signed_sine, shape, window, q_norm, k_norm
            )
        }
        if device == "cuda" and takes(shape, dtype):
            from sparsert.ops.attention import _cuda

            for splits, warps in itertools.product((1, 2, 4, 8, 16), (4, 8)):
                for settled in (False, True):
                    keys, values = before[0].clone(), before[1].clone()
                    torch.cuda.synchronize()
                    given = (heads, keys, values, there, cosine, signed_sine, shape, window, q_norm, k_norm, settled)
                    tiled = settled and shape.num_heads * shape.head_dim % 64 == 0
                    attended = ops.to_rows(_cuda(*given, tiled, warps, splits))
                    results[f"{splits} blocks of {warps} warps, settled {settled}"] = attended.view(
                        rows, -1, shape.head_dim
                    )
        for row, length in enumerate(lengths):
            exact, k, v = exact_attention(
                heads[row], before[0][row], before[1][row], length, angles[length].to(device), shape, q_norm, k_norm
            )
            for how, attended in results.items():
                assert_close(attended[row], exact, roundings=40 if dtype == torch.float32 else 8, what=how)
            assert_close(keys[row, :, length], k, roundings=8)
            assert torch.equal(values[row, :, length].double(), v)
        for now, then in zip((keys, values), before, strict=True):
            untouched = torch.ones(now.shape[0], now.shape[2], dtype=torch.bool)
            untouched[torch.arange(rows), torch.tensor(lengths)] = False
            same = (now == then) | (now.isnan() & then.isnan())
            assert bool(same.transpose(1, 2)[untouched.to(device)].all()), "only the new positions are written"


def takes(shape: ops.AttentionShape, dtype: torch.dtype) -> bool:
    return ops.explain_attention(shape, torch.device("cuda"), dtype) is None


@pytest.mark.gpu
def test_decode_attention_has_a_kernel() -> None:
    """On a GPU with the extension the kernels are what runs, not their references."""
    x = torch.ones(1, 8, device="cuda", dtype=torch.bfloat16)
    assert native.fuses(x) == (native.cuda_reason(x.device) is None)
    assert not native.fuses(x.float()) and not native.fuses(x.clone().requires_grad_())
    assert takes(SHAPES["group 3"], torch.float16) == native.fuses(x)


def test_why_attention_has_no_kernel() -> None:
    shape = SHAPES["a width without a kernel"]
    assert "cpu" in str(ops.explain_attention(shape, torch.device("cpu"), torch.float32))
