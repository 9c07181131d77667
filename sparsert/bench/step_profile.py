"""Where the time of one decode step goes, measured on the step that users run.

The engine's own runner decodes greedily, from the same place each time. On a GPU that is one CUDA graph a step:
once it is replayed alone, timed by CUDA events, and once under torch's profiler, whose timeline of kernels says
how the step is made up (:mod:`sparsert.bench.timeline`). The profiler itself costs time, so its shares are
applied to the time without it, and ``profiled_us`` shows how far the two are apart.

On a CPU the times are those of operators (:mod:`sparsert.bench.operator_times`), the step is the profiled one.
"""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from sparsert.bench.operator_times import attention_ranges, read_operators, step_range
from sparsert.bench.timeline import DeviceEvent, OperationTime, read_timeline
from sparsert.engine.runner import Runner
from sparsert.models import DecoderModel

#: They also capture the graph, and warm up clocks and caches.
_WARM_UP_STEPS = 3

#: A step is recognized by being repeated.
_LEAST_REPLAYS = 2

#: Positions that :func:`profile_step` may need beside the context and the steps.
SPARE_POSITIONS = _WARM_UP_STEPS + _LEAST_REPLAYS + 1


@dataclasses.dataclass(frozen=True)
class StepProfile:
    """Time inside one decode step.

    Attributes:
        parts_us: microseconds by name of :data:`sparsert.bench.step_parts.PARTS`; they add up to ``step_us``.
        step_us: of the whole step, from the end of the one before to its own end.
        profiled_us: the same under the profiler; on a CPU equal to ``step_us``.
        kernels: kernels, copies and fills in the step; None on a CPU.
        largest_gap_us: longest time between kernels inside the step in which nothing ran, under the profiler; None
            on a CPU.
        operations: kernels, on a CPU operators, by name, what adds most to ``step_us`` first.
    """

    parts_us: dict[str, float]
    step_us: float
    profiled_us: float
    kernels: int | None
    largest_gap_us: float | None
    operations: tuple[OperationTime, ...]


def profile_step(model: DecoderModel, batch: int, context: int, *, steps: int) -> StepProfile:
    """Profile decode steps.

    Args:
        model: on a CPU or GPU.
        batch: texts, at most what the engine runs at once.
        context: tokens in the cache before the first step; the model needs room for these, the steps and
            :data:`SPARE_POSITIONS`.
        steps: on a GPU as many are timed, and the median one of as many is looked into (at least two); on a CPU they
            are averaged.

    Raises:
        UnsupportedError: the profiler's record cannot be cut into steps.
    """
    if model.device.type == "cuda":
        return _profile_graph(model, batch, context, max(steps, _LEAST_REPLAYS))
    decoding = _Decoding(model, batch, context, steps)
    with attention_ranges(model):
        decoding.begin()
        events = _profiled(decoding, steps, ProfilerActivity.CPU)
    parts_us, operations = read_operators(events, steps)
    step_us = sum(parts_us.values())
    return StepProfile(parts_us, step_us, step_us, None, None, tuple(operations))


def _profile_graph(model: DecoderModel, batch: int, context: int, steps: int) -> StepProfile:
    # one step more: the first kernels after its start may escape the profiler
    decoding = _Decoding(model, batch, context, steps + 1)
    step_us = _timed_us(decoding, steps, model.device)
    decoding.begin()
    events = _profiled(decoding, steps + 1, ProfilerActivity.CUDA)
    timeline = read_timeline(_device_events(events), steps)
    scale = step_us / timeline.span_us
    return StepProfile(
        {part: us * scale for part, us in timeline.parts_us.items()},
        step_us,
        timeline.span_us,
        timeline.kernels,
        timeline.largest_gap_us,
        tuple(dataclasses.replace(operation, us=operation.us * scale) for operation in timeline.operations),
    )


class _Decoding:
    """Greedy decoding of random prompts by the engine, which can begin again from the same place."""

    def __init__(self, model: DecoderModel, batch: int, context: int, steps: int) -> None:
        prompts = torch.randint(model.config.vocab_size, (batch, context)).tolist()
        room = context + _WARM_UP_STEPS + steps
        self._device = model.device
        self._runner = Runner(model, model.config.max_position_embeddings)
        self._first = self._runner.prefill(prompts, room).argmax(dim=-1)
        self._tokens = self._first
        self._lengths = self._runner.lengths
        # the same for all steps, so that they read one window of the cache and are one graph
        self._longest = room - 1

    def begin(self) -> None:
        """Go back to behind the prompts and warm up; steps after that are graphs alone, nothing is copied for them."""
        self._runner.place_(self._lengths)
        self._tokens = self._first
        for _ in range(_WARM_UP_STEPS):
            self.step()
        self.wait()

    def step(self) -> None:
        """Decode one token of each text; nothing waits for a GPU."""
        self._tokens = self._runner.decode_greedy(self._tokens, self._longest)

    def wait(self) -> None:
        """Until all steps are done."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def _timed_us(decoding: _Decoding, steps: int, device: torch.device) -> float:
    """Microseconds of a step by CUDA events around all of them."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    decoding.begin()
    decoding.step()  # keeps the GPU busy while the first timed step is launched
    begin.record(torch.cuda.current_stream(device))
    for _ in range(steps):
        decoding.step()
    end.record(torch.cuda.current_stream(device))
    decoding.wait()
    return float(begin.elapsed_time(end)) * 1e3 / steps


def _profiled(decoding: _Decoding, steps: int, activity: ProfilerActivity) -> list[Any]:
    """What torch's profiler sees of some steps."""
    with profile(activities=[activity], acc_events=True) as profiler:
        for _ in range(steps):
            with step_range() if activity is ProfilerActivity.CPU else contextlib.nullcontext():
                decoding.step()
        decoding.wait()
    return list(profiler.events() or [])


def _device_events(events: list[Any]) -> list[DeviceEvent]:
    """What ran on the GPU: kernels, copies, fills; not the host's calls, nor named ranges drawn on the device."""
    return [
        DeviceEvent(event.time_range.start, event.time_range.end, event.name)
        for event in events
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation
    ]
