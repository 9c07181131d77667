"""Texts packed one after the other against each text alone, on every path."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from test_causal_attention import all_scores
from torch import Tensor

from sparsert.ops import AttentionShape, PackedTexts, causal_attention, explain_packed_attention, packed_attention
from sparsert.ops.prompt_attention import _varlen

MODULE = "sparsert.ops.prompt_attention"
CPU, GPU = torch.device("cpu"), torch.device("cuda")

#: (queries, keys) of texts: alone, with earlier tokens, one query, longer than what is attended for at a time.
TEXTS = [(5, 23), (1, 1), (530, 530), (17, 17), (1, 9)]
SHAPES = {
    "plain": AttentionShape(6, 2, 16, 16, scale=0.3),
    "group 1": AttentionShape(4, 4, 8, 8, scale=0.2),
    "window": AttentionShape(6, 2, 16, 16, scale=0.3, sliding_window=11),
    "wide window": AttentionShape(6, 2, 16, 16, scale=0.3, sliding_window=530),
    "soft cap": AttentionShape(6, 1, 16, 16, scale=0.3, softcap=1.5),
}


def draw(shape: AttentionShape, dtype: torch.dtype = torch.float32, device: torch.device = CPU) -> list[Tensor]:
    heads = (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads)
    counts = (sum(queries for queries, _ in TEXTS), *2 * [sum(keys for _, keys in TEXTS)])
    return [torch.randn(n, h, shape.head_dim, dtype=dtype, device=device) for n, h in zip(counts, heads, strict=True)]


def one_by_one(q: Tensor, k: Tensor, v: Tensor, shape: AttentionShape, dtype: torch.dtype = torch.float64) -> Tensor:
    """All scores of each text, of which the last queries count."""
    results, query, key = [], 0, 0
    for queries, keys in TEXTS:
        earlier = torch.zeros(keys - queries, *q.shape[1:], dtype=q.dtype, device=q.device)
        everything = torch.cat([earlier, q[query : query + queries]]).unsqueeze(0)
        text = (x[key : key + keys].unsqueeze(0) for x in (k, v))
        results.append(all_scores(everything, *text, shape, dtype)[0, keys - queries :])
        query, key = query + queries, key + keys
    return torch.cat(results)


@pytest.mark.parametrize("name", SHAPES)
def test_against_all_scores_at_once(name: str) -> None:
    shape = SHAPES[name]
    q, k, v = draw(shape)
    ours = packed_attention(q, k, v, PackedTexts.of(TEXTS, CPU), shape)
    assert ours.shape == q.shape
    torch.testing.assert_close(ours.double(), one_by_one(q, k, v, shape), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", SHAPES)
def test_queries_are_the_last_tokens(name: str) -> None:
    shape = SHAPES[name]
    q = torch.randn(2, 600, shape.num_heads, shape.head_dim)
    k, v = torch.randn(2, 2, 600, shape.num_kv_heads, shape.head_dim).unbind()
    ours = causal_attention(q[:, 41:], k, v, shape)
    torch.testing.assert_close(ours.double(), all_scores(q, k, v, shape)[:, 41:], atol=1e-5, rtol=1e-5)


def varlen_211(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    return_aux: object = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
) -> Tensor:
    """torch 2.11's ``varlen_attn`` by its documentation, in float64, where it refuses what the kernel cannot take."""
    assert query.dtype == key.dtype == value.dtype == torch.bfloat16 and return_aux is None
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert cu_seq_q.diff().max() == max_q and cu_seq_k.diff().max() == max_k
    assert all(x.stride(-1) == 1 and x.stride(-2) % 8 == 0 for x in (query, key, value))
    assert window_size == (-1, 0) and scale is not None
    results = []
    for (a, b), (c, d) in zip(cu_seq_q.unfold(0, 2, 1).tolist(), cu_seq_k.unfold(0, 2, 1).tolist(), strict=True):
        group = query.shape[1] // key.shape[1]
        q = query[a:b].double().transpose(0, 1)
        k, v = (x[c:d].double().transpose(0, 1).repeat_interleave(group, dim=0) for x in (key, value))
        hidden = torch.ones(b - a, d - c, dtype=torch.bool).triu(1 + (d - c) - (b - a))
        scores = (q @ k.transpose(1, 2) * scale).masked_fill(hidden, -torch.inf)
        results.append((scores.softmax(-1) @ v).transpose(0, 1))
    return torch.cat(results).to(query.dtype)


