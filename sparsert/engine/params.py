"""How to choose tokens and when to stop: one frozen, checked record."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable

from sparsert.errors import InputError

#: torch.Generator.manual_seed takes 64 bits.
_MAX_SEED = 2**63 - 1


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """Sampling and stopping, the same for all prompts of a call.

    Attributes:
        max_new_tokens: most tokens to generate, at least 1.
        temperature: divides the logits; 0 takes the most likely token always (greedy).
        top_k: sample among the k most likely tokens; 0 is off.
        top_p: sample among the fewest tokens whose probabilities sum to at least this; 1 is off.
        min_p: sample among tokens at least this share as likely as the likeliest; 0 is off.
        repetition_penalty: above 1 makes tokens of prompt and output less likely; 1 is off.
        seed: same seed, same prompt, same text, whatever else is in the batch; None draws one.
        stop: strings that end a text, given as one string or several; the text is cut before them.
        stop_token_ids: tokens that end a text, besides the model's own end tokens.
        ignore_eos: go on past the model's end tokens.

    Raises:
        InputError: a value of the wrong type or out of range.

    Example:
        >>> SamplingParams(temperature=0.7, top_p=0.95, stop="\\n\\n").stop
        ('\\n\\n',)
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: str | Iterable[str] = ()
    stop_token_ids: Iterable[int] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        _check("max_new_tokens", self.max_new_tokens, _whole(self.max_new_tokens, 1), "a whole number, at least 1")
        _check("temperature", self.temperature, _between(self.temperature, 0, math.inf), "a number, 0 (greedy) or more")
        _check("top_k", self.top_k, _whole(self.top_k, 0), "a whole number, 0 for off")
        _check("top_p", self.top_p, _between(self.top_p, 0, 1) and self.top_p > 0, "above 0 and at most 1")
        _check("min_p", self.min_p, _between(self.min_p, 0, 1), "between 0 and 1")
        penalty = self.repetition_penalty
        _check("repetition_penalty", penalty, _between(penalty, 0, math.inf) and penalty > 0, "a number above 0")
        seed_fits = self.seed is None or _whole(self.seed, 0, _MAX_SEED)
        _check("seed", self.seed, seed_fits, f"a whole number between 0 and {_MAX_SEED}, or None")
        _check("stop", stop, all(isinstance(text, str) and text for text in stop), "strings that are not empty")
        tokens_fit = all(_whole(token, 0) for token in self.stop_token_ids)
        _check("stop_token_ids", self.stop_token_ids, tokens_fit, "token ids, 0 or more")

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature == 0


def _whole(value: object, least: int, most: float = math.inf) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _between(value: object, least: float, most: float) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and math.isfinite(value) and least <= value <= most  # type: ignore[arg-type, operator]


def _check(name: str, value: object, fits: bool, needed: str) -> None:
    if not fits:
        raise InputError(f"{name} is {value!r}; it must be {needed}")
