"""cuSPARSELt with the fastest of its algorithms that gives right results: the strongest peer for one linear layer.

``torch.sparse`` always takes algorithm 0, which is rarely the fastest. The library's own search looks only at
speed, and some algorithms return wrong or changing results for some shapes (pytorch issue 155333), so here
every candidate is run and compared before its time may count, and the winner is compared again after
it has been timed. Two rounds: all candidates over a few copies of the weight, then the best few over all
copies. The input is padded to what the library takes before the clock runs, which flatters the peer a
little at batches that are no multiple of eight. What it gives up: seconds a shape and batch.

Source: torch/sparse/semi_structured.py for layout and padding; ``torch._cslt_sparse_mm`` for the parameters.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sparsert.bench.timing import CaptureError, Replay, time_in_turn
from sparsert.errors import UnsupportedError

#: More algorithms than any version so far has; a number that does not exist is refused at once.
ALGORITHMS = 64

#: (split_k, split_k_mode): whole, and split in one kernel. Splitting the inputs serves few rows only.
_WHOLE = (1, -1)
_SPLITS = (_WHOLE, (2, 0), (4, 0))
_SPLIT_BATCH = 64

#: The library takes inputs of 16-bit numbers in multiples of this many rows.
ROW_MULTIPLE = 8

_FIRST_ROUND_COPIES = 4
_FINALISTS = 4


@dataclasses.dataclass(frozen=True)
class Algorithm:
    """One way of cuSPARSELt to run a product."""

    alg_id: int
    split_k: int
    split_k_mode: int

    def run(self, compressed: Tensor, x_t: Tensor) -> Tensor:
        """``W x``: compressed weight, ``x_t`` ``[in_features, rows]``; returns ``[out_features, rows]``."""
        return torch._cslt_sparse_mm(
            compressed, x_t, alg_id=self.alg_id, split_k=self.split_k, split_k_mode=self.split_k_mode
        )

    def __str__(self) -> str:
        split = f", split {self.split_k}" if self.split_k > 1 else ""
        return f"cuSPARSELt algorithm {self.alg_id}{split}"


@dataclasses.dataclass(frozen=True)
class Search:
    """What a search found.

    Attributes:
        best: the fastest verified algorithm.
        tried: how many ran.
        wrong: how many of them gave results beyond the tolerance.
        refused: how many the library or the capture refused.
    """

    best: Algorithm
    tried: int
    wrong: int
    refused: int


def search(copies: Sequence[Tensor], x_t: Tensor, is_correct: Callable[[Tensor], bool], batch: int) -> Search:
    """Find the fastest algorithm whose result is right.

    Args:
        copies: compressed weights with equal contents, to rotate over.
        x_t: ``[in_features, rows]``, rows a multiple of :data:`ROW_MULTIPLE`.
        is_correct: says whether a result ``[out_features, rows]`` is right.
        batch: rows that count.

    Returns:
        The winner and how many others there were.

    Raises:
        UnsupportedError: no algorithm runs this product correctly.
    """
    few = copies[:_FIRST_ROUND_COPIES]
    times: list[tuple[float, Algorithm]] = []
    tried = wrong = refused = 0
    for alg_id in range(ALGORITHMS):
        for split_k, mode in _SPLITS if batch <= _SPLIT_BATCH else (_WHOLE,):
            algorithm = Algorithm(alg_id, split_k, mode)
            try:
                result = algorithm.run(copies[0], x_t)
                tried += 1
                if not is_correct(result):
                    wrong += 1
                    continue
                replay = _replay(algorithm, few, x_t)
                replay.run()  # the first replay of a graph also uploads it
                times.append((min(replay.run(), replay.run()), algorithm))
            except (torch.OutOfMemoryError, CaptureError):
                raise
            except RuntimeError:  # no such algorithm, or not for this shape: the next one
                refused += 1
    times.sort(key=lambda pair: pair[0])
    finalists = {str(algorithm): algorithm for _, algorithm in times[:_FINALISTS]}
    replays = {name: _replay(algorithm, copies, x_t) for name, algorithm in finalists.items()}
    final = time_in_turn(replays, repeats=5) if replays else {}
    for name in sorted(final, key=lambda name: final[name]["median"]):
        # some algorithms are right once and wrong later
        if all(is_correct(finalists[name].run(compressed, x_t)) for compressed in few):
            return Search(finalists[name], tried, wrong, refused)
        wrong += 1
    raise UnsupportedError(
        f"cuSPARSELt runs this product with none of its algorithms correctly ({tried} tried, {wrong} wrong)"
    )


def _replay(algorithm: Algorithm, copies: Sequence[Tensor], x_t: Tensor) -> Replay:
    def run_all() -> None:
        for compressed in copies:
            algorithm.run(compressed, x_t)

    return Replay(run_all, len(copies), x_t.device)
