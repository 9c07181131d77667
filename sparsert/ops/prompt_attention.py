"""Causal attention of prompts: among equally long texts, and among texts of any lengths packed without padding.

    queries   |aaaaaaa|b|ccc|            one text after the other
    keys      |aaaaaaa|b|CCCCCccc|       a text may have more keys than queries: its tokens in the cache (C)

The queries of a text are always its last tokens, so the causal triangle is aligned with the lower right corner of a
text's scores. On a GPU all texts of a packed call are one launch of flash attention (``varlen_attn`` of PyTorch),
which takes the lengths as data: nothing is compiled, planned or kept for a length, and the host's work does not
grow with the number of texts. Where that does not apply (:func:`explain_packed_attention`; a sliding window
shorter than a text), texts are attended for one by one, which costs the host some launches a text; windows and
soft caps a few hundred queries at a time, so that memory grows with that number and not with the text.

This and :mod:`sparsert.ops.sdpa` are the only places that choose a kernel for attention but the decode kernel.

Source: Dao, "FlashAttention-2" (2023); Beltagy et al., "Longformer" (2020) for the window; Gemma Team, "Gemma 2"
(2024) for the soft cap.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sparsert.ops.attention import AttentionShape, masked_attention
from sparsert.ops.sdpa import scaled_dot_product

#: Queries that are attended for at a time where a window, a soft cap or earlier tokens need a mask in memory.
_QUERY_CHUNK = 512

#: Widest head that flash attention takes.
_WIDEST_HEAD = 256


@dataclasses.dataclass(frozen=True)
class PackedTexts:
    """Where each of several texts lies in packed queries and keys.

    Attributes:
        query_starts, key_starts: int32 ``[texts + 1]`` on the device: sums of the lengths before each text, and of all.
        longest_query, longest_key: what no text's length exceeds; a launch is made for these.
        query_lengths: tokens of each text that attend.
        key_lengths: tokens of each text up to its last query, at least as many. Both None where only the device knows
            them, as in a CUDA graph, which must not depend on them.
    """

    query_starts: Tensor
    key_starts: Tensor
    longest_query: int
    longest_key: int
    query_lengths: tuple[int, ...] | None = None
    key_lengths: tuple[int, ...] | None = None

    @classmethod
    def of(cls, lengths: Sequence[tuple[int, int]], device: torch.device) -> PackedTexts:
        """Describe texts by their (queries, keys)."""
        queries, keys = zip(*lengths, strict=True)
        starts = [list(itertools.accumulate(counts, initial=0)) for counts in (queries, keys)]
        on_device = torch.tensor(starts, dtype=torch.int32).to(device)
        return cls(on_device[0], on_device[1], max(queries), max(keys), queries, keys)

    def lengths(self) -> tuple[Sequence[int], Sequence[int]]:
        """Lengths of queries and of keys; read back, which waits for the device, where the host does not know them."""
        if self.query_lengths is not None and self.key_lengths is not None:
            return self.query_lengths, self.key_lengths
        return self.query_starts.diff().tolist(), self.key_starts.diff().tolist()


def causal_attention(q: Tensor, k: Tensor, v: Tensor, shape: AttentionShape) -> Tensor:
    """Causal attention of equally long texts.

    Args:
        q: ``[batch, queries, num_heads, head_dim]``, rotated: the last tokens of each text.
        k, v: ``[batch, keys, num_kv_heads, head_dim]``, keys >= queries: all tokens of each text.
        shape: scale, sliding window and soft cap.

    Returns:
        ``[batch, queries, num_heads, head_dim]``.
    """
    queries, tokens, window = q.shape[1], k.shape[1], shape.sliding_window
    earlier = tokens - queries
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    if shape.softcap is None and earlier == 0 and (window is None or window >= tokens):
        return scaled_dot_product(q.transpose(1, 2), k, v, scale=shape.scale, causal=True).transpose(1, 2)
    # some queries at a time, and the keys that any of them sees: memory grows with the chunk, work with the window
    pieces = []
    for begin in range(0, queries, _QUERY_CHUNK):
        end = min(begin + _QUERY_CHUNK, queries)
        first = 0 if window is None else max(0, earlier + begin - window + 1)
        last = earlier + end
        distance = torch.arange(earlier + begin, last, device=q.device)[:, None]
        distance = distance - torch.arange(first, last, device=q.device)
        visible = distance >= 0
        if window is not None:
            visible &= distance < window
        keys, values = k[:, :, first:last], v[:, :, first:last]
        pieces.append(masked_attention(q[:, begin:end], keys, values, visible.unsqueeze(0), shape))
    return torch.cat(pieces, dim=1)


def packed_attention(q: Tensor, k: Tensor, v: Tensor, texts: PackedTexts, shape: AttentionShape) -> Tensor:
    """Causal attention within each of several texts that lie one after the other.

    Args:
        q: ``[all queries, num_heads, head_dim]``, rotated.
        k, v: ``[all keys, num_kv_heads, head_dim]``.
        texts: which of them belong together; some may be empty, not all.
        shape: scale, sliding window and soft cap.

    Returns:
        ``[all queries, num_heads, head_dim]``.
    """
    sees_all = shape.sliding_window is None or shape.sliding_window >= texts.longest_key
    if sees_all and explain_packed_attention(shape, q.device, q.dtype) is None:
        varlen = _varlen()
        assert varlen is not None
        # flash attention reads heads value by value; a dense layer of another kind may leave its output transposed
        q, k, v = (part if part.stride(-1) == 1 else part.contiguous() for part in (q, k, v))
        attended: Tensor = varlen(
            q, k, v, texts.query_starts, texts.key_starts, texts.longest_query, texts.longest_key, scale=shape.scale,
            window_size=(-1, 0),
        )  # fmt: skip
        return attended
    query_lengths, key_lengths = texts.lengths()
    parts = zip(q.split(query_lengths), k.split(key_lengths), v.split(key_lengths), strict=True)
    attended_parts = [
        causal_attention(queries.unsqueeze(0), keys.unsqueeze(0), values.unsqueeze(0), shape).squeeze(0)
        for queries, keys, values in parts
        if queries.shape[0] > 0
    ]
    return torch.cat(attended_parts)


def explain_packed_attention(shape: AttentionShape, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why packed texts are attended for one by one; None where all are one launch.

    A sliding window is no reason here: it is one only for texts that are longer.
    """
    if device.type != "cuda":
        return f"there is no packed attention for {device.type}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"flash attention computes in bfloat16 and float16, not in {dtype}"
    if shape.softcap is not None:
        return "flash attention has no soft cap"
    if shape.head_dim > _WIDEST_HEAD or shape.head_dim % 8:
        return f"flash attention takes heads of 8, 16, ... {_WIDEST_HEAD} values, not {shape.head_dim}"
    if _varlen() is None:
        return f"torch {torch.__version__} has no varlen_attn with a scale and a window; torch 2.11 has"
    if not _has_flash(device):
        return "this GPU, or this build of torch, has no flash attention; it takes compute capability 8.0"
    return None


@functools.cache
def _varlen() -> Callable[..., Any] | None:
    """``varlen_attn`` as of torch 2.11, or None; imported late, because that can take more than a second."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    parameters = inspect.signature(varlen_attn).parameters
    if not {"scale", "window_size"} <= parameters.keys():
        return None
    # the kernel always took fewer key than query heads; later versions want to be told that they are meant
    return functools.partial(varlen_attn, enable_gqa=True) if "enable_gqa" in parameters else varlen_attn


@functools.cache
def _has_flash(device: torch.device) -> bool:
    return torch.backends.cuda.is_flash_attention_available() and torch.cuda.get_device_capability(device) >= (8, 0)
