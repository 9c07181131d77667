"""Attention of several new tokens a row over the cache, against attention over everything and one token at a time."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from test_kv_cache import CPU, make_config, make_layer
from torch import Tensor

from sparsert.engine.cache import DecodeAttention, ExtendAttention, KVCache
from sparsert.models.attention import SelfAttention


def make_turning_layer(heads: int, kv_heads: int, head_dim: int, **shape: object) -> SelfAttention:
    """An attention layer with random angles at each position."""
    layer = make_layer(make_config(heads, kv_heads, head_dim))
    layer.shape = dataclasses.replace(layer.shape, **shape)  # type: ignore[arg-type]
    angles = torch.rand(64, layer.shape.rotary_dim // 2) * 6
    layer.rotary.cosine = torch.cat([angles.cos(), angles.cos()], dim=1)
    layer.rotary.signed_sine = torch.cat([-angles.sin(), angles.sin()], dim=1)
    return layer


def expected(layer: SelfAttention, heads: Tensor, row: int, position: int) -> Tensor:
    """What the token at a position sees of its row, written out: ``[num_heads, head_dim]``."""
    shape = layer.shape
    q, k, v = (x[row].transpose(0, 1) for x in layer.split(heads))  # [heads, tokens, head_dim]
    group = shape.num_heads // shape.num_kv_heads
    begin = 0 if shape.sliding_window is None else max(0, position + 1 - shape.sliding_window)
    keys, values = (x[:, begin : position + 1].repeat_interleave(group, dim=0) for x in (k, v))
    scores = (q[:, position].unsqueeze(1) * keys).sum(-1) * shape.scale
    if shape.softcap is not None:
        scores = shape.softcap * torch.tanh(scores / shape.softcap)
    return (scores.softmax(-1).unsqueeze(-1) * values).sum(1)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (9, 3), (8, 1)])
@pytest.mark.parametrize(
    "shape",
    [{}, {"sliding_window": 5}, {"softcap": 2.0, "scale": 0.3}, {"softcap": 3.0, "sliding_window": 3, "rotary_dim": 8}],
    ids=["plain", "window", "softcap", "all"],
)
def test_equals_attention_over_everything(heads: int, kv_heads: int, shape: dict[str, object]) -> None:
    head_dim, count, window = 16, 5, 32
    layer = make_turning_layer(heads, kv_heads, head_dim, **shape)
    cache = KVCache([layer.shape] * 2, batch_size=4, length=40, device=CPU, dtype=torch.float32)
    for buffer in (*cache.keys, *cache.values):
        buffer.fill_(1e4)  # whatever lies behind the real keys must not be seen
    lengths = torch.tensor([7, 0, 12])
    everything = torch.randn(3, 20, heads + 2 * kv_heads, head_dim)
    _, k, v = layer.split(everything)
    for row, length in enumerate(lengths.tolist()):
        cache.keys[1][row, :, :length] = k[row, :length].transpose(0, 1)
        cache.values[1][row, :, :length] = v[row, :length].transpose(0, 1)
    new = torch.stack([everything[row, length : length + count] for row, length in enumerate(lengths.tolist())])
    attended = ExtendAttention(cache, lengths, window)(1, new, layer)
    assert attended.shape == (3, count, heads, head_dim)
    for row, length in enumerate(lengths.tolist()):
        for place in range(count):
            torch.testing.assert_close(attended[row, place], expected(layer, everything, row, length + place))
        torch.testing.assert_close(cache.keys[1][row, :, : length + count], k[row, : length + count].transpose(0, 1))
        assert bool((cache.keys[1][row, :, length + count :] == 1e4).all()), "nothing is written behind the new tokens"
    assert bool((cache.keys[0] == 1e4).all()) and bool((cache.values[1][3] == 1e4).all())


@pytest.mark.parametrize("sliding_window", [None, 4])
def test_equals_as_many_decode_steps(sliding_window: int | None) -> None:
    layer = make_turning_layer(6, 3, 8, sliding_window=sliding_window)
    caches = [KVCache([layer.shape], 2, 32, CPU, torch.float32) for _ in range(2)]
    filled = torch.randn(2, 3, 32, 8)
    for cache in caches:
        cache.keys[0].copy_(filled)
        cache.values[0].copy_(filled.flip(2))
    lengths, new = torch.tensor([11, 3]), torch.randn(2, 7, 12, 8)
    together = ExtendAttention(caches[0], lengths, 32)(0, new, layer)
    for step in range(7):
        alone = DecodeAttention(caches[1], lengths + step, 32)(0, new[:, step : step + 1], layer)
        torch.testing.assert_close(together[:, step : step + 1], alone)
    torch.testing.assert_close(caches[0].keys[0], caches[1].keys[0])
    torch.testing.assert_close(caches[0].values[0], caches[1].values[0])
