"""A decode step on a CPU as the operators in it: every operator's own time, by the part of the model.

On a CPU nothing overlaps, so an operator's time is what it adds, and gaps are what is left of the step: Python.
A product is known by its operator's name, however the model calls it, and the last one of a step is the head;
attention layers are put inside a named range for as long as it is profiled, since rope and copies have no names
of their own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from torch.profiler import record_function

from sparsert.bench.step_parts import ATTENTION, GAPS, HEAD, LINEAR_OPERATORS, LINEARS, OTHER, PARTS, SAMPLING
from sparsert.bench.timeline import OperationTime, most_first
from sparsert.models import DecoderModel

#: Names of ranges start with it, so that no operator is taken for one.
_RANGE = "sparsert.bench: "
_STEP = _RANGE + "step"
_ATTENTION = _RANGE + "attention"


def step_range() -> contextlib.AbstractContextManager[Any]:
    """Everything inside is one step."""
    return record_function(_STEP)


@contextlib.contextmanager
def attention_ranges(model: DecoderModel) -> Iterator[None]:
    """Put attention layers inside ranges; taken away again at the end."""
    open_ranges: list[contextlib.AbstractContextManager[Any]] = []

    def enter(*_: Any) -> None:
        open_ranges.append(record_function(_ATTENTION))
        open_ranges[-1].__enter__()

    def leave(*_: Any) -> None:
        open_ranges.pop().__exit__(None, None, None)

    handles: list[Any] = []
    for module in model.blocks:
        block: Any = module
        if block.self_attn is not None:
            handles += [block.self_attn.register_forward_pre_hook(enter), block.self_attn.register_forward_hook(leave)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def read_operators(events: Sequence[Any], steps: int) -> tuple[dict[str, float], list[OperationTime]]:
    """Times of operators inside of steps.

    Args:
        events: of torch's profiler.
        steps: how many there are; times are means over them.

    Returns:
        (microseconds of a step by part, gaps included; operators, what adds most first).
    """
    places = [(event, place) for event in events if (place := _place_of(event)) is not None]
    heads: dict[int, Any] = {}
    for _, place in places:
        if place.linear is not None:
            last = heads.setdefault(id(place.step), place.linear)
            if place.linear.time_range.start > last.time_range.start:
                heads[id(place.step)] = place.linear
    spent = dict.fromkeys(PARTS, 0.0)
    by_name: dict[tuple[str, str], tuple[int, float]] = {}
    for event, place in places:
        part = GAPS if event.name.startswith(_RANGE) else _part_of(event, place, heads.get(id(place.step)))
        spent[part] += event.self_cpu_time_total / steps
        if part != GAPS:
            count, us = by_name.get((event.name, part), (0, 0.0))
            by_name[event.name, part] = count + 1, us + event.self_cpu_time_total
    operations = [OperationTime(*key, count // steps, us / steps) for key, (count, us) in by_name.items()]
    return spent, most_first(operations)


class _Place(NamedTuple):
    """Where in the model an operator runs.

    Attributes:
        step: the range of its step.
        linear: the outermost operator of a linear layer around it or itself, or None.
        in_attention: whether it is inside of an attention layer.
    """

    step: Any
    linear: Any
    in_attention: bool


def _place_of(event: Any) -> _Place | None:
    """The place of an event; None outside of a step."""
    linear, in_attention = None, False
    while event is not None:
        if event.name == _STEP:
            return _Place(event, linear, in_attention)
        if event.name in LINEAR_OPERATORS:
            linear = event
        in_attention |= event.name == _ATTENTION
        event = event.cpu_parent
    return None


def _part_of(event: Any, place: _Place, head: Any) -> str:
    if place.linear is not None:
        return HEAD if place.linear is head else LINEARS
    if place.in_attention:
        return ATTENTION
    return SAMPLING if head is not None and event.time_range.start > head.time_range.start else OTHER
