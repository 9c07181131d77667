"""Sampling: scores as transformers makes them, draws independent of the rest of the batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from sparsert.engine.params import SamplingParams
from sparsert.engine.sampler import Sampler, process_scores

VOCABULARY = 101
CPU = torch.device("cpu")


def _logits(batch: int = 3, seed: int = 0) -> Tensor:
    return 3 * torch.randn(batch, VOCABULARY, generator=torch.Generator().manual_seed(seed))


def _reference(params: SamplingParams) -> LogitsProcessorList:
    """The processors that transformers' generate makes of the same settings, in its order."""
    processors = LogitsProcessorList()
    if params.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    if params.temperature != 1:
        processors.append(TemperatureLogitsWarper(float(params.temperature)))
    if params.top_k:
        processors.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        processors.append(TopPLogitsWarper(params.top_p))
    if params.min_p > 0:
        processors.append(MinPLogitsWarper(params.min_p))
    return processors


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 1.0},
        {"temperature": 0.6},
        {"temperature": 1.0, "top_k": 7},
        {"temperature": 1.0, "top_k": 5000},
        {"temperature": 1.0, "top_p": 0.8},
        {"temperature": 1.0, "top_p": 1e-6},
        {"temperature": 1.0, "min_p": 0.1},
        {"temperature": 1.0, "min_p": 1.0},
        {"temperature": 1.0, "repetition_penalty": 1.4},
        {"temperature": 1.7, "top_k": 20, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 0.8},
    ],
)
def test_scores_equal_transformers(settings: dict[str, Any]) -> None:
    params = SamplingParams(**settings)
    logits = _logits()
    seen_tokens = torch.randint(0, VOCABULARY, (3, 12), generator=torch.Generator().manual_seed(1))
    seen = torch.zeros(3, VOCABULARY, dtype=torch.bool).scatter_(1, seen_tokens, True)
    expected = _reference(params)(seen_tokens, logits.clone())
    ours = process_scores(logits.clone(), params, seen)
    assert torch.equal(ours.isinf(), expected.isinf()), "the same tokens are left"
    torch.testing.assert_close(ours, expected)


def test_equal_scores_at_the_edge_of_top_k_all_stay() -> None:
    scores = torch.tensor([[1.0, 2.0, 2.0, 2.0, 0.0]])
    kept = process_scores(scores, SamplingParams(temperature=1.0, top_k=2), None)
    assert kept.isfinite().tolist() == [[False, True, True, True, False]]


def test_greedy_takes_the_largest_and_leaves_the_logits_alone() -> None:
    logits = _logits().bfloat16()
    before = logits.clone()
    tokens = Sampler(SamplingParams(top_k=3, top_p=0.5), [[1]] * 3, VOCABULARY, CPU)(logits)
    assert tokens.dtype == torch.int64 and torch.equal(tokens, logits.argmax(-1))
    assert torch.equal(logits, before)


def test_repetition_penalty_counts_prompt_and_output() -> None:
    logits = torch.zeros(2, VOCABULARY)
    logits[:, [5, 6, 7]] = torch.tensor([3.0, 2.9, 2.8])
    sampler = Sampler(SamplingParams(repetition_penalty=2.0), [[5, 9], [8]], VOCABULARY, CPU)
    assert sampler(logits).tolist() == [6, 5], "5 is in the first prompt"
    assert sampler(logits).tolist() == [7, 6], "and what was drawn counts from then on"
    assert sampler(logits).tolist() == [5, 7]


def test_draws_follow_the_softmax() -> None:
    params = SamplingParams(temperature=1.0, top_k=4, seed=3)
    logits = torch.full((1, VOCABULARY), -5.0)
    logits[0, [2, 30, 60, 100]] = torch.tensor([2.0, 1.0, 0.0, 1.5])
    sampler = Sampler(params, [[1]], VOCABULARY, CPU)
    draws = torch.cat([sampler(logits) for _ in range(4000)])
    share = torch.bincount(draws, minlength=VOCABULARY) / len(draws)
    expected = process_scores(logits, params, None).softmax(-1)[0]
    assert int((share > 0).sum()) == 4
    # five standard deviations of a share of 4000 draws
    assert (share - expected).abs().max() < 5 * (0.25 / 4000) ** 0.5


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    params = SamplingParams(temperature=1.0, seed=11)
    logits = _logits(4)
    alone = Sampler(params, [[1]], VOCABULARY, CPU)
    together = Sampler(params, [[1]] * 4, VOCABULARY, CPU)
    for _ in range(20):
        assert alone(logits[2:3])[0] == together(logits)[2]


def test_seeds() -> None:
    logits = torch.zeros(2, VOCABULARY)

    def draw(seed: int | None) -> list[list[int]]:
        sampler = Sampler(SamplingParams(temperature=1.0, seed=seed), [[1], [1]], VOCABULARY, CPU)
        return torch.stack([sampler(logits) for _ in range(12)], dim=1).tolist()

    assert draw(5) == draw(5) != draw(6)
    assert draw(5)[0] == draw(5)[1], "same seed, same prompt, same text"
    assert draw(None)[0] != draw(None)[1], "without a seed every row has its own"
    torch.manual_seed(0)
    first = draw(None)
    torch.manual_seed(0)
    assert first == draw(None), "and follows torch's global seed"
