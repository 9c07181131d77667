"""The KV cache: one static buffer for the keys and one for the values of every attention layer.

    keys[slot], values[slot]   [batch, kv_heads, length, head_dim]

A slot is one attention layer that runs; skipped ones have none, and layers may differ in shape. All rows
have the same room, so a CUDA graph can be captured over the buffers once and replayed for the life of the
cache; a decode step reads only the first ``window`` positions of it. What it gives up against pages: memory
for the longest row is held for every row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from sparsert import ops
from sparsert.engine.prompt_chunks import PromptChunk
from sparsert.errors import InputError
from sparsert.models.attention import SelfAttention
from sparsert.models.linears import takes_tiles
from sparsert.models.rope import RotaryEmbedding
from sparsert.ops import AttentionShape


def kv_bytes_per_token(shapes: Iterable[AttentionShape], dtype: torch.dtype) -> int:
    """Bytes of keys and values that one token of one text takes in attention layers of these shapes."""
    return 2 * dtype.itemsize * sum(shape.num_kv_heads * shape.head_dim for shape in shapes)


class KVCache:
    """Keys and values of past tokens.

    Attributes:
        keys, values: by slot, ``[batch, kv_heads, length, head_dim]`` each.
        batch_size: rows.
        length: positions a row has room for.
    """

    def __init__(
        self,
        shapes: Sequence[AttentionShape],
        batch_size: int,
        length: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """Allocate the cache.

        Args:
            shapes: of the attention layers, by slot (``DecoderModel.attention_shapes``).

        Raises:
            InputError: the device has no room for it.
        """

        def zeros(shape: AttentionShape) -> Tensor:
            # zeros, because attention multiplies masked positions by 0 and 0 x NaN is NaN
            return torch.zeros((batch_size, shape.num_kv_heads, length, shape.head_dim), device=device, dtype=dtype)

        try:
            self.keys = [zeros(shape) for shape in shapes]
            self.values = [zeros(shape) for shape in shapes]
        except torch.OutOfMemoryError:
            needed = kv_bytes_per_token(shapes, dtype) * batch_size * length
            raise InputError(
                f"no room on {device} for a KV cache of {needed / 1e9:.2f} GB ({batch_size} texts of {length} tokens); "
                f"give fewer prompts at once, fewer new tokens, or a smaller max_length"
            ) from None
        self.batch_size = batch_size
        self.length = length

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(buffer.nbytes for buffer in (*self.keys, *self.values))


class PackedPrefillAttention:
    """Causal attention of one chunk of packed prompts, which also writes their keys and values.

    Whatever depends on lengths was computed once for the chunk; a layer's work on the host is the same for one text
    and for sixteen, and nothing waits for the device.
    """

    def __init__(self, cache: KVCache, chunk: PromptChunk) -> None:
        """Prepare one chunk.

        Args:
            chunk: the chunks before it have been run.
        """
        self._cache = cache
        self._chunk = chunk
        self._tables: dict[RotaryEmbedding, tuple[Tensor, Tensor]] = {}

    def __call__(self, slot: int, heads: Tensor, layer: SelfAttention) -> Tensor:
        """See :class:`sparsert.models.attention.Attention`; there is one text of all tokens of the chunk."""
        chunk = self._chunk
        keys, values = self._cache.keys[slot], self._cache.values[slot]
        q, k, v = ops.keep_heads(
            heads[0], keys, values, chunk.rows, chunk.positions, *self._rotation(layer.rotary), layer.shape,
            layer.q_norm, layer.k_norm,
        )  # fmt: skip
        if chunk.past:
            k = torch.cat([keys[chunk.first_row, :, : chunk.past].transpose(0, 1), k])
            v = torch.cat([values[chunk.first_row, :, : chunk.past].transpose(0, 1), v])
        return ops.packed_attention(q, k, v, chunk.texts, layer.shape).unsqueeze(0)

    def _rotation(self, rotary: RotaryEmbedding) -> tuple[Tensor, Tensor]:
        """Cosines and signed sines of the chunk's positions, ``[tokens, 1, rotary_dim]``; found once for all layers."""
        if rotary not in self._tables:
            cosine, signed_sine = rotary(self._chunk.positions.unsqueeze(0))
            self._tables[rotary] = cosine[0], signed_sine[0]
        return self._tables[rotary]


class DecodeAttention:
    """Attention of one new token per row over the first ``window`` positions of the cache."""

    def __init__(self, cache: KVCache, lengths: Tensor, window: int) -> None:
        """Prepare one step.

        Args:
            lengths: int64 ``[batch]``, tokens in the cache before this step; the new token goes there.
            window: positions that are read; more than any length that matters.
        """
        self._cache = cache
        self._lengths = lengths
        self._window = window

    def __call__(self, slot: int, heads: Tensor, layer: SelfAttention) -> Tensor | ops.Tiled:
        """See :class:`sparsert.models.attention.Attention`."""
        rotary = layer.rotary
        attended = ops.decode_attention(
            heads.squeeze(1), self._cache.keys[slot], self._cache.values[slot], self._lengths, rotary.cosine,
            rotary.signed_sine, layer.shape, self._window, layer.q_norm, layer.k_norm, settled=True,
            tiled=takes_tiles(layer.o_proj, heads.flatten(-2)),
        )  # fmt: skip
        if isinstance(attended, ops.Tiled):  # with a dimension of one token, as everywhere in the model
            return dataclasses.replace(attended, shape=torch.Size((attended.shape[0], 1, attended.shape[1])))
        return attended.unsqueeze(1)


class ExtendAttention:
    """Attention of several new tokens per row over the cache and each other: the check of drafted tokens.

    Written out in torch, which serves a CPU and a GPU alike; no shape depends on a length, so it can be captured.
    """

    def __init__(self, cache: KVCache, lengths: Tensor, window: int) -> None:
        """Prepare one step.

        Args:
            lengths: int64 ``[batch]``, tokens in the cache before this step; the new ones go behind them, and a row
                must have room for all of them.
            window: positions that are read; at least the new length of any row that matters.
        """
        self._cache = cache
        self._lengths = lengths
        self._window = window

    def __call__(self, slot: int, heads: Tensor, layer: SelfAttention) -> Tensor:
        """See :class:`sparsert.models.attention.Attention`."""
        shape, keys, values = layer.shape, self._cache.keys[slot], self._cache.values[slot]
        batch, count = heads.shape[:2]
        kv_heads, head_dim, window = shape.num_kv_heads, shape.head_dim, self._window
        positions = self._lengths.unsqueeze(1) + torch.arange(count, device=heads.device)
        q, k, v = layer.split(heads, positions)
        # one row of the cache for each text, token and head
        first = torch.arange(batch * kv_heads, device=heads.device).view(batch, 1, kv_heads) * keys.shape[2]
        rows = (first + positions.unsqueeze(2)).flatten()
        keys.view(-1, head_dim).index_copy_(0, rows, k.reshape(-1, head_dim))
        values.view(-1, head_dim).index_copy_(0, rows, v.reshape(-1, head_dim))
        past = torch.arange(window, device=heads.device)
        visible = past <= positions.unsqueeze(2)
        if shape.sliding_window is not None:
            visible &= past > positions.unsqueeze(2) - shape.sliding_window
        past_keys, past_values = keys[:batch, :, :window], values[:batch, :, :window]
        return ops.masked_attention(q, past_keys, past_values, visible, shape)
