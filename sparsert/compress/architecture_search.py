"""Which narrower or shorter architecture fits a budget of parameters, bytes or microseconds.

All sizes on a grid are counted, those within the budget and close below it are kept, and the kept ones are put in an
order by how much importance they retain. That order is rough: the paper trains each of the fifteen or so candidates
for a few hundred steps, after which their ranking no longer changes. :mod:`sparsert.jobs.prune_width` does the same
with the first few: trims, measures, and trains them for as long as it is told.

A budget counts what a decode step reads: block weights, dense or packed 2:4, norms left out, and the head; the
embedding, of which a step reads one row, counts as parameters and bytes but takes no time, and nothing if the head
shares it.

Source: Muralidharan et al. (arXiv 2407.14679), section 2.4; limits on how much is cut at once: NVIDIA Model Optimizer's
pruning guide, 40 % of each width and 20 % of the blocks.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator

from sparsert.compress.latency_table import LatencyTable, Layer, block_layers
from sparsert.compress.width import MULTIPLE, Widths
from sparsert.errors import InputError

BUDGETS = ("parameters", "bytes", "us")

#: Candidates within this share below the budget are kept.
_TOLERANCE = 0.05

#: About so many values of a size are tried.
_STEPS = 12


@dataclasses.dataclass(frozen=True)
class ModelShape:
    """What a model's cost follows from, beside its widths.

    Attributes:
        widths: of every block.
        blocks: how many.
        vocabulary: rows of embedding and head.
        tied: the head shares the embedding's matrix.
        gated: the feed-forward layer has a gate.
    """

    widths: Widths
    blocks: int
    vocabulary: int
    tied: bool
    gated: bool

    def layers(self, *, sparse: bool = False) -> list[Layer]:
        """All linear layers of a decode step."""
        block = block_layers(self.widths, gated=self.gated, sparse=sparse)
        return [*block * self.blocks, Layer("head", self.vocabulary, self.widths.hidden)]

    @property
    def parameters(self) -> int:
        """Weights of blocks, embedding and head; norms and biases left out."""
        block = sum(layer.out_features * layer.in_features for layer in block_layers(self.widths, gated=self.gated))
        return self.blocks * block + self._matrices * self.vocabulary * self.widths.hidden

    def nbytes(self, *, sparse: bool = False) -> int:
        """Bytes of those at 16 bits a value, block weights packed 2:4 or dense."""
        block = sum(layer.nbytes for layer in block_layers(self.widths, gated=self.gated, sparse=sparse))
        return self.blocks * block + self._matrices * 2 * self.vocabulary * self.widths.hidden

    @property
    def _matrices(self) -> int:
        return 1 if self.tied else 2


@dataclasses.dataclass(frozen=True)
class Budget:
    """What a model may cost.

    Attributes:
        kind: of :data:`BUDGETS`: parameters, bytes of weights, or microseconds of a decode step's linear layers.
        value: the most.
        sparse: block weights will be packed 2:4.
        table: needed for microseconds.

    Raises:
        InputError: unknown kind, no positive value, or microseconds without a table.
    """

    kind: str
    value: float
    sparse: bool = False
    table: LatencyTable | None = None

    def __post_init__(self) -> None:
        if self.kind not in BUDGETS:
            raise InputError(f"budget of {self.kind!r} is not known; choose one of {', '.join(BUDGETS)}")
        if not self.value > 0:
            raise InputError(f"a budget of {self.value} {self.kind} cannot be met; it must be above 0")
        if self.kind == "us" and self.table is None:
            raise InputError("a budget of microseconds needs measured times; give a record of `sparsert bench kernels`")

    def cost(self, shape: ModelShape) -> float:
        """What a model costs, in the budget's unit."""
        if self.kind == "parameters":
            return float(shape.parameters)
        if self.kind == "bytes":
            return float(shape.nbytes(sparse=self.sparse))
        assert self.table is not None
        return self.table.total(shape.layers(sparse=self.sparse)).us


@dataclasses.dataclass(frozen=True)
class SearchLimits:
    """How far a search goes.

    Attributes:
        width: most share of each size that is cut.
        depth: most share of the blocks that is cut; 0: none.
        multiple: of hidden and intermediate.

    Raises:
        InputError: a share outside [0, 1), or a multiple below 1.
    """

    width: float = 0.4
    depth: float = 0.0
    multiple: int = MULTIPLE

    def __post_init__(self) -> None:
        for name in ("width", "depth"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; the share to cut must be in [0, 1)")
        if self.multiple < 1:
            raise InputError(f"multiple is {self.multiple}; it must be at least 1")


def find_candidates(
    whole: ModelShape,
    budget: Budget,
    limits: SearchLimits,
    *,
    accept: Callable[[Widths], bool] = lambda widths: True,
) -> list[ModelShape]:
    """Architectures within a budget and close to it.

    Args:
        whole: the model to cut.
        budget: what the result may cost.
        limits: how far to cut.
        accept: says whether a model of these widths can exist; transformers wants hidden to be a multiple of the heads.

    Returns:
        Those within 5 % below the budget, or the one that comes closest if none does; the most expensive first.

    Raises:
        InputError: nothing fits; the message has the least that can be reached.
    """
    costs: list[tuple[float, ModelShape]] = []
    for widths in _grid(whole.widths, limits):
        if accept(widths):
            for blocks in range(whole.blocks, max(1, round(whole.blocks * (1 - limits.depth))) - 1, -1):
                shape = dataclasses.replace(whole, widths=widths, blocks=blocks)
                costs.append((budget.cost(shape), shape))
    fitting = sorted((entry for entry in costs if entry[0] <= budget.value), key=lambda entry: -entry[0])
    if not fitting:
        least = min((cost for cost, _ in costs), default=float("nan"))
        raise InputError(
            f"no architecture fits {budget.value:,.0f} {budget.kind}: the smallest within the limits (cut at most "
            f"{limits.width:.0%} of a width and {limits.depth:.0%} of the blocks) takes {least:,.0f}; raise the "
            f"budget, or cut further in several rounds with recovery between them"
        )
    near = [shape for cost, shape in fitting if cost >= (1 - _TOLERANCE) * budget.value]
    return near or [fitting[0][1]]


def _grid(whole: Widths, limits: SearchLimits) -> Iterator[Widths]:
    hidden = _sizes(whole.hidden, limits)
    intermediate = _sizes(whole.intermediate, limits)
    least_heads = whole.heads * (1 - limits.width)
    heads = [
        (kv_heads * group, kv_heads)
        for kv_heads in range(whole.kv_heads, 0, -1)
        for group in range(whole.group, 0, -1)
        # either fewer groups or smaller ones: both at once cut the same heads twice
        if kv_heads * group >= least_heads and (group == whole.group or kv_heads == whole.kv_heads)
    ]
    for channels, neurons, (queries, kv_heads) in itertools.product(hidden, intermediate, heads):
        yield Widths(channels, neurons, queries, kv_heads, whole.head_dim)


def _sizes(whole: int, limits: SearchLimits) -> list[int]:
    """The whole size, and multiples below it, a dozen at most."""
    least = whole * (1 - limits.width)
    step = max(1, round((whole - least) / _STEPS / limits.multiple)) * limits.multiple
    first = (whole - 1) // limits.multiple * limits.multiple
    return [whole, *(size for size in range(first, 0, -step) if size >= least)]