def varlen_213(*arguments: Tensor, enable_gqa: bool = False, **options: object) -> Tensor:
    """torch 2.13 asks for a promise before it takes fewer key than query heads."""
    assert enable_gqa or arguments[0].shape[1] == arguments[1].shape[1]
    return varlen_211(*arguments, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("version", ["2.11", "2.13"])
@pytest.mark.parametrize("name", ["plain", "group 1", "wide window"])
def test_all_texts_are_one_launch(name: str, version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Callable[..., Tensor]] = []

    def count(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def counted(*arguments: Tensor, **options: object) -> Tensor:
            calls.append(function)
            return function(*arguments, **options)

        return counted

    function = varlen_211 if version == "2.11" else functools.partial(varlen_213, enable_gqa=True)
    monkeypatch.setattr(f"{MODULE}._varlen", lambda: count(function))
    monkeypatch.setattr(f"{MODULE}.explain_packed_attention", lambda *_: None)
    shape = SHAPES[name]
    q, k, v = draw(shape, torch.bfloat16)
    v = v.permute(2, 1, 0).contiguous().permute(2, 1, 0)  # as a layer leaves it that computes W x^T
    ours = packed_attention(q, k, v, PackedTexts.of(TEXTS, CPU), shape)
    torch.testing.assert_close(ours.double(), one_by_one(q, k, v, shape), atol=1e-2, rtol=1e-2)
    assert len(calls) == 1


def test_a_window_shorter_than_a_text_is_attended_for_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{MODULE}._varlen", lambda: pytest.fail("no window is given to it"))
    monkeypatch.setattr(f"{MODULE}.explain_packed_attention", lambda *_: None)
    q, k, v = draw(SHAPES["window"])
    ours = packed_attention(q, k, v, PackedTexts.of(TEXTS, CPU), SHAPES["window"])
    torch.testing.assert_close(ours.double(), one_by_one(q, k, v, SHAPES["window"]), atol=1e-5, rtol=1e-5)


def test_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = SHAPES["plain"]
    assert explain_packed_attention(plain, CPU, torch.bfloat16) == "there is no packed attention for cpu"
    assert "not in torch.float32" in (explain_packed_attention(plain, GPU, torch.float32) or "")
    assert explain_packed_attention(SHAPES["soft cap"], GPU, torch.float16) == "flash attention has no soft cap"
    for head_dim in (12, 264):
        odd = AttentionShape(2, 2, head_dim, head_dim, 0.1)
        assert f"values, not {head_dim}" in (explain_packed_attention(odd, GPU, torch.float16) or "")
    monkeypatch.setattr(f"{MODULE}._has_flash", lambda device: False)
    assert "compute capability 8.0" in (explain_packed_attention(plain, GPU, torch.float16) or "")
    monkeypatch.setattr(f"{MODULE}._has_flash", lambda device: True)
    assert explain_packed_attention(plain, GPU, torch.float16) is None
    monkeypatch.setattr(f"{MODULE}._varlen", lambda: None)
    assert "has no varlen_attn" in (explain_packed_attention(plain, GPU, torch.float16) or "")


def test_this_torch_has_what_is_asked_of_it() -> None:
    """Kept by name: a later torch that renames a parameter would send all prompts text by text."""
    assert _varlen() is not None


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [*SHAPES, "head 128", "head 256"])
def test_error_is_at_most_twice_that_of_plain_torch(name: str, dtype: torch.dtype) -> None:
    wide = {f"head {width}": AttentionShape(8, 2, width, width, width**-0.5) for width in (128, 256)}
    shape = (SHAPES | wide)[name]
    assert (explain_packed_attention(shape, GPU, dtype) is None) is (shape.softcap is None)
    q, k, v = draw(shape, dtype, GPU)
    v = torch.cat([k, v], dim=1)[:, shape.num_kv_heads :]  # as in a joint projection: tokens do not adjoin
    exact = one_by_one(q, k, v, shape)
    ours = packed_attention(q, k, v, PackedTexts.of(TEXTS, GPU), shape)
    error, allowed = ((x.double() - exact).abs().max() for x in (ours, one_by_one(q, k, v, shape, dtype)))
    assert 0 < error <= 2 * allowed


@pytest.mark.gpu
def test_cudnn_is_left_out_and_the_setting_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    real, allowed = torch.nn.functional.scaled_dot_product_attention, []

    def spy(*arguments: Tensor, **options: object) -> Tensor:
        allowed.append(torch.backends.cuda.cudnn_sdp_enabled())
        return real(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    for shape in (SHAPES["plain"], SHAPES["window"]):
        q = torch.randn(2, 70, shape.num_heads, shape.head_dim, dtype=torch.bfloat16, device=GPU)
        k, v = torch.randn(2, 2, 70, shape.num_kv_heads, shape.head_dim, dtype=torch.bfloat16, device=GPU).unbind()
        causal_attention(q, k, v, shape)
    assert allowed == [False, False] and torch.backends.cuda.cudnn_sdp_enabled() == before
