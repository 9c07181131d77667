"""KV cache and the two attentions over it."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from padded_prefill import PaddedPrefillAttention
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

from sparsert.engine.cache import (
    DecodeAttention,
    KVCache,
    PackedPrefillAttention,
    kv_bytes_per_token,
)
from sparsert.engine.prompt_chunks import cut_prompts
from sparsert.models import DecoderConfig
from sparsert.models.attention import SelfAttention
from sparsert.models.rope import RotaryEmbedding

CPU = torch.device("cpu")


def make_config(heads: int, kv_heads: int, head_dim: int) -> DecoderConfig:
    return DecoderConfig.from_hf(
        {
            "architectures": ["LlamaForCausalLM"],
            "hidden_size": 64,
            "num_hidden_layers": 5,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": head_dim,
            "intermediate_size": 8,
            "vocab_size": 9,
        }
    )


def make_layer(config: DecoderConfig) -> SelfAttention:
    """An attention layer whose tables turn nothing: positions play no part in what is tested here."""
    attention = config.blocks[0].attention
    assert attention is not None
    rotary = RotaryEmbedding(attention.rope, attention.shape.rotary_dim)
    rotary.reserve_(64, CPU, torch.float32)
    rotary.cosine.fill_(1)
    rotary.signed_sine.fill_(0)
    return SelfAttention(attention, config.block_linears(0), rotary)


def test_only_kept_blocks_take_memory() -> None:
    config = make_config(6, 2, 24)
    shape = make_layer(config).shape
    cache = KVCache([shape] * 3, batch_size=4, length=32, device=CPU, dtype=torch.bfloat16)
    assert [keys.shape for keys in cache.keys] == [values.shape for values in cache.values] == [(4, 2, 32, 24)] * 3
    assert kv_bytes_per_token([shape] * 3, torch.bfloat16) == 2 * 3 * 2 * 24 * 2
    assert cache.nbytes == 4 * 32 * kv_bytes_per_token([shape] * 3, torch.bfloat16)


class _CountOperations(TorchDispatchMode):
    """Counts what torch dispatches."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[str(function)] += 1
        return function(*args, **(kwargs or {}))


def test_a_layer_of_a_prefill_costs_the_host_the_same_for_any_number_of_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """And reads nothing back, where all texts are one launch."""
    monkeypatch.setattr("sparsert.ops.prompt_attention._varlen", lambda: lambda q, *_, **__: torch.empty_like(q))
    monkeypatch.setattr("sparsert.ops.prompt_attention.explain_packed_attention", lambda *_: None)
    layer = make_layer(make_config(6, 2, 16))
    cache = KVCache([layer.shape] * 2, batch_size=16, length=64, device=CPU, dtype=torch.float32)
    counts = []
    for lengths in ([48], [3] * 16):
        (chunk,) = cut_prompts([[1] * length for length in lengths], 100, CPU)
        attention = PackedPrefillAttention(cache, chunk)
        heads = torch.randn(1, 48, 10, 16)
        attention(0, heads, layer)  # the first layer finds the rotation of the chunk's positions
        with torch.inference_mode(), _CountOperations() as counted:
            attention(1, heads, layer)
        counts.append(counted.counts)
    assert counts[0] == counts[1] and counts[0].total() <= 20
    assert not any("_local_scalar_dense" in name or "nonzero" in name for name in counts[0])


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (9, 3), (8, 2), (12, 2)])
def test_prefill_then_decode_equals_attention_over_everything(heads: int, kv_heads: int) -> None:
    head_dim, lengths, steps, slot = 16, [7, 1, 12], 4, 1
    layer = make_layer(make_config(heads, kv_heads, head_dim))
    cache = KVCache([layer.shape] * 2, batch_size=4, length=32, device=CPU, dtype=torch.float32)
    for buffer in (*cache.keys, *cache.values):
        buffer.fill_(1e4)  # whatever lies behind the real keys must not be seen
    torch.manual_seed(0)
    rows, total = len(lengths), max(lengths) + steps
    q = torch.randn(rows, total, heads, head_dim)
    k, v = torch.randn(2, rows, total, kv_heads, head_dim).unbind()

    def expected(row: int, upto: int) -> torch.Tensor:
        """The last query of a row against all its keys, without a cache."""
        last = q[row, upto - 1].unsqueeze(1)  # [heads, 1, head_dim]
        keys, values = (x[row, :upto].transpose(0, 1).repeat_interleave(heads // kv_heads, dim=0) for x in (k, v))
        return scaled_dot_product_attention(last, keys, values).squeeze(1)

    # right-padded prompts: what stands behind a row's length is a pad
    longest = max(lengths)
    prefilled = PaddedPrefillAttention(cache)(slot, torch.cat([q, k, v], dim=2)[:, :longest], layer)
    for row, length in enumerate(lengths):
        torch.testing.assert_close(prefilled[row, length - 1], expected(row, length))

    now = torch.tensor(lengths)
    for _ in range(steps):
        attention = DecodeAttention(cache, now, window=24)
        attended = attention(slot, torch.cat([q, k, v], dim=2)[torch.arange(rows), now].unsqueeze(1), layer)
        now = now + 1
        for row in range(rows):
            torch.testing.assert_close(attended[row, 0], expected(row, int(now[row])))
    assert bool((cache.keys[0] == 1e4).all()), "other layers are left alone"
    assert bool((cache.keys[1][3] == 1e4).all()), "rows beyond the batch are left alone"
