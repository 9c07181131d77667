"""The generation loop of one batch: prefill once, then decode until every text has ended.

All rows step together; one that has ended runs along until the last has. On a GPU the next step is
launched before the host looks at the tokens of this one, so Python's work on text and stop conditions
overlaps with the GPU's; when the last text ends by a stop condition, one step has run for nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sparsert.engine.params import SamplingParams
from sparsert.engine.results import Timings
from sparsert.engine.runner import Runner
from sparsert.engine.sampler import Sampler
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


class _TokenReader:
    """Brings tokens to the host; on a GPU the copy is queued first and waited for later."""

    def __init__(self, batch: int, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._host = torch.empty(batch, dtype=torch.int64, pin_memory=self._on_gpu)
        self._copied = torch.cuda.Event() if self._on_gpu else None

    def start(self, tokens: Tensor) -> None:
        self._host.copy_(tokens, non_blocking=self._on_gpu)
        if self._copied is not None:
            self._copied.record(torch.cuda.current_stream(tokens.device))

    def finish(self) -> list[int]:
        if self._copied is not None:
            self._copied.synchronize()
        values: list[int] = self._host.tolist()
        return values


def generate_batch(
    runner: Runner,
    texts: Sequence[GrowingText],
    params: SamplingParams,
    *,
    load_s: float = 0.0,
    stream: StreamCallback | None = None,
    look_ahead: bool | None = None,
) -> Timings:
    """Generate until every text has ended; the texts are changed in place.

    Args:
        texts: 1 to ``MAX_BATCH_SIZE`` texts without tokens, each with a limit of at least 1 that fits the runner.
        params: how to choose tokens.
        load_s: for the record.
        stream: called for each new token of each text.
        look_ahead: launch a step before the host has seen the tokens of the last; default on a GPU only,
            because on a CPU there is nothing to overlap with.
    """
    start = time.perf_counter()
    capture_before_s = runner.capture_s
    prompts = [text.prompt for text in texts]
    room = max(len(text.prompt) + text.limit for text in texts)
    device = runner.model.device
    look_ahead = device.type == "cuda" if look_ahead is None else look_ahead
    logits = runner.prefill(prompts, room)
    sampler = Sampler(params, prompts, runner.model.config.vocab_size, device)
    reader = _TokenReader(len(texts), device)
    tokens = sampler(logits)
    first = start
    step = 0  # tokens of each row that the host has seen
    while True:
        reader.start(tokens)
        # not ahead of the first token: its time is reported, and a graph may have to be captured
        ahead = _decode(runner, sampler, texts, tokens, step) if look_ahead and step else None
        values = reader.finish()
        if step == 0:
            first = time.perf_counter()
        _deliver(texts, values, stream)
        step += 1
        if all(text.finish_reason for text in texts):
            break
        following = ahead if ahead is not None else _decode(runner, sampler, texts, tokens, step - 1)
        assert following is not None, "a text that has not ended wants another token"
        tokens = following
    capture_s = runner.capture_s - capture_before_s
    decode_s = max(time.perf_counter() - first - capture_s, 0.0)
    new_tokens = sum(len(text.token_ids) for text in texts)
    decoded = new_tokens - len(texts)
    return Timings(
        load_s=load_s,
        batch_size=len(texts),
        prompt_tokens=sum(map(len, prompts)),
        new_tokens=new_tokens,
        prefill_ms=(first - start) * 1e3,
        capture_ms=capture_s * 1e3,
        decode_ms=decode_s * 1e3,
        decode_tok_per_s=decoded / decode_s if decoded and decode_s > 0 else 0.0,
    )


def _decode(runner: Runner, sampler: Sampler, texts: Sequence[GrowingText], tokens: Tensor, step: int) -> Tensor | None:
    """The tokens after ``tokens``, which are number ``step`` of each row; None if no row wants them."""
    wanting = [text for text in texts if text.finish_reason is None and step + 1 < text.limit]
    if not wanting:
        return None
    return sampler(runner.decode(tokens, max(len(text.prompt) for text in wanting) + step))


def _deliver(texts: Sequence[GrowingText], values: Sequence[int], stream: StreamCallback | None) -> None:
    for text, token in zip(texts, values, strict=True):
        if text.finish_reason is None:
            piece = text.push(token)
            if stream is not None:
                stream(text.index, piece, [token])
