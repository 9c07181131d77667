"""Prompts one after the other, cut into chunks of bounded size: what the forwards of a prefill read.

    prompts   |aaaaaaa|b|cccccccccccc|dd|
    chunks    |aaaaaaa|b|ccc             and then   |ccccccccc|dd|

There is no padding, so prompts of 1,000 and 10 tokens cost what 1,010 tokens cost, and activations never take more
memory than a chunk's, however long a prompt is. A text that goes on in the next chunk attends there to its earlier
tokens in the cache; only the first text of a chunk can be one of those. All index tensors of all chunks are made here
before the first forward, so that no forward waits for the host or the host for a forward.

What it gives up: a long prompt in front of a short one delays it. That is a scheduler's business, and a batch here
starts together.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from sparsert.ops import PackedTexts


@dataclasses.dataclass(frozen=True)
class PromptChunk:
    """Tokens of one forward: the end, the whole or the beginning of each of several texts.

    Attributes:
        tokens: int64 ``[1, tokens]`` on the device.
        rows: int64 ``[tokens]`` on the device: the text of each token, which is its row of the cache.
        positions: int64 ``[tokens]`` on the device: of each token in its text.
        ends: int64 ``[1, texts that end here]`` on the device: places in the chunk of the last tokens of texts, in
            the order of the texts.
        first_row: the first text.
        past: tokens of the first text in earlier chunks.
        texts: lengths of the texts, for attention.
    """

    tokens: Tensor
    rows: Tensor
    positions: Tensor
    ends: Tensor
    first_row: int
    past: int
    texts: PackedTexts


def cut_prompts(prompts: Sequence[Sequence[int]], chunk_tokens: int, device: torch.device) -> list[PromptChunk]:
    """Pack prompts and cut them into chunks.

    Args:
        prompts: token ids of each text, at least one text and one token each.
        chunk_tokens: most tokens of a chunk, at least 1.
    """
    lengths = [len(prompt) for prompt in prompts]
    stops = list(itertools.accumulate(lengths))
    table = torch.stack(
        [
            torch.cat([torch.tensor(prompt, dtype=torch.int64) for prompt in prompts]),
            torch.arange(len(prompts)).repeat_interleave(torch.tensor(lengths)),
            torch.cat([torch.arange(length) for length in lengths]),
        ]
    ).to(device)
    chunks = []
    for begin in range(0, stops[-1], chunk_tokens):
        end = min(begin + chunk_tokens, stops[-1])
        inside = [row for row, stop in enumerate(stops) if stop > begin and stop - lengths[row] < end]
        starts = [stops[row] - lengths[row] for row in inside]
        upto = [min(stops[row], end) for row in inside]
        texts = PackedTexts.of(
            [(stop - max(start, begin), stop - start) for start, stop in zip(starts, upto, strict=True)], device
        )
        finished = sum(stops[row] <= end for row in inside)
        tokens, rows, positions = table[:, begin:end]
        chunks.append(
            PromptChunk(
                tokens=tokens.unsqueeze(0),
                rows=rows,
                positions=positions,
                ends=(texts.query_starts[1 : finished + 1].long() - 1).unsqueeze(0),
                first_row=inside[0],
                past=max(begin - starts[0], 0),
                texts=texts,
            )
        )
    return chunks
