"""Windows and soft caps over texts longer than what is attended for at a time, against all scores at once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparsert.ops import AttentionShape, causal_attention


def all_scores(q: Tensor, k: Tensor, v: Tensor, shape: AttentionShape, dtype: torch.dtype = torch.float64) -> Tensor:
    """One matrix of scores a head, all of it in one dtype."""
    group = shape.num_heads // shape.num_kv_heads
    q, k, v = (x.to(dtype).transpose(1, 2) for x in (q, k, v))
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scores = q @ k.transpose(-1, -2) * shape.scale
    if shape.softcap is not None:
        scores = shape.softcap * torch.tanh(scores / shape.softcap)
    position = torch.arange(q.shape[2], device=q.device)
    distance = position[:, None] - position
    hidden = (distance < 0) | (distance >= (shape.sliding_window or q.shape[2]))
    return (scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v).transpose(1, 2)


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("window", [None, 1, 511, 513, 1029, 1030])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (6, 2)])
def test_against_all_scores_at_once(heads: int, kv_heads: int, window: int | None, softcap: float | None) -> None:
    shape = AttentionShape(heads, kv_heads, 10, 10, scale=0.4, sliding_window=window, softcap=softcap)
    q = torch.randn(2, 1030, heads, 10)
    k, v = torch.randn(2, 2, 1030, kv_heads, 10).unbind()
    ours = causal_attention(q, k, v, shape)
    assert ours.shape == q.shape
    torch.testing.assert_close(ours.double(), all_scores(q, k, v, shape), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit(dtype: torch.dtype) -> None:
    shape = AttentionShape(6, 2, 16, 16, scale=0.25, sliding_window=50, softcap=2.0)
    q = torch.randn(1, 600, 6, 16, dtype=dtype)
    k, v = torch.randn(2, 1, 600, 2, 16, dtype=dtype).unbind()
    ours = causal_attention(q, k, v, shape)
    assert ours.dtype == dtype
    torch.testing.assert_close(ours.double(), all_scores(q, k, v, shape), atol=2e-2, rtol=2e-2)
