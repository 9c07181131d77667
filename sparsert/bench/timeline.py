"""A decode step as the timeline of its kernels: what each of them adds.

Kernels of a step overlap by design. Under programmatic dependent launch the next one asks for its weights while
the last one ends, so durations add up to more than the step, and a duration says little about what would be won
without the kernel. What counts is by how much a kernel moves the end of all that ran so far:

    kernel a   |##########|                         share of a   10
    kernel b         |#########|                    share of b    5    the first half ran beside a
    kernel c             |##|                       share of c    0    over before b was
    kernel d                      |####|            gap           4
                                                    share of d    6
               ------------- time ------------->

Shares and gaps add up to the span exactly. What it gives up: where two kernels run side by side, the later one
gets the blame for what is left, whoever held the memory meanwhile.

Replays of one graph are the same kernels over and over, which is how steps are told apart: the shortest sequence
of names that the end of the record repeats. What the profiler saw, or missed, before that is left out. Of all
steps the one of median length is shown, so every number belongs to one real step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from sparsert.bench.step_parts import GAPS, PARTS, parts_of_kernels
from sparsert.errors import UnsupportedError


@dataclasses.dataclass(frozen=True, order=True)
class DeviceEvent:
    """A kernel, copy or fill on the device; ``start_us`` and ``end_us`` on any clock, in microseconds."""

    start_us: float
    end_us: float
    name: str


@dataclasses.dataclass(frozen=True)
class OperationTime:
    """All kernels (on a CPU operators) of one name and part in a step.

    Attributes:
        name: as the profiler has it.
        part: one of :data:`sparsert.bench.step_parts.PARTS`.
        count: how many there are in a step.
        us: microseconds that they add to the step, all together.
    """

    name: str
    part: str
    count: int
    us: float


@dataclasses.dataclass(frozen=True)
class Timeline:
    """One step out of many.

    Attributes:
        parts_us: microseconds by part, gaps included; they add up to ``span_us``.
        span_us: from the end of the step before to the end of this one.
        kernels: kernels, copies and fills.
        largest_gap_us: longest time inside the step in which nothing ran; the one in front of its first kernel,
            where the next graph is launched, does not count.
        operations: what adds most first.
    """

    parts_us: dict[str, float]
    span_us: float
    kernels: int
    largest_gap_us: float
    operations: tuple[OperationTime, ...]


def read_timeline(events: Sequence[DeviceEvent], steps: int) -> Timeline:
    """The step of median length among the last ``steps`` of a record.

    Args:
        events: in any order, of one device; what comes before the steps may be anything shorter than two of them.
        steps: at least 2.

    Returns:
        The step; of an even number of steps the shorter of the two in the middle.

    Raises:
        UnsupportedError: the record does not end with so many equal steps.
    """
    events = sorted(events)
    names = [event.name for event in events]
    period = _period(names, steps)
    first = len(events) - steps * period
    end = max((event.end_us for event in events[:first]), default=events[first].start_us)
    gaps, shares = [], []
    for event in events[first:]:
        gaps.append(max(0.0, event.start_us - end))
        shares.append(max(0.0, event.end_us - max(end, event.start_us)))
        end = max(end, event.end_us)
    spans = [sum(gaps[at : at + period]) + sum(shares[at : at + period]) for at in range(0, len(gaps), period)]
    middle = sorted(range(steps), key=spans.__getitem__)[(steps - 1) // 2]
    inside = slice(middle * period, (middle + 1) * period)
    return _summarize(names[-period:], gaps[inside], shares[inside])


def _period(names: list[str], steps: int) -> int:
    """Kernels of a step: the length of the shortest sequence of names that the end of the record repeats.

    If that were only a part of the step, two steps or more would be left over before the repeats.
    """
    for period in range(1, len(names) // steps + 1):
        if names[-steps * period :] == names[-period:] * steps and len(names) - steps * period < 2 * period:
            return period
    raise UnsupportedError(
        f"the profiler recorded {len(names)} kernels, which do not end with {steps} equal steps; see that nothing else "
        "in this process uses the GPU and no other profiler is attached to it, and measure again, perhaps with fewer "
        "--steps"
    )


def _summarize(names: list[str], gaps: list[float], shares: list[float]) -> Timeline:
    parts = parts_of_kernels(names)
    spent = dict.fromkeys(PARTS, 0.0)
    by_name: dict[tuple[str, str], tuple[int, float]] = {}
    for name, part, share in zip(names, parts, shares, strict=True):
        spent[part] += share
        count, us = by_name.get((name, part), (0, 0.0))
        by_name[name, part] = count + 1, us + share
    spent[GAPS] = sum(gaps)
    operations = [OperationTime(name, part, count, us) for (name, part), (count, us) in by_name.items()]
    return Timeline(spent, sum(spent.values()), len(names), max(gaps[1:], default=0.0), tuple(most_first(operations)))


def most_first(operations: Sequence[OperationTime]) -> list[OperationTime]:
    """Sorted by what they add."""
    return sorted(operations, key=lambda operation: -operation.us)
