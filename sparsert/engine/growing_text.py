"""One text while it is generated: its tokens, its text so far, and whether it has ended."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from sparsert.engine.text import Detokenizer, StopScanner, TextStream

#: Called as text comes: (index of the prompt, new text, new token ids).
StreamCallback = Callable[[int, str, list[int]], None]


class GrowingText:
    """One text while it is generated.

    Attributes:
        index: place of the prompt in the call.
        prompt: its token ids.
        limit: most tokens to generate.
        token_ids: generated so far.
        finish_reason: ``"stop"`` or ``"length"`` once it has ended.
    """

    def __init__(
        self,
        index: int,
        prompt: list[int],
        limit: int,
        stop_tokens: frozenset[int],
        stop: Sequence[str],
        tokenizer: Detokenizer | None,
    ) -> None:
        self.index = index
        self.prompt = prompt
        self.limit = limit
        self.token_ids: list[int] = []
        self.finish_reason: str | None = None
        self._stop_tokens = stop_tokens
        self._stream = TextStream(tokenizer, prompt) if tokenizer is not None else None
        self._scanner = StopScanner(stop)
        self._pieces: list[str] = []

    @property
    def text(self) -> str:
        """Text so far, without what may still become a stop string."""
        return "".join(self._pieces)

    def push(self, token: int) -> str:
        """Add a token; return the text that it makes certain and set ``finish_reason`` if it ends the text."""
        self.token_ids.append(token)
        piece = ""
        if token in self._stop_tokens:
            self.finish_reason = "stop"
        else:
            if self._stream is not None:
                piece = self._scanner.push(self._stream.push(token))
            if len(self.token_ids) >= self.limit:
                self.finish_reason = "length"
        if self.finish_reason is not None and self._stream is not None:
            piece += self._scanner.push(self._stream.flush())
            piece += self._scanner.flush()
        if self._scanner.stopped:
            self.finish_reason = "stop"
        self._pieces.append(piece)
        return piece


def deliver(texts: Sequence[GrowingText], tokens: Sequence[Iterable[int]], stream: StreamCallback | None) -> None:
    """Give each text its new tokens, in order, until it ends; what comes behind its end is dropped."""
    for text, new in zip(texts, tokens, strict=True):
        for token in new:
            if text.finish_reason is not None:
                break
            piece = text.push(token)
            if stream is not None:
                stream(text.index, piece, [token])
