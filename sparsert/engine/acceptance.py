"""Which drafted tokens stand: the rules of speculative decoding, on tensors and without a model.

A draft proposes tokens d1 ... dk, the target gives its distribution behind each of them in one forward. Drafts are
looked at from the left; the first that does not stand is replaced by a token of the target, and what comes behind
it is dropped. If all stand, the target adds one more. So every round gives one token at least.

Greedy: a draft stands if it is what the target takes. Sampled: with draft distribution q and target distribution p,
a draft d stands with probability min(1, p(d) / q(d)), and is otherwise replaced by a token of the distribution
proportional to max(0, p - q). The token that results is distributed as p, whatever q is:

    q(d) min(1, p(d)/q(d)) + (1 - sum min(p, q)) max(0, p(d) - q(d)) / sum max(0, p - q) = min(p, q) + max(0, p - q) = p

p and q are the distributions that are really sampled from: after repetition penalty, temperature, top-k, top-p, min-p.

Source: Leviathan et al., "Fast Inference from Transformers via Speculative Decoding" (2023), algorithm 1; Chen et al.,
"Accelerating Large Language Model Decoding with Speculative Sampling" (2023), algorithm 2.
"""

from __future__ import annotations

import torch
from torch import Tensor


def accept_greedy(drafts: Tensor, best: Tensor) -> tuple[Tensor, Tensor]:
    """Drafts that are what the target takes.

    Args:
        drafts: int64 ``[batch, drafts]``.
        best: int64 ``[batch, drafts + 1]``: the target's choice at each place, and behind the last draft.

    Returns:
        How many drafts stand, from the left, and the token that follows them: int64 ``[batch]`` each.
    """
    accepted = _leading(drafts == best[:, :-1])
    return accepted, best.gather(1, accepted.unsqueeze(1)).squeeze(1)


def accept_sampled(
    drafts: Tensor, draft: Tensor, target: Tensor, uniforms: Tensor, exponentials: Tensor
) -> tuple[Tensor, Tensor]:
    """Drafts that stand by chance, such that the tokens are distributed as the target's.

    Args:
        drafts: int64 ``[batch, drafts]``, drawn from ``draft``.
        draft: probabilities, fp32 ``[batch, drafts, vocabulary]``.
        target: probabilities, fp32 ``[batch, drafts + 1, vocabulary]``.
        uniforms: independent variates from [0, 1), ``[batch, drafts]``.
        exponentials: independent exponential variates above 0, ``[batch, vocabulary]``.

    Returns:
        How many drafts stand, from the left, and the token that follows them: int64 ``[batch]`` each.
    """
    chosen = drafts.unsqueeze(2)
    p, q = target[:, :-1].gather(2, chosen).squeeze(2), draft.gather(2, chosen).squeeze(2)
    accepted = _leading(uniforms * q < p)
    rows = torch.arange(len(drafts), device=drafts.device)
    whole = target[rows, accepted]
    # behind the last draft there is nothing to take off
    drawn = draft[rows, accepted.clamp(max=drafts.shape[1] - 1)] * (accepted < drafts.shape[1]).unsqueeze(1)
    rest = (whole - drawn).clamp_min(0)
    # equal distributions leave nothing, and nothing is ever refused but by rounding: then the target's own serves
    rest = torch.where(rest.sum(dim=1, keepdim=True) > 0, rest, whole)
    # the largest of weight / exponential variate is drawn with probability proportional to the weight
    return accepted, (rest / exponentials).argmax(dim=1)


def _leading(stands: Tensor) -> Tensor:
    """Count of True before the first False of each row."""
    return stands.long().cumprod(dim=1).sum(dim=1)
