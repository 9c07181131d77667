"""A prefill without packing, as a reference: equally long prompts in a rectangle, shorter ones padded on the right."""

from __future__ import annotations

from torch import Tensor

from sparsert import ops
from sparsert.engine.cache import KVCache
from sparsert.models.attention import SelfAttention


class PaddedPrefillAttention:
    """Causal attention over equally long prompts, a row of tokens each, which also writes their keys and values.

    No real token sees a pad, because pads come later. Keys of pads land in the cache behind the real ones, where
    decoding overwrites them before it looks at them.
    """

    def __init__(self, cache: KVCache) -> None:
        self._cache = cache

    def __call__(self, slot: int, heads: Tensor, layer: SelfAttention) -> Tensor:
        """See :class:`sparsert.models.attention.Attention`."""
        batch, tokens = heads.shape[:2]
        q, k, v = layer.split(heads)
        self._cache.keys[slot][:batch, :, :tokens].copy_(k.transpose(1, 2))
        self._cache.values[slot][:batch, :, :tokens].copy_(v.transpose(1, 2))
        return ops.causal_attention(q, k, v, layer.shape)
