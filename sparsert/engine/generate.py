"""The generation of one batch: prefill once, then decode until every text has ended.

All rows step together; one that has ended runs along until the last has. On a GPU the next step is
launched before the host looks at the tokens of this one, so Python's work on text and stop conditions
overlaps with the GPU's; when the last text ends by a stop condition, one step has run for nothing. A
greedy step is one launch, the choice of the token included; sampling follows the step's graph kernel by
kernel. With a draft, rounds of drafting and checking take the place of steps (:mod:`sparsert.engine.speculate`).
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from torch import Tensor

from sparsert.engine.growing_text import GrowingText, StreamCallback, deliver
from sparsert.engine.params import SamplingParams
from sparsert.engine.results import SpeculationStats, Timings
from sparsert.engine.runner import Runner
from sparsert.engine.sampler import Sampler
from sparsert.engine.speculate import Speculator
from sparsert.engine.token_reader import TokenReader
from sparsert.errors import CheckpointError

#: In the place of a token where there are no logits to choose by.
_NO_TOKEN = -1


def generate_batch(
    runner: Runner,
    texts: Sequence[GrowingText],
    params: SamplingParams,
    *,
    load_s: float = 0.0,
    stream: StreamCallback | None = None,
    look_ahead: bool | None = None,
    draft: Runner | None = None,
    draft_tokens: int = 0,
) -> Timings:
    """Generate until every text has ended; the texts are changed in place.

    Args:
        texts: 1 to ``MAX_BATCH_SIZE`` texts without tokens, each with a limit of at least 1 that fits the runner.
        params: how to choose tokens.
        load_s: for the record.
        stream: called for each new token of each text.
        look_ahead: launch a step before the host has seen the tokens of the last; default on a GPU only,
            because on a CPU there is nothing to overlap with.
        draft: proposes tokens that ``runner`` then checks several at a time; another plan of the same model, or
            another model of the same vocabulary.
        draft_tokens: how many it proposes at a time, 1 to ``MAX_DRAFT_TOKENS``.

    Raises:
        CheckpointError: logits behind a prompt are NaN. Those of later tokens are not looked at.
    """
    runners = [runner] if draft is None or draft.shares_cache_with(runner) else [runner, draft]

    def captured_s() -> float:
        return sum(each.capture_s for each in runners)

    start, capture_start_s = time.perf_counter(), captured_s()
    prompts = [text.prompt for text in texts]
    room = max(len(text.prompt) + text.limit for text in texts)
    device = runner.model.device
    logits = runner.prefill(prompts, room, spare=draft_tokens)
    sampler = Sampler(params, prompts, runner.model.config.vocab_size, device)
    speculator = None
    if draft is not None:
        speculator = Speculator(runner, draft, draft_tokens, sampler)
        speculator.prefill(prompts, room)
    tokens = sampler(logits)
    reader = TokenReader((len(texts),), device)
    # a maximum can be taken of NaN as well, and text be made of it
    reader.start(tokens.masked_fill(logits.isnan().any(dim=-1), _NO_TOKEN))
    firsts = reader.finish()
    if _NO_TOKEN in firsts:
        raise CheckpointError(
            f"prompt {firsts.index(_NO_TOKEN)}: the model's logits are NaN in {logits.dtype}; loading found all "
            f"weights finite, so numbers overflow on the way: give dtype bfloat16 or float32"
        )
    deliver(texts, [[token] for token in firsts], stream)
    first, capture_first_s = time.perf_counter(), captured_s()
    stats = None
    if speculator is not None:
        stats = _rounds(speculator, texts, tokens, stream)
    else:
        _steps(
            runner, sampler, texts, tokens, reader, stream, device.type == "cuda" if look_ahead is None else look_ahead
        )
    end, capture_end_s = time.perf_counter(), captured_s()
    prefill_s = first - start - (capture_first_s - capture_start_s)
    decode_s = max(end - first - (capture_end_s - capture_first_s), 0.0)
    new_tokens = sum(len(text.token_ids) for text in texts)
    decoded = new_tokens - len(texts)
    return Timings(
        load_s=load_s,
        batch_size=len(texts),
        prompt_tokens=sum(map(len, prompts)),
        new_tokens=new_tokens,
        prefill_ms=prefill_s * 1e3,
        capture_ms=(capture_end_s - capture_start_s) * 1e3,
        decode_ms=decode_s * 1e3,
        decode_tok_per_s=decoded / decode_s if decoded and decode_s > 0 else 0.0,
        speculation=stats,
    )


def _steps(
    runner: Runner,
    sampler: Sampler,
    texts: Sequence[GrowingText],
    tokens: Tensor,
    reader: TokenReader,
    stream: StreamCallback | None,
    look_ahead: bool,
) -> None:
    """Decode a token at a time, from the first tokens, which the texts have already."""
    following = _decode(runner, sampler, texts, tokens, 0)
    step = 1  # tokens of each row that the host has seen
    while following is not None:
        tokens = following
        reader.start(tokens)
        following = _decode(runner, sampler, texts, tokens, step) if look_ahead else None
        deliver(texts, [[token] for token in reader.finish()], stream)
        if all(text.finish_reason for text in texts):
            return
        if following is None:
            following = _decode(runner, sampler, texts, tokens, step)
        step += 1


def _decode(runner: Runner, sampler: Sampler, texts: Sequence[GrowingText], tokens: Tensor, step: int) -> Tensor | None:
    """The tokens after ``tokens``, which are number ``step`` of each row; None if no row wants them."""
    wanting = [text for text in texts if text.finish_reason is None and step + 1 < text.limit]
    if not wanting:
        return None
    longest = max(len(text.prompt) for text in wanting) + step
    if sampler.takes_maximum:
        return runner.decode_greedy(tokens, longest)
    return sampler(runner.decode(tokens, longest))


def _rounds(
    speculator: Speculator, texts: Sequence[GrowingText], tokens: Tensor, stream: StreamCallback | None
) -> SpeculationStats:
    """Decode a round of drafts at a time, from the first tokens, which the texts have already."""
    width = speculator.draft_tokens + 1
    reader = TokenReader((len(texts), width + 1), tokens.device)
    rounds = drafted = accepted = 0
    while active := [row for row, text in enumerate(texts) if text.finish_reason is None]:
        # the last token of a text is not in the cache yet
        longest = max(len(texts[row].prompt) + len(texts[row].token_ids) - 1 for row in active)
        tokens, outcome = speculator.round(tokens, longest)
        reader.start(outcome)
        values = reader.finish()
        rounds += len(active)
        drafted += len(active) * speculator.draft_tokens
        accepted += sum(values[row][width] for row in active)
        deliver(texts, [row[: row[width] + 1] for row in values], stream)
    return SpeculationStats(speculator.draft_tokens, rounds, drafted, accepted)
