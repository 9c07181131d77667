"""From logits to tokens, on the device, row by row independent.

Order and meaning are those of transformers' logits processors: repetition penalty, then temperature,
top-k, top-p, min-p, each on what the one before it left. Every row draws from a generator of its own,
so a text depends on its prompt and seed and not on its neighbours, and nothing waits for the device.

A token is drawn as the largest ``score + Gumbel noise``, which has the distribution of the softmax
without computing or summing it.

Source: transformers ``generation/logits_process.py``; Gumbel-max: Maddison et al., "A* sampling" (2014).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparsert.engine.params import SamplingParams

#: Smallest exponential variate that is let through: log(0) would be an infinite score.
_LEAST_NOISE = 1e-10


def penalize_repetition(scores: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Divide positive and multiply negative scores of seen tokens by ``penalty``.

    Args:
        scores: ``[batch, vocabulary]``.
        seen: bool of the same shape.
    """
    return torch.where(seen, torch.where(scores < 0, scores * penalty, scores / penalty), scores)


def keep_top_k(scores: Tensor, top_k: int) -> Tensor:
    """Set all but the ``top_k`` largest scores of each row to -inf; equals of the last one stay."""
    least = scores.topk(min(top_k, scores.shape[-1])).values[..., -1:]
    return scores.masked_fill(scores < least, -torch.inf)


def keep_top_p(scores: Tensor, top_p: float) -> Tensor:
    """Set to -inf what is not among the fewest tokens whose probabilities sum to at least ``top_p``."""
    ascending, order = scores.sort(dim=-1)
    dropped = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - top_p
    dropped[..., -1] = False
    return scores.masked_fill(dropped.scatter(-1, order, dropped), -torch.inf)


def keep_min_p(scores: Tensor, min_p: float) -> Tensor:
    """Set to -inf the tokens less likely than ``min_p`` times the likeliest."""
    probabilities = scores.softmax(dim=-1)
    return scores.masked_fill(probabilities < min_p * probabilities.amax(dim=-1, keepdim=True), -torch.inf)


def process_scores(scores: Tensor, params: SamplingParams, seen: Tensor | None) -> Tensor:
    """Scores whose softmax is sampled from (or whose maximum is taken, if greedy).

    Args:
        scores: logits, fp32 ``[batch, vocabulary]``.
        seen: bool of the same shape, needed for a repetition penalty.
    """
    if seen is not None and params.repetition_penalty != 1:
        scores = penalize_repetition(scores, seen, params.repetition_penalty)
    if params.greedy:
        return scores
    if params.temperature != 1:
        scores = scores / params.temperature
    if params.top_k:
        scores = keep_top_k(scores, params.top_k)
    if params.top_p < 1:
        scores = keep_top_p(scores, params.top_p)
    if params.min_p > 0:
        scores = keep_min_p(scores, params.min_p)
    return scores


class Sampler:
    """Draws the next token of every row of one batch.

    Attributes:
        params: how tokens are chosen.
        seen: bool ``[batch, vocabulary]``: tokens that a repetition penalty counts; None without one.
    """

    def __init__(
        self, params: SamplingParams, prompts: Sequence[Sequence[int]], vocab_size: int, device: torch.device
    ) -> None:
        """Set up generators and the record of seen tokens.

        Args:
            prompts: token ids of each row; they count as seen for the repetition penalty.
        """
        self.params = params
        self.seen: Tensor | None = None
        self._generators: list[torch.Generator] = []
        if params.repetition_penalty != 1:
            seen = torch.zeros(len(prompts), vocab_size, dtype=torch.bool)
            for row, prompt in enumerate(prompts):
                seen[row, torch.tensor(prompt)] = True
            self.seen = seen.to(device)
        if not params.greedy:
            # one row, one generator; without a seed the global one gives each row its own
            seeds = [int(torch.randint(2**62, ())) if params.seed is None else params.seed for _ in range(len(prompts))]
            self._generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    @property
    def takes_maximum(self) -> bool:
        """Whether the next token is the largest logit, whatever came before."""
        return self.params.greedy and self.seen is None

    def __call__(self, logits: Tensor) -> Tensor:
        """Next tokens.

        Args:
            logits: ``[batch, vocabulary]``, any floating dtype; not changed.

        Returns:
            int64 ``[batch]`` on the same device, without waiting for it.
        """
        scores = process_scores(logits.float(), self.params, self.seen)
        if self._generators:
            scores = scores - self.exponentials(scores).log()
        tokens = scores.argmax(dim=-1)
        self.saw(tokens)
        return tokens

    def saw(self, tokens: Tensor) -> None:
        """Count int64 ``[batch]`` tokens as seen."""
        if self.seen is not None:
            self.seen.scatter_(1, tokens.unsqueeze(1), True)

    def exponentials(self, like: Tensor) -> Tensor:
        """Exponential variates, none of them 0: fp32, of the shape of ``like``, whose rows are those of the batch."""
        noise = torch.empty_like(like, dtype=torch.float32)
        for row, generator in zip(noise, self._generators, strict=True):
            row.exponential_(generator=generator)
        return noise.clamp_min_(_LEAST_NOISE)

    def uniforms(self, like: Tensor) -> Tensor:
        """Variates from [0, 1): fp32, of the shape of ``like``, whose rows are those of the batch."""
        noise = torch.empty_like(like, dtype=torch.float32)
        for row, generator in zip(noise, self._generators, strict=True):
            row.uniform_(generator=generator)
        return noise
