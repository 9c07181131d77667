"""Short prompts in few shapes: a prefill that is a function of static buffers, so that it can be a CUDA graph.

A forward over a hundred tokens is a few milliseconds of a GPU's work and several times that of the host's, which
launches hundreds of kernels one by one. So the packed tokens of a short prefill are padded to one of six sizes and
its texts to a power of two; a pair of these is a bucket, and each is captured once (:mod:`sparsert.engine.graphs`).

    prompts         |aaa|b|cccc|                 three texts, 8 tokens
    bucket 4 x 32   |aaa|b|cccccccccc...cc||     four texts, the last one empty, 32 tokens

Padding continues the last text: it comes behind all real tokens, so none of them sees it, and its keys and values
land in the cache behind that text's end, where decoding overwrites them before it reads there. It repeats the text's
last token, so what it computes is as finite as what the model computes anyway.

What it gives up: up to half of the work is padding, and a bucket's first prompt waits for a capture. Above
:data:`PROMPT_GRAPH_TOKENS` the GPU has enough to do while the host launches, and prompts are neither padded nor
captured (:mod:`sparsert.engine.prompt_chunks`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sparsert import ops
from sparsert.engine.prompt_chunks import PromptChunk
from sparsert.ops import AttentionShape, PackedTexts

#: Tokens of a prefill that is a graph, padding included. Close to one another where a GPU begins to feel padding.
_BUCKET_TOKENS = (32, 64, 128, 256, 384, 512)

#: Most tokens of a prefill that is a graph.
PROMPT_GRAPH_TOKENS = _BUCKET_TOKENS[-1]


class PromptBucket(NamedTuple):
    """The shape of a captured prefill.

    Attributes:
        texts: 1, 2, 4, ...; those that no prompt fills are empty.
        tokens: of all texts together, padding included.
    """

    texts: int
    tokens: int

    def padding_behind(self, lengths: Sequence[int]) -> int:
        """Tokens that follow the last of texts of these lengths."""
        return self.tokens - sum(lengths)


def find_bucket(lengths: Sequence[int], most_tokens: int) -> PromptBucket | None:
    """The smallest bucket of at most ``most_tokens`` for prompts of these lengths; None if they need a larger one."""
    for tokens in _BUCKET_TOKENS:
        if sum(lengths) <= tokens <= most_tokens:
            return PromptBucket(1 << (len(lengths) - 1).bit_length(), tokens)
    return None


def prompt_graph_tokens(shapes: Iterable[AttentionShape], device: torch.device, dtype: torch.dtype) -> int:
    """Most tokens, padding included, of a prefill that can be captured.

    Attention text by text takes the lengths from the host, so all texts must be one launch; and with a sliding window
    that is so only up to its length.

    Args:
        shapes: of all attention layers of the model.

    Returns:
        The size of a bucket, or 0 if nothing can be captured.
    """
    shapes = list(dict.fromkeys(shapes))
    if device.type != "cuda" or any(ops.explain_packed_attention(shape, device, dtype) for shape in shapes):
        return 0
    windows = [shape.sliding_window for shape in shapes if shape.sliding_window is not None]
    return max((tokens for tokens in _BUCKET_TOKENS if tokens <= min(windows, default=tokens)), default=0)


class PromptInputs:
    """Static inputs of prefills: one buffer, of which a bucket uses the beginning, so that one copy fills it."""

    def __init__(self, most_texts: int, device: torch.device) -> None:
        """Allocate the buffer.

        Args:
            most_texts: of a batch; a power of two.
        """
        self._buffer = torch.zeros(
            sum(_parts(PromptBucket(most_texts, PROMPT_GRAPH_TOKENS))), dtype=torch.int64, device=device
        )

    def fill_(self, prompts: Sequence[Sequence[int]], bucket: PromptBucket) -> None:
        """Put prompts where the step of their bucket reads them; nothing waits for the device.

        Args:
            prompts: token ids, none empty.
            bucket: of :func:`find_bucket` for them.
        """
        lengths = [len(prompt) for prompt in prompts]
        padding, empty = bucket.padding_behind(lengths), bucket.texts - len(prompts)
        padded = [*lengths[:-1], lengths[-1] + padding]
        starts = list(itertools.accumulate(padded, initial=0))
        ends = [start + length - 1 for start, length in zip(starts, lengths, strict=False)]
        values = [
            *itertools.chain.from_iterable(prompts), *itertools.repeat(prompts[-1][-1], padding),
            *itertools.chain.from_iterable(itertools.repeat(row, length) for row, length in enumerate(padded)),
            *itertools.chain.from_iterable(map(range, padded)),
            *ends, *itertools.repeat(ends[-1], empty),
            *lengths, *itertools.repeat(0, empty),
            *starts, *itertools.repeat(bucket.tokens, empty),
        ]  # fmt: skip
        # a new tensor each time, because the copy of the last one may still be waiting for its turn; the allocator of
        # page-locked memory gives out none that a copy has still to read
        on_host = torch.tensor(values, dtype=torch.int64, pin_memory=self._buffer.is_cuda)
        self._buffer[: len(values)].copy_(on_host, non_blocking=True)

    def read(self, bucket: PromptBucket) -> tuple[PromptChunk, Tensor]:
        """What the last :meth:`fill_` left, in tensors that stay where they are.

        Returns:
            A chunk of all texts, of which the host knows the bucket only; ``ends`` of empty texts name the last
            prompt's. And the lengths of the texts without padding, int64 ``[texts]``.
        """
        sizes = _parts(bucket)
        tokens, rows, positions, ends, lengths, starts = self._buffer[: sum(sizes)].split(sizes)
        starts = starts.to(torch.int32)
        texts = PackedTexts(starts, starts, longest_query=bucket.tokens, longest_key=bucket.tokens)
        chunk = PromptChunk(
            tokens=tokens.unsqueeze(0),
            rows=rows,
            positions=positions,
            ends=ends.unsqueeze(0),
            first_row=0,
            past=0,
            texts=texts,
        )
        return chunk, lengths


def _parts(bucket: PromptBucket) -> list[int]:
    """Sizes in the buffer: tokens, rows and positions of tokens; ends, lengths and starts of texts."""
    return [bucket.tokens] * 3 + [bucket.texts, bucket.texts, bucket.texts + 1]
