"""Our own engine as one of the contenders of a latency or throughput run.

Times come from the loop that users run: the stream callback of ``generate_batch`` says when each token was on
the host. On a GPU every decode step also lies between two CUDA events, whose distance is the step without
what the host does beside it. ``torch-sparse`` is this same engine with every packed layer handed to
``torch.sparse``, so that the two differ in the kernel and in nothing else.
"""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from sparsert import ops
from sparsert.bench.card import stored_bytes
from sparsert.bench.correctness import LogitsReference
from sparsert.bench.effort import Effort
from sparsert.bench.memory import PeakMemory
from sparsert.bench.metrics import Run, spread_ms
from sparsert.bench.subject import Subject, build_model, replace_packed_
from sparsert.bench.workload import Setting, random_prompts
from sparsert.engine.generate import generate_batch
from sparsert.engine.growing_text import GrowingText
from sparsert.engine.params import SamplingParams
from sparsert.engine.runner import MAX_BATCH_SIZE, Runner
from sparsert.engine.step_kernels import attention_kernel, linear_kernel
from sparsert.errors import UnsupportedError
from sparsert.models import DecoderModel
from sparsert.nn import SparseLinear


class TimedRunner(Runner):
    """A runner that puts every decode step between two CUDA events; on a CPU it is the runner as it is."""

    def __init__(self, model: DecoderModel, max_length: int) -> None:
        super().__init__(model, max_length)
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def decode(self, tokens: Tensor, longest: int) -> Tensor:
        """See :meth:`Runner.decode`."""
        with self._between_events():
            return super().decode(tokens, longest)

    def decode_greedy(self, tokens: Tensor, longest: int) -> Tensor:
        """See :meth:`Runner.decode_greedy`."""
        with self._between_events():
            return super().decode_greedy(tokens, longest)

    @contextlib.contextmanager
    def _between_events(self) -> Iterator[None]:
        if self.model.device.type != "cuda":
            yield
            return
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        stream = torch.cuda.current_stream(self.model.device)
        begin.record(stream)
        yield
        end.record(stream)
        self._events.append((begin, end))

    def take_step_seconds(self) -> list[float]:
        """Seconds of the steps since the last call, which are forgotten; empty on a CPU."""
        if self._events:
            torch.cuda.synchronize(self.model.device)
        seconds = [begin.elapsed_time(end) * 1e-3 for begin, end in self._events]
        self._events.clear()
        return seconds


class TorchSparseLinear(nn.Module):
    """A linear layer whose weight ``torch.sparse`` holds and multiplies, the way its documentation uses it."""

    def __init__(self, linear: SparseLinear) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that its interface may change
            self.weight: Any = torch.sparse.to_sparse_semi_structured(ops.unpack(linear.packed()))
        self.bias = linear.bias

    @property
    def weight_nbytes(self) -> int:
        """Bytes of the compressed weight."""
        packed, meta = self.weight.packed, self.weight.meta
        return int(packed.nbytes) + (int(meta.nbytes) if meta is not None else 0)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias)


