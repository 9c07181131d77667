"""What a chart of the report holds, apart from how it is drawn.

A figure is plain data: axes with their ticks, series of points, guides, bars. ``svg`` draws
it for the page and ``png`` through matplotlib, so both show the same. Colours are slots,
not colours: a contender keeps its slot (colour and marker shape) in every figure, and the
stylesheet gives a slot one colour for light and one for dark pages.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from sparsert.bench.report.numbers import digits

#: Slots with a fixed meaning; everything else takes the free ones in order of appearance.
SLOTS = {
    "dense": 0,
    "ours": 1,
    "2:4": 1,
    "2:4 + blocks removed": 2,
    "blocks removed": 3,
    "ours-triton": 4,
    "hf": 4,
    "torch-sparse": 5,
    "cusparselt": 6,
    "hf-compile": 6,
    "vllm": 7,
}
SLOT_COUNT = 8


def slots(names: Iterable[str]) -> dict[str, int]:
    """A slot for every name: fixed ones first, the others in order from the highest free slot."""
    wanted = list(dict.fromkeys(names))
    chosen = {name: SLOTS[name] for name in wanted if name in SLOTS}
    free = [slot for slot in reversed(range(SLOT_COUNT)) if slot not in chosen.values()] or [SLOT_COUNT - 1]
    others = [name for name in wanted if name not in chosen]
    return chosen | {name: free[index % len(free)] for index, name in enumerate(others)}


@dataclass(frozen=True)
class Axis:
    """One axis: ``low`` to ``high``, linear or logarithmic, ticks as (value, text)."""

    label: str
    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]
    log: bool = False

    def share(self, value: float) -> float:
        """Where a value stands, 0 at the low end and 1 at the high end."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


@dataclass(frozen=True)
class Point:
    """One measurement; ``text`` says it in words, ``checked`` is False where the result was not compared.

    ``tail`` is the x of the end of a whisker to the right of the point, if it has one.
    """

    x: float
    y: float
    text: str
    checked: bool = True
    tail: float | None = None


@dataclass(frozen=True)
class Series:
    """Points of one contender in order of x. ``named`` writes the name beside the last point."""

    name: str
    slot: int
    points: tuple[Point, ...]
    joined: bool = True
    named: bool = True


@dataclass(frozen=True)
class Guide:
    """A straight reference line such as a roof.

    Its name stands left of the line at the share ``at`` of its length, or with the names of the series at
    the right edge where that is None.
    """

    name: str
    points: tuple[tuple[float, float], tuple[float, float]]
    at: float | None = None


@dataclass(frozen=True)
class Plot:
    """Points over two axes."""

    slug: str
    title: str
    subtitle: str
    x: Axis
    y: Axis
    series: tuple[Series, ...]
    guides: tuple[Guide, ...] = ()

    @property
    def summary(self) -> str:
        """The plot in one sentence, for those who do not see it."""
        names = ", ".join(dict.fromkeys(series.name for series in self.series))
        return f"{self.title}, {self.subtitle}: {self.y.label} by {self.x.label} of {names}; numbers in the table."


@dataclass(frozen=True)
class Segment:
    """A piece of a bar: its name, slot, length in the unit of the bars, and its text; hollow if not checked."""

    name: str
    slot: int
    value: float
    text: str
    checked: bool = True


@dataclass(frozen=True)
class Bar:
    """One horizontal bar, or one group of them below each other."""

    name: str
    total: str
    segments: tuple[Segment, ...]


@dataclass(frozen=True)
class Bars:
    """Horizontal bars over one common scale that starts at zero. ``stacked`` pieces follow each other."""

    slug: str
    title: str
    subtitle: str
    bars: tuple[Bar, ...]
    stacked: bool = True

    @property
    def high(self) -> float:
        """The length of the longest bar."""
        lengths = [[segment.value for segment in bar.segments] for bar in self.bars]
        return max((sum(group) if self.stacked else max(group, default=0.0) for group in lengths), default=0.0) or 1.0

    @property
    def summary(self) -> str:
        """The bars in one sentence, for those who do not see them."""
        said = "; ".join(
            f"{bar.name} {bar.total}".strip() + ": " + ", ".join(f"{piece.name} {piece.text}" for piece in bar.segments)
            for bar in self.bars
        )
        return f"{self.title}, {self.subtitle}: {said}."


Figure = Plot | Bars


def linear_axis(label: str, values: Iterable[float], *, steps: int = 5, from_zero: bool = True) -> Axis:
    """An axis with about ``steps`` round ticks around the values.

    >>> linear_axis("speed-up", [0.4, 1.9]).ticks
    ((0.0, '0'), (0.5, '0.5'), (1.0, '1'), (1.5, '1.5'), (2.0, '2'))
    """
    found = list(values) or [1.0]
    low = 0.0 if from_zero else min(found)
    high = max(found)
    span = (high - low) or abs(high) or 1.0
    scale = 10.0 ** math.floor(math.log10(span / steps))
    step = next(scale * nice for nice in (1, 2, 2.5, 5, 10) if scale * nice >= span / steps * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    if first == last:
        last += 1
    ticks = tuple((index * step, f"{index * step:,.10g}") for index in range(first, last + 1))
    return Axis(label, first * step, last * step, ticks)


def time_axis(label: str, values: Iterable[float]) -> Axis:
    """From zero, or logarithmic where the longest is more than four times the shortest.

    >>> time_axis("ms", [2.0, 3.0]).log, time_axis("ms", [3.0, 36.0]).log
    (False, True)
    """
    found = [value for value in values if value > 0] or [1.0]
    return decade_axis(label, found) if max(found) > 4 * min(found) else linear_axis(label, found)


def doubling_axis(label: str, values: Iterable[float]) -> Axis:
    """A logarithmic axis whose ticks are the values themselves, for batch sizes."""
    found = sorted(set(values)) or [1.0]
    low, high = found[0], found[-1]
    if low == high:
        low, high = low / 2, high * 2
    ticks: list[tuple[float, str]] = []
    for value in found:
        # at least two thirds of a doubling apart, so that the numbers do not touch
        if not ticks or math.log2(value / ticks[-1][0]) >= max(0.66, math.log2(high / low) / 16):
            ticks.append((value, f"{value:.10g}"))
    return Axis(label, low, high, tuple(ticks), log=True)


def decade_axis(label: str, values: Sequence[float]) -> Axis:
    """A logarithmic axis with ticks at 1, 10, 100, ... that leaves a little room around the values."""
    low, high = min(values) / 1.3, max(values) * 1.3
    ticks = []
    for exponent in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1):
        ticks += [10.0**exponent]
    if sum(low <= tick <= high for tick in ticks) < 3:
        ticks = sorted([*ticks, *(tick * 2 for tick in ticks), *(tick * 5 for tick in ticks)])
    inside = tuple(
        (tick, f"{tick:,.10g}" if tick >= 0.001 else digits(tick, 1)) for tick in ticks if low <= tick <= high
    )
    return Axis(label, low, high, inside, log=True)
