"""Speculative decoding: a cheap draft proposes tokens, the target checks all of them in one forward.

At small batch a forward of several tokens a row costs little more than one of a single token: both read every
weight once. If a draft guesses k tokens in the time of a few target steps and most of them stand, a round gives
several tokens for little more than one step. Greedy texts are those of plain decoding, sampled ones have
the same distribution (:mod:`sparsert.engine.acceptance`), so a draft can only cost time, never quality.

The draft is a runner. If it is another plan of the target's own model it shares the target's cache: it
goes on from the keys and values that the full model wrote for the text so far, adds its own behind them,
and the check overwrites those. So a draft without blocks needs no memory at all and reads no prompt. A model of
its own (say, the 2:4 model as draft of the dense one) has its own cache. What it lacks after a round whose drafts
all stood is the last of them, so it begins every round with the last two tokens of the text.

                      text so far        t      d1     d2     d3
    draft, k = 3                         t  ->  d1 ->  d2 ->  d3        three steps of one token
    target, one forward                  t      d1     d2     d3        and the target's choice behind each

t is the newest token, chosen but not yet in the cache. Everything about a row's length stays on the device; the
host waits once a round, for the tokens. What it gives up: rows that have ended draft along, and the last round
of a text may draft past its end.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparsert.engine.acceptance import accept_greedy, accept_sampled
from sparsert.engine.runner import MAX_STEP_TOKENS, Runner
from sparsert.engine.sampler import Sampler, process_scores

#: Tokens that can be drafted in a round.
MAX_DRAFT_TOKENS = MAX_STEP_TOKENS - 1


class Speculator:
    """Rounds of drafting and checking for one batch.

    Attributes:
        draft_tokens: tokens drafted in a round.
    """

    def __init__(self, target: Runner, draft: Runner, draft_tokens: int, sampler: Sampler) -> None:
        """Set up.

        Args:
            target: has read the prompts, with ``draft_tokens`` positions to spare.
            draft: another plan of the target's model, or a model of its own on the same device.
            draft_tokens: 1 to :data:`MAX_DRAFT_TOKENS`.
            sampler: of the batch; has chosen no token yet.
        """
        self.draft_tokens = draft_tokens
        self._target = target
        self._draft = draft
        self._sampler = sampler
        self._shares_cache = draft.shares_cache_with(target)
        self._previous: Tensor | None = None

    def prefill(self, prompts: Sequence[Sequence[int]], room: int) -> None:
        """Let a draft with a cache of its own read the prompts; ``room`` as for :meth:`Runner.prefill`.

        Raises:
            InputError: the draft has no room for them.
        """
        if not self._shares_cache:
            self._draft.prefill(prompts, room, spare=self.draft_tokens)
            self._previous = torch.tensor([prompt[-1] for prompt in prompts], device=self._target.model.device)

    @torch.inference_mode()
    def round(self, newest: Tensor, longest: int) -> tuple[Tensor, Tensor]:
        """Draft, check, and take over what stands.

        Args:
            newest: int64 ``[batch]``: the last token of each row, not yet in the cache; seen by the sampler.
            longest: tokens in the cache of the longest row that matters.

        Returns:
            The newest token of each row now, int64 ``[batch]``; and for the host int64 ``[batch, draft_tokens + 2]``:
            the new tokens, of which only the first ``accepted + 1`` are meant, and ``accepted`` in the last column.
            Nothing waits for the device.
        """
        count, sampled = self.draft_tokens, not self._sampler.params.greedy
        start = self._target.lengths
        sequence = newest.new_empty(len(newest), count + 1)
        sequence[:, 0] = newest
        seen: list[Tensor] = [] if self._sampler.seen is None else [self._sampler.seen]
        drawn: list[Tensor] = []
        for place in range(count):
            token = self._propose(sequence[:, place], start, longest, place, seen, drawn)
            sequence[:, place + 1] = token
            if seen:
                seen.append(seen[-1].scatter(1, token.unsqueeze(1), True))
        drafts = sequence[:, 1:]

        self._target.place_(start)
        logits = self._target.extend(sequence, longest)
        seen_at = torch.stack(seen, dim=1) if seen else None
        scores = process_scores(logits.float(), self._sampler.params, seen_at)
        if sampled:
            accepted, following = accept_sampled(
                drafts, torch.stack(drawn, dim=1), scores.softmax(dim=-1),
                self._sampler.uniforms(drafts), self._sampler.exponentials(scores[:, 0]),
            )  # fmt: skip
        else:
            accepted, following = accept_greedy(drafts, scores.argmax(dim=-1))
        self._target.place_(start + accepted + 1)

        column = accepted.unsqueeze(1)
        if self._previous is not None:
            self._previous = sequence.gather(1, column).squeeze(1)
        if seen_at is not None:
            rows = torch.arange(len(newest), device=newest.device)
            self._sampler.seen = seen_at[rows, accepted]
            self._sampler.saw(following)
        tokens = torch.cat([drafts, following.unsqueeze(1)], dim=1).scatter(1, column, following.unsqueeze(1))
        return following, torch.cat([tokens, column], dim=1)

    def _propose(
        self, token: Tensor, start: Tensor, longest: int, place: int, seen: list[Tensor], drawn: list[Tensor]
    ) -> Tensor:
        """The draft's token behind ``token``; where it is sampled, its distribution is added to ``drawn``."""
        # one window for all steps of a round, that of the check, so that there are fewer graphs
        longest += self.draft_tokens
        if place == 0 and self._previous is not None:
            self._draft.place_(start - 1)
            logits = self._draft.extend(torch.stack([self._previous, token], dim=1), longest - 1)[:, -1]
            self._draft.place_(start + 1)
        elif self._sampler.takes_maximum:
            return self._draft.decode_greedy(token, longest)
        else:
            logits = self._draft.decode(token, longest)
        scores = process_scores(logits.float(), self._sampler.params, seen[-1] if seen else None)
        if self._sampler.params.greedy:
            return scores.argmax(dim=-1)
        probabilities = scores.softmax(dim=-1)
        drawn.append(probabilities)
        return (probabilities / self._sampler.exponentials(probabilities)).argmax(dim=-1)
