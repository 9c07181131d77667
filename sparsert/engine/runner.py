"""Prefill and decode of one batch over a static KV cache.

Shapes are few on purpose. The cache grows in powers of two and is kept between batches; a decode step
reads a window of 256, 512, 1024, ... positions, the smallest that holds the longest row still running.
So on a GPU a step is one of a handful of CUDA graphs, by (batch, window), each captured the first time
it is needed (:mod:`sparsert.engine.graphs`); on a CPU the same step function runs as it is. What it
gives up: up to half of the window is read for nothing, and a longer cache drops the graphs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
from torch import Tensor

from sparsert.engine.cache import DecodeAttention, KVCache, PrefillAttention
from sparsert.engine.graphs import DecodeGraphs
from sparsert.errors import InputError
from sparsert.models import DecoderModel

#: Rows of a batch at most: the batch sizes that decode graphs are made for.
MAX_BATCH_SIZE = 16

#: Smallest window of a decode step, in tokens.
_LEAST_WINDOW = 256

#: Cache lengths are multiples of it, so that rows of keys and masks stay aligned for attention kernels.
_LENGTH_UNIT = 16


def window_for(tokens: int, capacity: int) -> int:
    """Smallest window (256, 512, 1024, ..., at most ``capacity``) that holds ``tokens`` positions."""
    window = _LEAST_WINDOW
    while window < tokens:
        window *= 2
    return min(window, capacity)


class Runner:
    """Runs one batch at a time: one :meth:`prefill`, then :meth:`decode` for each further token.

    Attributes:
        model: the loaded model.
        max_length: most tokens of a text, prompt and output together.
        capture_s: seconds spent on capturing CUDA graphs so far.
    """

    def __init__(self, model: DecoderModel, max_length: int) -> None:
        self.model = model
        self.max_length = max_length
        self._cache: KVCache | None = None
        self._graphs: DecodeGraphs | None = None
        # static inputs of the graphs
        self._tokens = torch.zeros(MAX_BATCH_SIZE, dtype=torch.int64, device=model.device)
        self._lengths = torch.zeros(MAX_BATCH_SIZE, dtype=torch.int64, device=model.device)
        self._batch = 0

    @property
    def capture_s(self) -> float:
        """Seconds spent on capturing CUDA graphs so far."""
        return self._graphs.capture_s if self._graphs is not None else 0.0

    @property
    def cache_nbytes(self) -> int:
        """Bytes of the KV cache as it is now."""
        return self._cache.nbytes if self._cache is not None else 0

    def prefill(self, prompts: Sequence[Sequence[int]], room: int) -> Tensor:
        """Read the prompts into the cache.

        Args:
            prompts: token ids of 1 to :data:`MAX_BATCH_SIZE` texts, of any lengths from 1.
            room: positions that the longest text will need in the end, at most ``max_length``.

        Returns:
            Logits of each first new token, ``[batch, vocabulary]``.

        Raises:
            InputError: too many prompts, an empty or too long one, or no memory for the cache.
        """
        lengths = [len(prompt) for prompt in prompts]
        if not 1 <= len(prompts) <= MAX_BATCH_SIZE or min(lengths) < 1:
            raise InputError(f"got {len(prompts)} prompts of {lengths} tokens; need 1-{MAX_BATCH_SIZE}, none empty")
        if max(*lengths, room) > self.max_length:
            raise InputError(f"{max(*lengths, room)} tokens do not fit into max_length {self.max_length}")
        cache = self._reserve(len(prompts), max(*lengths, room))
        device = self.model.device
        padded = torch.zeros(len(prompts), max(lengths), dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            padded[row, : len(prompt)] = torch.tensor(prompt)
        tokens = padded.to(device)
        self._batch = len(prompts)
        lengths_here = torch.tensor(lengths, device=device)
        self._set_lengths(lengths_here)
        with torch.inference_mode(), self._on_device():
            return self.model(tokens, PrefillAttention(cache), rows=lengths_here - 1)

    def decode(self, tokens: Tensor, longest: int) -> Tensor:
        """Add one token to each row.

        Args:
            tokens: int64 ``[batch]`` on the device: the tokens just chosen.
            longest: tokens in the cache before this step, of the longest row whose logits matter.

        Returns:
            Logits of the next tokens, ``[batch, vocabulary]``, valid until the next call. Nothing waits
            for the device.
        """
        assert self._cache is not None, "prefill comes first"
        window = window_for(longest + 1, self._cache.length)
        with torch.inference_mode(), self._on_device():
            self._tokens[: self._batch].copy_(tokens)
            if self._graphs is not None:
                logits = self._graphs.run(self._batch, window)
            else:
                logits = self._step(self._batch, window)
            self._set_lengths(self._lengths[: self._batch] + 1)
        return logits

    def _set_lengths(self, lengths: Tensor) -> None:
        """Where the next token of each row goes; rows that have ended stay in the last position of the cache."""
        assert self._cache is not None
        self._lengths[: self._batch].copy_(lengths.clamp(max=self._cache.length - 1))

    def _on_device(self) -> contextlib.AbstractContextManager[object]:
        """Make the model's GPU the current one: kernels and graphs go to the current stream."""
        return torch.cuda.device(self.model.device) if self.model.device.type == "cuda" else contextlib.nullcontext()

    def _step(self, batch: int, window: int) -> Tensor:
        """The decode step as a function of the static buffers: capturable, same shapes for same arguments."""
        assert self._cache is not None
        lengths = self._lengths[:batch]
        attention = DecodeAttention(self._cache, lengths, window)
        logits: Tensor = self.model(self._tokens[:batch].unsqueeze(1), attention)
        return logits.squeeze(1)

    def _reserve(self, batch: int, length: int) -> KVCache:
        """A cache of at least this size; a new one makes captured graphs useless."""
        old = self._cache
        if old is not None and old.batch_size >= batch and old.length >= length:
            return old
        if old is not None:
            batch, length = max(batch, old.batch_size), max(length, old.length)
        rows = 1 << (batch - 1).bit_length()
        capacity = -(-window_for(length, self.max_length) // _LENGTH_UNIT) * _LENGTH_UNIT
        self._graphs = self._cache = old = None  # free before the larger one is made
        self.model.reserve_positions_(capacity)
        self._cache = KVCache(self.model.attention_shapes, rows, capacity, self.model.device, self.model.dtype)
        if self.model.device.type == "cuda":
            self._graphs = DecodeGraphs(self._step)
        return self._cache
