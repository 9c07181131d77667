"""The fastest of several ways of a library to compute one product, among those whose results are right.

A library with many kernels is a fair peer only with its best one for the shape and batch at hand. Its own search, if it
has one, looks only at speed, and some kernels give wrong or changing results for some shapes (pytorch issue 155333), so
here every candidate is run and compared before its time may count, and the winner is compared again after it has been
timed. Two rounds: all candidates over a few copies of the weight, then the best few over all copies. What it gives up:
seconds a shape and batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from sparsert.bench.timing import CaptureError, Replay, time_in_turn
from sparsert.errors import UnsupportedError, first_line

_FIRST_ROUND_COPIES = 4
_FINALISTS = 4


class Candidate(Protocol):
    """One way to compute a product; ``str`` names it."""

    def run(self, weight: Any, x: Tensor) -> Tensor:
        """The product, on the current stream; raises RuntimeError where the library refuses it."""


C = TypeVar("C", bound=Candidate)


@dataclasses.dataclass(frozen=True)
class Search(Generic[C]):
    """What a search found.

    Attributes:
        best: the fastest verified candidate.
        tried: how many ran.
        wrong: how many of them gave results beyond the tolerance.
        refused: how many the library or the capture refused.
    """

    best: C
    tried: int
    wrong: int
    refused: int

    def counts(self) -> dict[str, int]:
        """As a row of a record holds it."""
        return {"tried": self.tried, "wrong": self.wrong, "refused": self.refused}


def fastest_correct(
    library: str,
    candidates: Iterable[C],
    weights: Sequence[Any],
    x: Tensor,
    is_correct: Callable[[Tensor], bool],
) -> Search[C]:
    """Find the fastest candidate whose result is right.

    Args:
        library: whose candidates they are, for the message.
        candidates: what to try.
        weights: weights with equal contents as the candidates take them, to rotate over.
        x: the input as the candidates take it.
        is_correct: says whether what a candidate returned is right.

    Returns:
        The winner and how many others there were.

    Raises:
        UnsupportedError: no candidate computes this product correctly.
    """
    few = weights[:_FIRST_ROUND_COPIES]
    times: list[tuple[float, C]] = []
    tried = wrong = refused = 0
    refusal = ""
    for candidate in candidates:
        _keep_memory_free(x.device)
        try:
            result = candidate.run(weights[0], x)
            tried += 1
            if not is_correct(result):
                wrong += 1
                continue
            replay = _replay(candidate, few, x)
            replay.run()  # the first replay of a graph also uploads it
            times.append((min(replay.run(), replay.run()), candidate))
        except (torch.OutOfMemoryError, CaptureError):
            raise
        except RuntimeError as error:  # no such kernel, or not for this shape: the next one
            refused += 1
            refusal = refusal or first_line(error)
    times.sort(key=lambda pair: pair[0])
    finalists = {str(candidate): candidate for _, candidate in times[:_FINALISTS]}
    replays = {name: _replay(candidate, weights, x) for name, candidate in finalists.items()}
    final = time_in_turn(replays, repeats=5) if replays else {}
    for name in sorted(final, key=lambda name: final[name]["median"]):
        # some algorithms are right once and wrong later
        if all(is_correct(finalists[name].run(weight, x)) for weight in few):
            return Search(finalists[name], tried, wrong, refused)
        wrong += 1
    why = f"; {refused} refused, the first with: {refusal}" if refused else ""
    raise UnsupportedError(
        f"{library} runs this product with none of its algorithms correctly ({tried} tried, {wrong} wrong{why})"
    )


def _keep_memory_free(device: torch.device) -> None:
    """Give back what graphs of earlier candidates left, before it gets scarce: during a capture nothing can be."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        if free < total // 2:
            torch.cuda.empty_cache()


def _replay(candidate: Candidate, weights: Sequence[Any], x: Tensor) -> Replay:
    def run_all() -> None:
        for weight in weights:
            candidate.run(weight, x)

    return Replay(run_all, len(weights), x.device)
