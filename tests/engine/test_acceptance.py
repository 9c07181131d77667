"""The rules of speculative decoding against the distributions that they promise; a wrong rule fails the same test."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sparsert.engine.acceptance import accept_greedy, accept_sampled

Rule = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]

VOCABULARY = 5
ROUNDS = 40_000


def chi_square_per_degree(counts: Tensor, probabilities: Tensor) -> float:
    """Pearson's statistic over its degrees of freedom: near 1 if the counts come from the probabilities."""
    expected = probabilities.double() * counts.sum()
    possible = expected > 0
    assert int(counts[~possible].sum()) == 0, "a token of probability 0 was drawn"
    statistic = ((counts.double() - expected)[possible] ** 2 / expected[possible]).sum()
    return float(statistic / (int(possible.sum()) - 1))


def random_distributions(*shape: int, sharp: float = 1.5) -> Tensor:
    distributions = (sharp * torch.randn(*shape, VOCABULARY)).softmax(-1)
    # top-k and the like leave zeros, in other places for draft and target
    distributions[torch.rand(distributions.shape) < 0.2] = 0
    distributions[..., 0] += 1e-3
    return distributions / distributions.sum(-1, keepdim=True)


def pairs_by(rule: Rule) -> tuple[float, float]:
    """Chi-square of the first token, and of the first two, of rounds with two drafts: mean over some distributions."""
    results = [one_pair_by(rule, seed) for seed in range(4)]
    return sum(one for one, _ in results) / len(results), sum(two for _, two in results) / len(results)


def one_pair_by(rule: Rule, seed: int) -> tuple[float, float]:
    """Both models are Markov chains, so that the two tokens have a distribution that can be written down."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    p, q = random_distributions(VOCABULARY), random_distributions(VOCABULARY)
    p0, q0 = random_distributions(), random_distributions()
    first = torch.multinomial(q0, ROUNDS, True, generator=generator)
    second = torch.multinomial(q[first], 1, generator=generator).squeeze(1)
    draft = torch.stack([q0.expand(ROUNDS, -1), q[first]], dim=1)
    target = torch.stack([p0.expand(ROUNDS, -1), p[first], p[second]], dim=1)
    exponentials = torch.empty(ROUNDS, VOCABULARY).exponential_(generator=generator).clamp_min(1e-10)
    drafts = torch.stack([first, second], dim=1)
    accepted, following = rule(drafts, draft, target, torch.rand(ROUNDS, 2, generator=generator), exponentials)
    tokens = torch.cat([drafts, following.unsqueeze(1)], 1).scatter(1, accepted.unsqueeze(1), following.unsqueeze(1))
    one = torch.bincount(tokens[:, 0], minlength=VOCABULARY)
    # rounds that gave one token only go on by plain sampling, as the next round would
    again = torch.multinomial(p[tokens[:, 0]], 1, generator=generator).squeeze(1)
    pair = torch.where(accepted > 0, tokens[:, 1], again)
    two = torch.bincount(tokens[:, 0] * VOCABULARY + pair, minlength=VOCABULARY**2)
    return chi_square_per_degree(one, p0), chi_square_per_degree(two, (p0.unsqueeze(1) * p).flatten())


def test_tokens_are_distributed_as_the_target_s() -> None:
    one, two = pairs_by(accept_sampled)
    assert one < 2.5 and two < 1.7, (one, two)


def replaced_by_the_target(
    drafts: Tensor, draft: Tensor, target: Tensor, u: Tensor, e: Tensor
) -> tuple[Tensor, Tensor]:
    """Wrong: a refused draft is replaced by a token of the target instead of what the draft lacks of it."""
    accepted, _ = accept_sampled(drafts, draft, target, u, e)
    return accepted, (target[torch.arange(len(drafts)), accepted] / e).argmax(1)


def accepted_by_the_target_alone(
    drafts: Tensor, draft: Tensor, target: Tensor, u: Tensor, e: Tensor
) -> tuple[Tensor, Tensor]:
    """Wrong: a draft stands with its probability under the target, whatever the draft gave it."""
    return accept_sampled(drafts, torch.where(draft > 0, 1.0, 0.0), target, u, e)


def never_refused(drafts: Tensor, draft: Tensor, target: Tensor, u: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
    """Wrong: drafts stand wherever they are possible at all."""
    return accept_sampled(drafts, draft, target, torch.zeros_like(u), e)


@pytest.mark.parametrize("rule", [replaced_by_the_target, accepted_by_the_target_alone, never_refused])
def test_a_wrong_rule_is_found_out(rule: Rule) -> None:
    one, two = pairs_by(rule)
    assert max(one, two) > 20, (one, two)


def test_equal_distributions_always_stand() -> None:
    p = random_distributions(500, 4)
    drafts = torch.multinomial(p[:, :3].flatten(0, 1), 1).view(500, 3)
    accepted, following = accept_sampled(
        drafts, p[:, :3], p, torch.rand(500, 3), torch.empty(500, VOCABULARY).exponential_().clamp_min(1e-10)
    )
    assert bool((accepted == 3).all()) and bool((p[:, 3].gather(1, following.unsqueeze(1)) > 0).all())


def test_disjoint_distributions_never_stand() -> None:
    p, q = torch.tensor([0.0, 0.0, 0.25, 0.75, 0.0]), torch.tensor([0.5, 0.5, 0.0, 0.0, 0.0])
    accepted, following = accept_sampled(
        torch.randint(2, (4000, 2)), q.expand(4000, 2, -1), p.expand(4000, 3, -1), torch.rand(4000, 2),
        torch.empty(4000, VOCABULARY).exponential_().clamp_min(1e-10),
    )  # fmt: skip
    assert bool((accepted == 0).all())
    assert chi_square_per_degree(torch.bincount(following, minlength=VOCABULARY), p) < 10


def test_greedy_takes_drafts_up_to_the_first_that_differs() -> None:
    drafts = torch.tensor([[4, 5, 6], [4, 9, 6], [1, 5, 6]])
    best = torch.tensor([[4, 5, 6, 7], [4, 5, 6, 7], [4, 5, 6, 7]])
    accepted, following = accept_greedy(drafts, best)
    assert accepted.tolist() == [3, 1, 0] and following.tolist() == [7, 5, 4]