class EngineContender:
    """A model in our engine.

    Attributes:
        load_s: seconds to load the model, or to make it if its weights are random.
    """

    def __init__(self, subject: Subject, device: torch.device, *, torch_sparse: bool, check_rows: int) -> None:
        """Load the model and make the reference that it is checked against.

        Args:
            torch_sparse: run the packed layers by ``torch.sparse`` instead of our kernels.
            check_rows: largest batch that will be checked; 0 for none.

        Raises:
            UnsupportedError: ``torch.sparse`` cannot run this model here.
        """
        if torch_sparse and device.type != "cuda":
            raise UnsupportedError(f"torch.sparse runs 2:4 weights on CUDA only and this is {device}")
        start = time.perf_counter()
        self.model = build_model(subject, device)
        self.load_s = time.perf_counter() - start
        self._subject = subject
        self._memory = PeakMemory(device)
        self._load_peak_bytes = self._memory.peak_bytes()
        rows = min(check_rows, MAX_BATCH_SIZE)
        self._reference = LogitsReference(self.model, rows, subject.seed) if rows else None
        if torch_sparse:
            use_torch_sparse_(self.model)
        self._memory.clear()
        self._torch_sparse = torch_sparse

    def facts(self) -> dict[str, Any]:
        """What is loaded: bytes, times, kernel, and sentences about whatever fell back."""
        weight_bytes, read_bytes = stored_bytes(self.model)
        compressed = sum(m.weight_nbytes for m in self.model.modules() if isinstance(m, TorchSparseLinear))
        kernel, fallbacks = self._kernel()
        return {
            "load_s": self.load_s,
            "load_peak_bytes": self._load_peak_bytes,
            "weight_bytes": weight_bytes + compressed,
            "read_bytes": read_bytes + compressed,
            "kernel": kernel,
            "fallbacks": [*self.model.report.warnings, *fallbacks] if self._subject.sparse else fallbacks,
        }

    def _kernel(self) -> tuple[str, list[str]]:
        model = self.model
        linear, passed_over = linear_kernel(model, self._subject.backend)
        if self._torch_sparse:
            linear, passed_over = "torch.sparse", []
        elif not self._subject.sparse:  # a pruned checkpoint whose zeros were filled
            linear, passed_over = "dense", []
        return linear, passed_over + attention_kernel(model.attention_shapes, model.device, model.dtype)[1]

    def check(self, batch: int) -> dict[str, Any]:
        """Correctness of a batch size, as keys of a row."""
        if self._reference is None:
            return {"correct": None, "check": "not checked (--no-check)"}
        self._memory.clear()
        return self._reference.check(min(batch, MAX_BATCH_SIZE)).to_dict()

    def measure(self, setting: Setting, effort: Effort, seed: int) -> tuple[list[Run], dict[str, Any]]:
        """Warm up, send the prompts as often as the effort allows; returns the runs and further keys of the row.

        Raises:
            UnsupportedError: a batch that the engine does not run.
        """
        if setting.batch > MAX_BATCH_SIZE:
            raise UnsupportedError(f"the engine runs up to {MAX_BATCH_SIZE} texts at once")
        prompts = random_prompts(setting, self.model.config.vocab_size, seed)
        self._memory.clear()
        # a runner of its own: the cache has the size of this setting and its graphs are captured in the warm-up
        runner = TimedRunner(self.model, self.model.config.max_position_embeddings)
        for _ in range(effort.warmup):
            _send(runner, prompts, setting)
        runner.take_step_seconds()
        capture_before_s = runner.capture_s
        self._memory.reset()
        runs = effort.measure(lambda: _send(runner, prompts, setting))
        return runs, {
            "step_ms": spread_ms(runner.take_step_seconds()),
            "capture_ms": (runner.capture_s - capture_before_s) * 1e3,
            "cache_bytes": runner.cache_nbytes,
            **self._memory.to_dict(),
        }


def use_torch_sparse_(model: nn.Module) -> None:
    """Replace every packed layer by ``torch.sparse``'s, one at a time, in place."""
    replace_packed_(model, TorchSparseLinear)


def _send(runner: Runner, prompts: list[list[int]], setting: Setting) -> Run:
    """All prompts at once, as many together as the batch holds."""
    params = SamplingParams(max_new_tokens=setting.output_len, ignore_eos=True)
    token_s: list[list[float]] = [[] for _ in prompts]
    start = time.perf_counter()

    def note(index: int, piece: str, token_ids: list[int]) -> None:
        token_s[index].append(time.perf_counter() - start)

    for begin in range(0, len(prompts), setting.batch):
        indices = range(begin, min(begin + setting.batch, len(prompts)))
        texts = [GrowingText(i, prompts[i], setting.output_len, frozenset(), (), None) for i in indices]
        generate_batch(runner, texts, params, stream=note)
    return Run(tuple(map(tuple, token_s)), time.perf_counter() - start)
