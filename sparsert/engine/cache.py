"""The KV cache: one static buffer for the keys and one for the values of every block that runs.

    keys, values   [blocks, batch, kv_heads, length, head_dim]

Skipped blocks have no slot. All rows have the same room, so a CUDA graph can be captured over the
buffers once and replayed for the life of the cache; a decode step reads only the first ``window``
positions of it. What it gives up against pages: memory for the longest row is held for every row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsert.errors import InputError
from sparsert.models.config import DecoderConfig


def kv_bytes_per_token(config: DecoderConfig, num_blocks: int, dtype: torch.dtype) -> int:
    """Bytes of keys and values that one token of one text takes in ``num_blocks`` blocks."""
    return 2 * num_blocks * config.num_kv_heads * config.head_dim * dtype.itemsize


class KVCache:
    """Keys and values of past tokens.

    Attributes:
        keys, values: ``[blocks, batch, kv_heads, length, head_dim]``.
        batch_size: rows.
        length: positions a row has room for.
    """

    def __init__(
        self,
        config: DecoderConfig,
        num_blocks: int,
        batch_size: int,
        length: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """Allocate the cache.

        Args:
            num_blocks: blocks that run.

        Raises:
            InputError: the device has no room for it.
        """
        shape = (num_blocks, batch_size, config.num_kv_heads, length, config.head_dim)
        try:
            # zeros, because attention multiplies masked positions by 0 and 0 x NaN is NaN
            self.keys = torch.zeros(shape, device=device, dtype=dtype)
            self.values = torch.zeros(shape, device=device, dtype=dtype)
        except torch.OutOfMemoryError:
            needed = kv_bytes_per_token(config, num_blocks, dtype) * batch_size * length
            raise InputError(
                f"no room on {device} for a KV cache of {needed / 1e9:.2f} GB ({batch_size} texts of {length} tokens); "
                f"give fewer prompts at once, fewer new tokens, or a smaller max_length"
            ) from None
        self.batch_size = batch_size
        self.length = length

    @property
    def nbytes(self) -> int:
        """Bytes of both buffers."""
        return self.keys.nbytes + self.values.nbytes


class PrefillAttention:
    """Plain causal attention over the prompts, which also writes their keys and values.

    Prompts are padded on the right: no real token sees a pad, because pads come later. Keys of pads land
    in the cache behind the real ones, where decoding overwrites them before it looks at them.
    """

    def __init__(self, cache: KVCache) -> None:
        self._cache = cache

    def __call__(self, block: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See :class:`sparsert.models.decoder.Attention`."""
        batch, tokens = q.shape[:2]
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        self._cache.keys[block, :batch, :, :tokens].copy_(k)
        self._cache.values[block, :batch, :, :tokens].copy_(v)
        attended = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]
        )
        return attended.transpose(1, 2)


class DecodeAttention:
    """Attention of one new token per row over the first ``window`` positions of the cache.

    The query heads that share a key/value head are laid out as if they were so many tokens of one head:
    ``q: [batch, kv_heads, group, head_dim]`` against ``k, v: [batch, kv_heads, window, head_dim]``. No key
    is repeated, and every group size works. Rows, mask and views follow from the lengths by tensor
    operations alone, so the whole step can be captured in a CUDA graph.
    """

    def __init__(self, cache: KVCache, lengths: Tensor, window: int) -> None:
        """Prepare one step.

        Args:
            lengths: int64 ``[batch]``, tokens in the cache before this step; the new token goes there.
            window: positions that are read; more than any length that matters.
        """
        self._cache = cache
        self._window = window
        batch, kv_heads = lengths.shape[0], cache.keys.shape[2]
        first_rows = torch.arange(batch * kv_heads, device=lengths.device) * cache.length
        self._rows = first_rows + lengths.repeat_interleave(kv_heads, output_size=batch * kv_heads)
        visible = torch.arange(window, device=lengths.device) <= lengths.unsqueeze(1)
        mask = torch.zeros(batch, window, device=lengths.device, dtype=cache.keys.dtype)
        self._mask = mask.masked_fill_(~visible, -torch.inf).view(batch, 1, 1, window)

    def __call__(self, block: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See :class:`sparsert.models.decoder.Attention`."""
        batch, _, heads, head_dim = q.shape
        kv_heads = k.shape[2]
        keys, values = self._cache.keys[block], self._cache.values[block]
        keys.view(-1, head_dim).index_copy_(0, self._rows, k.reshape(-1, head_dim))
        values.view(-1, head_dim).index_copy_(0, self._rows, v.reshape(-1, head_dim))
        group = heads // kv_heads
        attended = torch.nn.functional.scaled_dot_product_attention(
            q.reshape(batch, kv_heads, group, head_dim),
            keys[:batch, :, : self._window],
            values[:batch, :, : self._window],
            attn_mask=self._mask.expand(batch, kv_heads, group, self._window),
        )
        return attended.reshape(batch, 1, heads, head_dim)
