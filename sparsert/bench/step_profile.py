"""Where the time of one decode step goes: torch's profiler over a step, sorted by the part of the model.

Every part of the model runs inside a named range, and each kernel belongs to the innermost range around the
operator that launched it:

    step
      linears                     q k v, o, gate up, down of every block
      attention                   attention over the cache, its mask, and writing keys and values
      norms, rope, activation     everything else between the embedding and the head
      head                        the projection onto the vocabulary
      sampling                    from logits to tokens
      gaps                        what is left of the step's time: no kernel runs

On a GPU kernel times come from steps launched one operator at a time, and the time of the whole step from the
CUDA graph that users run; gaps are the difference. Kernels that overlap (programmatic launch) can add up to
more than the step; they are then scaled to it, and ``overlap`` says by how much. On a CPU the times are those of
operators, the step is the profiled one, and gaps are Python.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from sparsert import ops
from sparsert.engine.cache import DecodeAttention, KVCache, PrefillAttention
from sparsert.engine.params import SamplingParams
from sparsert.engine.runner import Runner, window_for
from sparsert.engine.sampler import Sampler
from sparsert.models import DecoderModel
from sparsert.models.decoder import SelfAttention

LINEARS, ATTENTION, OTHER = "linears", "attention", "norms, rope, activation"
HEAD, SAMPLING, GAPS = "head", "sampling", "gaps"

#: In the order in which they are shown.
PARTS = (LINEARS, ATTENTION, OTHER, HEAD, SAMPLING, GAPS)

#: Names of ranges start with it, so that no operator is taken for one.
_RANGE = "sparsert.bench: "

_LENGTH_UNIT = 16
_WARM_UP_STEPS = 3


@dataclasses.dataclass(frozen=True)
class StepProfile:
    """Time inside one decode step.

    Attributes:
        parts_us: microseconds by name of :data:`PARTS`; they add up to ``step_us``.
        step_us: of the whole step, sampling included.
        overlap: sum of all kernel times over ``step_us`` if it is above 1, else 1.
    """

    parts_us: dict[str, float]
    step_us: float
    overlap: float


def profile_step(model: DecoderModel, batch: int, context: int, *, steps: int) -> StepProfile:
    """Profile decode steps.

    Args:
        model: on a CPU or GPU.
        batch: texts, at most what the engine runs at once.
        context: tokens in the cache before the first profiled step.
        steps: profiled steps, which are averaged; timed ones on a GPU are as many.
    """
    prompts = torch.randint(model.config.vocab_size, (batch, context)).tolist()
    with torch.inference_mode():
        events = _profiled_events(model, prompts, steps)
    spent = dict.fromkeys(PARTS, 0.0)
    on_gpu = model.device.type == "cuda"
    for event in events:
        part = _part_of(event)
        if part is None or event.name.startswith(_RANGE):
            continue
        spent[part] += sum(k.duration for k in event.kernels) if on_gpu else event.self_cpu_time_total
    spent = {part: value / steps for part, value in spent.items()}
    if on_gpu:
        step_us = _graph_step_us(model, prompts, steps)
    else:
        step_us = sum(e.cpu_time_total for e in events if e.name == _RANGE + "step") / steps
    busy = sum(spent.values())
    overlap = max(1.0, busy / step_us)
    spent = {part: value / overlap for part, value in spent.items()}
    spent[GAPS] = max(0.0, step_us - busy)
    return StepProfile(spent, step_us, overlap)


def _profiled_events(model: DecoderModel, prompts: list[list[int]], steps: int) -> list[Any]:
    from torch.profiler import ProfilerActivity, profile

    device, config = model.device, model.config
    batch, context = len(prompts), len(prompts[0])
    longest = context + _WARM_UP_STEPS + steps
    # as many positions as the engine's step reads
    length = -(-window_for(longest, config.max_position_embeddings) // _LENGTH_UNIT) * _LENGTH_UNIT
    model.reserve_positions_(length)
    cache = KVCache(model.attention_shapes, batch, length, device, model.dtype)
    tokens = torch.tensor(prompts, device=device)
    last = torch.full((batch,), context - 1, device=device)
    logits = model(tokens, PrefillAttention(cache), rows=last)
    sampler = Sampler(SamplingParams(), prompts, config.vocab_size, device)
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    chosen = sampler(logits)

    def step(number: int, chosen: Tensor) -> Tensor:
        with _range("step"):
            lengths = torch.full((batch,), context + number, device=device)
            with _range(ATTENTION):
                attention = _RangedAttention(DecodeAttention(cache, lengths, length))
            logits = model(chosen.unsqueeze(1), attention).squeeze(1)
            with _range(SAMPLING):
                return sampler(logits)

    with _ranges_in(model):
        for number in range(_WARM_UP_STEPS):
            chosen = step(number, chosen)
        _wait(device)
        with profile(activities=activities, acc_events=True) as profiler:
            for number in range(_WARM_UP_STEPS, _WARM_UP_STEPS + steps):
                chosen = step(number, chosen)
            _wait(device)
    return list(profiler.events() or [])


def _graph_step_us(model: DecoderModel, prompts: list[list[int]], steps: int) -> float:
    """Microseconds of a step as the engine runs it: the graph, then sampling, nothing waited for in between."""
    runner = Runner(model, model.config.max_position_embeddings)
    context = len(prompts[0])
    logits = runner.prefill(prompts, context + _WARM_UP_STEPS + steps)
    sampler = Sampler(SamplingParams(), prompts, model.config.vocab_size, model.device)
    tokens = sampler(logits)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    for number in range(_WARM_UP_STEPS + steps):
        if number == _WARM_UP_STEPS:
            _wait(model.device)
            begin.record(torch.cuda.current_stream(model.device))
        tokens = sampler(runner.decode(tokens, context + number))
    end.record(torch.cuda.current_stream(model.device))
    _wait(model.device)
    return float(begin.elapsed_time(end)) * 1e3 / steps


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _range(name: str) -> contextlib.AbstractContextManager[Any]:
    from torch.profiler import record_function

    return record_function(_RANGE + name)


class _RangedAttention:
    """Attention inside its range."""

    def __init__(self, attention: DecodeAttention) -> None:
        self._attention = attention

    def __call__(self, slot: int, heads: Tensor, layer: SelfAttention) -> Tensor | ops.Tiled:
        with _range(ATTENTION):
            return self._attention(slot, heads, layer)


@contextlib.contextmanager
def _ranges_in(model: DecoderModel) -> Iterator[None]:
    """Put linear layers and the head inside their ranges; taken away again at the end."""
    parts: list[tuple[nn.Module, str]] = [(model.lm_head, HEAD)]
    for module in model.blocks:
        block: Any = module
        for layer in (block.self_attn, block.mlp):
            if layer is not None:
                parts += [(child, LINEARS) for child in layer.children()]
    open_ranges: list[contextlib.AbstractContextManager[Any]] = []

    def enter(name: str) -> Any:
        def hook(*_: Any) -> None:
            open_ranges.append(_range(name))
            open_ranges[-1].__enter__()

        return hook

    def leave(*_: Any) -> None:
        open_ranges.pop().__exit__(None, None, None)

    handles: list[Any] = []
    for part, name in parts:
        handles += [part.register_forward_pre_hook(enter(name)), part.register_forward_hook(leave)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _part_of(event: Any) -> str | None:
    """The part an event belongs to, by the innermost range around it; None outside of a step."""
    while event is not None:
        if event.name.startswith(_RANGE):
            name = event.name.removeprefix(_RANGE)
            return OTHER if name == "step" else name
        event = event.cpu_parent
    return None
