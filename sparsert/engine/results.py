"""What generation gives back: texts, why they ended, and how long they took."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class SpeculationStats:
    """How drafts fared in one batch; a round is one draft of one text and its check.

    Attributes:
        draft_tokens: tokens drafted in a round.
        rounds: of all texts together.
        drafted: tokens drafted in them.
        accepted: drafted tokens that the full model took over.
        acceptance_rate: ``accepted / drafted``; 0 if none was drafted.
        tokens_per_round: accepted tokens and the one that the check itself gives, on average; 0 without a round.
    """

    draft_tokens: int
    rounds: int
    drafted: int
    accepted: int
    acceptance_rate: float = dataclasses.field(init=False)
    tokens_per_round: float = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "acceptance_rate", self.accepted / self.drafted if self.drafted else 0.0)
        object.__setattr__(self, "tokens_per_round", 1 + self.accepted / self.rounds if self.rounds else 0.0)


@dataclasses.dataclass(frozen=True)
class Timings:
    """Wall-clock times of one batch; every prompt of the batch has the same record.

    Attributes:
        load_s: seconds to load the model, once per process.
        batch_size: prompts that ran together.
        prompt_tokens: tokens of all prompts of the batch.
        new_tokens: tokens generated for all prompts of the batch.
        prefill_ms: from the start of the batch until its first tokens are on the host (TTFT), without ``capture_ms``.
        capture_ms: time spent on capturing CUDA graphs, of the prompt and of decode steps; 0 once all have run.
        decode_ms: from the first tokens until the last, without ``capture_ms``.
        decode_tok_per_s: tokens after the first of each prompt, per second of ``decode_ms``; 0 if none.
        speculation: how drafts fared; None without a draft.
    """

    load_s: float
    batch_size: int
    prompt_tokens: int
    new_tokens: int
    prefill_ms: float
    capture_ms: float
    decode_ms: float
    decode_tok_per_s: float
    speculation: SpeculationStats | None = None


@dataclasses.dataclass(frozen=True)
class Completion:
    """What was generated for one prompt.

    Attributes:
        index: place of the prompt in the call.
        prompt: the prompt as given.
        prompt_token_ids: its tokens, special ones included.
        text: the generated text without special tokens, cut before a stop string; empty if the
            checkpoint has no tokenizer.
        token_ids: the generated tokens, the one that ended the text included.
        finish_reason: ``"stop"`` (end token, stop token or stop string) or ``"length"``.
        timings: of the batch it ran in.
    """

    index: int
    prompt: object
    prompt_token_ids: tuple[int, ...]
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    timings: Timings
