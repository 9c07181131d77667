"""Perplexity of a text, by the protocol of the papers.

The default is what MaskLLM's, SparseGPT's and Wanda's tables of WikiText-2 use: the whole text is tokenised once, as
the tokenizer does it (so one BOS at its start, if the tokenizer writes one), and cut into windows of
min(4096, what the model was made for) tokens that do not overlap; the rest at the end is left out; every window is
read on its own, its first token is not predicted; perplexity is exp of the mean loss. Their formula,
exp(sum of window losses times window / all tokens), is the same number, since all windows are equally long.

Shortened LLaMA measures windows of 128, with and without BOS (``window=128``): Gemma is useless without one (650
against 21 on WikiText-2), so ``bos="window"`` puts one in front of every window. With a stride below the window,
every window but the first has ``window - stride`` tokens of context that are not scored again: slower, lower, and not
what the papers print.

Numbers are comparable only with equal tokenizer, window, stride and BOS; the result carries all of them.

Source: MaskLLM (arXiv 2409.17481), its evaluation of released masks; Shortened LLaMA (arXiv 2402.02834), section 4.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor

from sparsert.engine import LLM
from sparsert.errors import InputError
from sparsert.evaluate.scoring import score_sequences

#: Longest default window: MaskLLM's seqlen.
DEFAULT_WINDOW = 4096

BOS = ("text", "window", "none")

#: Mean losses beyond it cannot be exponentiated; no working model comes near.
_LARGEST_LOSS = 700.0

Item = TypeVar("Item")


@dataclasses.dataclass(frozen=True)
class PerplexityProtocol:
    """How a text is cut and scored.

    Attributes:
        window: tokens that the model reads at a time, BOS included; None: min(4096, the model's length).
        stride: tokens from one window's start to the next; None: the window, so they do not overlap.
        bos: ``text``: as the tokenizer does it, once; ``window``: in front of every window; ``none``.
        keep_tail: also score what is left over behind the last whole window.
        max_windows: only that many from the start; None: all.

    Raises:
        InputError: a value out of range.
    """

    window: int | None = None
    stride: int | None = None
    bos: str = "text"
    keep_tail: bool = False
    max_windows: int | None = None

    def __post_init__(self) -> None:
        if self.bos not in BOS:
            raise InputError(f"bos is {self.bos!r}; choose one of {', '.join(BOS)}")
        for name, least in (("window", 2), ("stride", 1), ("max_windows", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(f"{name} is {value}; it must be at least {least}")


@dataclasses.dataclass(frozen=True)
class PerplexityResult:
    """A perplexity and what it was measured on.

    Attributes:
        perplexity: exp of :attr:`loss`.
        loss: mean negative log-likelihood of a scored token, natural logarithm.
        scored_tokens: tokens that count.
        text_tokens: tokens of the whole text.
        windows: windows read.
        window, stride, bos: the protocol, defaults filled in.
        left_out_tokens: tokens behind the last window, which do not count.
        seconds: of scoring.
    """

    perplexity: float
    loss: float
    scored_tokens: int
    text_tokens: int
    windows: int
    window: int
    stride: int
    bos: str
    left_out_tokens: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return dataclasses.asdict(self)


def measure_perplexity(
    llm: LLM,
    text: str | Tensor,
    protocol: PerplexityProtocol | None = None,
    *,
    batch_size: int = 1,
    progress: bool = False,
) -> PerplexityResult:
    """Perplexity of ``text`` under a loaded model and its plan.

    Args:
        llm: the model; its tokenizer reads the text.
        text: the whole text, or its token ids, integers ``[tokens]``, as they are: of ``bos`` only ``window`` changes
            them. WikiText-2 is joined by two newlines in the papers.
        protocol: default that of the papers.
        batch_size: windows in one forward; changes speed and memory, not the protocol.
        progress: show a bar on standard error, if that is a terminal.

    Returns:
        The perplexity and what it was measured on. A text shorter than one window is one window.

    Raises:
        InputError: a window longer than the model's texts, a stride longer than the window, a text of fewer than two
            tokens, token ids that the model does not know, no BOS token where one is wanted, or losses that are not
            finite.
        CheckpointError: there is no tokenizer.
    """
    protocol = protocol or PerplexityProtocol()
    longest = llm.model.config.max_position_embeddings
    window = min(DEFAULT_WINDOW, longest) if protocol.window is None else protocol.window
    if window > longest:
        raise InputError(f"window is {window}; this model was made for {longest} tokens at most")
    prefix = _bos(llm) if protocol.bos == "window" else []
    text_room = window - len(prefix)
    stride = text_room if protocol.stride is None else protocol.stride
    if stride > text_room:
        raise InputError(f"stride is {stride}, longer than the {text_room} tokens of text that a window holds")
    tokens = _tokens(llm, text, add_bos=protocol.bos == "text")
    spans = _spans(len(tokens), text_room, stride, keep_tail=protocol.keep_tail)[: protocol.max_windows]
    sequences = [prefix + tokens[begin:end] for begin, end, _ in spans]
    if not sequences or len(sequences[0]) < 2:
        raise InputError(f"the text has {len(tokens)} tokens, so there is nothing to predict; give a longer one")
    started = time.perf_counter()
    losses: list[float] = []
    scored = 0
    batches = _with_progress(score_sequences(llm, sequences, batch_size=batch_size), len(sequences), progress)
    for (_, _, new), scores in zip(spans, batches, strict=True):
        # of a window that overlaps the one before, only what is new counts
        fresh = scores.log_likelihoods[-new:].double()
        losses.append(-float(fresh.sum()))
        scored += fresh.numel()
    loss = math.fsum(losses) / scored
    if not loss < _LARGEST_LOSS:
        dtype = llm.model.dtype
        advice = "use --dtype bfloat16" if dtype == torch.float16 else "look for damaged weights (`sparsert inspect`)"
        raise InputError(f"the mean loss is {loss}: the model overflows in {dtype}; {advice}")
    return PerplexityResult(
        perplexity=math.exp(loss),
        loss=loss,
        scored_tokens=scored,
        text_tokens=len(tokens),
        windows=len(spans),
        window=window,
        stride=stride,
        bos=protocol.bos,
        left_out_tokens=len(tokens) - spans[-1][1],
        seconds=time.perf_counter() - started,
    )


def _tokens(llm: LLM, text: str | Tensor, *, add_bos: bool) -> list[int]:
    if isinstance(text, str):
        # a tokenizer warns of texts longer than the model's, which is what the windows are for
        return list(llm.tokenizer.encode(text, add_special_tokens=add_bos, verbose=False))
    tokens: list[int] = text.tolist()
    highest = llm.model.config.vocab_size - 1
    if tokens and not 0 <= min(tokens) <= max(tokens) <= highest:
        raise InputError(
            f"the text holds token ids from {min(tokens)} to {max(tokens)}, the model knows 0 to {highest}; make the "
            "ids with this model's tokenizer"
        )
    return tokens


def _bos(llm: LLM) -> list[int]:
    token = llm.tokenizer.bos_token_id
    if token is None:
        raise InputError("bos is 'window', but this model's tokenizer has no BOS token; choose text or none")
    return [int(token)]


def _spans(count: int, room: int, stride: int, *, keep_tail: bool) -> list[tuple[int, int, int]]:
    """(begin, end, tokens that are new) of each window over a text of ``count`` tokens."""
    spans: list[tuple[int, int, int]] = []
    begin = done = 0
    while done < count:
        end = begin + room
        # a last window that is not full; the text's only one is kept, since there would be nothing else
        if end > count and spans and not keep_tail:
            break
        end = min(end, count)
        if end - begin < 2 and spans:
            break  # a lone token has nothing to be predicted from
        spans.append((begin, end, end - done))
        done = end
        begin += stride
    return spans


def _with_progress(items: Iterable[Item], total: int, progress: bool) -> Iterable[Item]:
    if not progress:
        return items
    from tqdm import tqdm

    bar: Iterable[Item] = tqdm(items, total=total, desc="scoring", unit="window", disable=None)
    return bar
