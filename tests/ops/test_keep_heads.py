"""Heads of prompts: normed, rotated and kept, against the parts written out in float64."""

from __future__ import annotations

import pytest
import torch

from sparsert import ops
from sparsert.ops import AttentionShape

SHAPES = {
    "llama": (8, 2, 128, 128, None),
    "smollm": (9, 3, 64, 64, None),
    "partial rotary": (6, 6, 96, 48, None),
    "normed": (4, 1, 256, 256, torch.bfloat16),
    "normed in float": (5, 5, 32, 32, torch.float32),
    "a width without a kernel": (3, 1, 20, 12, None),
}


def exact(heads: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor, norm: torch.Tensor | None) -> torch.Tensor:
    x = heads.double()
    if norm is not None:
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * norm.double()
    width = cosine.shape[-1]
    turned, half = x[..., :width], width // 2
    swapped = torch.cat([turned[..., half:], turned[..., :half]], -1)
    return torch.cat([turned * cosine.double() + swapped * sine.double(), x[..., width:]], -1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_heads_are_turned_and_kept(device: str, name: str, dtype: torch.dtype) -> None:
    queries, groups, width, rotary, norm_dtype = SHAPES[name]
    shape, tokens, length = AttentionShape(queries, groups, width, rotary, 1.0), 37, 50
    draw = torch.Generator().manual_seed(0)

    def random(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, generator=draw).to(device, dtype)

    heads, cosine, sine = (
        random(tokens, queries + 2 * groups, width),
        random(tokens, 1, rotary),
        random(tokens, 1, rotary),
    )
    norms = [None, None]
    if norm_dtype is not None:
        norms = [
            torch.randn(width, generator=draw).to(device, dtype if norm_dtype != torch.float32 else norm_dtype)
            for _ in "qk"
        ]
    # three texts in rows 2, 0 and 1 of the cache, the last goes on from position 9
    rows = torch.tensor([2] * 12 + [0] * 5 + [1] * 20, device=device)
    positions = torch.cat([torch.arange(12), torch.arange(5), torch.arange(9, 29)]).to(device)
    keys, values = (torch.full((3, groups, length, width), 7.0, device=device, dtype=dtype) for _ in "kv")
    given = heads.clone()
    q, k, v = ops.keep_heads(heads, keys, values, rows, positions, cosine, sine, shape, *norms)

    tolerance = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    right_q, right_k, right_v = given.split([queries, groups, groups], 1)
    for found, right in (
        (q, exact(right_q, cosine, sine, norms[0])), (k, exact(right_k, cosine, sine, norms[1])), (v, right_v.double())
    ):  # fmt: skip
        assert found.shape == right.shape
        torch.testing.assert_close(found.double(), right, rtol=tolerance, atol=tolerance * float(right.abs().max()) / 4)
    assert torch.equal(keys[rows, :, positions], k) and torch.equal(values[rows, :, positions], v)
    untouched = torch.ones(3, length, dtype=torch.bool)
    untouched[rows.cpu(), positions.cpu()] = False
    for cache in (keys, values):
        assert bool((cache.transpose(1, 2)[untouched.to(device)] == 7).all())
