"""cuSPARSELt with the fastest of its algorithms that gives right results.

``torch.sparse`` always takes algorithm 0, which is rarely the fastest; here all of them are tried (``search.py``), at
small batches also split over the inputs. The input is padded to what the library takes before the clock runs, which
flatters the peer a little at batches that are no multiple of eight.

Source: torch/sparse/semi_structured.py for layout and padding; ``torch._cslt_sparse_mm`` for the parameters.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sparsert.bench.search import Search, fastest_correct

#: More algorithms than any version so far has; a number that does not exist is refused at once.
ALGORITHMS = 64

#: (split_k, split_k_mode): whole, and split in one kernel. Splitting the inputs serves few rows only.
_WHOLE = (1, -1)
_SPLITS = (_WHOLE, (2, 0), (4, 0))
_SPLIT_BATCH = 64

#: The library takes inputs of 16-bit numbers in multiples of this many rows.
ROW_MULTIPLE = 8


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


def search(
    copies: Sequence[Tensor], x_t: Tensor, is_correct: Callable[[Tensor], bool], batch: int
) -> Search[Algorithm]:
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
    splits = _SPLITS if batch <= _SPLIT_BATCH else (_WHOLE,)
    algorithms = [Algorithm(alg_id, *split) for alg_id in range(ALGORITHMS) for split in splits]
    return fastest_correct("cuSPARSELt", algorithms, copies, x_t, is_correct)
