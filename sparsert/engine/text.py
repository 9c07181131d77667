"""From tokens to text as they come: whole characters only, and never past a stop string.

A token may end in the middle of a character (byte-level vocabularies) and may decode differently after
its neighbour (the leading space of sentencepiece). So text is taken from the difference of two decoded
windows, the longer one with the new token, and is held back while it ends in U+FFFD, the mark of an
unfinished character. The window starts with the end of the prompt, which gives the first token its
space. Windows are short, so the work per token does not grow with the text.

Source: the two-offset window of Hugging Face text-generation-inference, which vLLM uses as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

#: Tokens of the prompt in the first window; a character of any script takes at most four byte tokens.
_CONTEXT_TOKENS = 6

_UNFINISHED = "\ufffd"


class Detokenizer(Protocol):
    """The part of a tokenizer that is needed here."""

    def decode(self, token_ids: list[int], /, *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool) -> str:
        """Text of some tokens."""
        ...


class TextStream:
    """Text of a growing list of tokens."""

    def __init__(self, tokenizer: Detokenizer, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._tokens = list(prompt[-_CONTEXT_TOKENS:])
        self._window = 0  # where both windows start
        self._given = len(self._tokens)  # tokens whose text has been given out

    def push(self, token: int) -> str:
        """Add a token; return the text that became certain, maybe none."""
        self._tokens.append(token)
        text = self._pending()
        if not text or text.endswith(_UNFINISHED):
            return ""
        self._window, self._given = self._given, len(self._tokens)
        return text

    def flush(self) -> str:
        """What was held back, unfinished characters as U+FFFD."""
        text = self._pending()
        self._window, self._given = self._given, len(self._tokens)
        return text

    def _pending(self) -> str:
        return self._decode(self._tokens[self._window :])[len(self._decode(self._tokens[self._window : self._given])) :]

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


class StopScanner:
    """Lets text through up to the first stop string; holds back what might become one."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """Add text; return what can be shown. Sets :attr:`stopped` when a stop string is complete."""
        if self.stopped:
            return ""
        self._held += text
        places = [place for place in map(self._held.find, self._stop) if place >= 0]
        if places:
            self.stopped = True
            shown, self._held = self._held[: min(places)], ""
            return shown
        keep = max((_overlap(self._held, stop) for stop in self._stop), default=0)
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown

    def flush(self) -> str:
        """What was held back, at the end of a text."""
        shown, self._held = self._held, ""
        return shown


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that begins ``stop`` without completing it."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
