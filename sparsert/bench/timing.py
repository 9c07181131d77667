"""How things are timed here: weights rotated past L2, one CUDA graph, CUDA events, contenders in turn.

An H100's L2 holds 50 MB, so a loop over one layer's weight measures the cache. Every measurement runs the
same layer over enough copies of its weight that none is still cached when its turn comes again, all in
one graph, so that neither Python nor launches are in the number:

    graph      [layer(copy 0)] [layer(copy 1)] ... [layer(copy n-1)]       n x weight >= 240 MB
    replays    dense, ours, peer,  dense, ours, peer,  ...                  median, p20, p80 of each

Contenders replay in turn rather than one after the other: clocks and temperature drift by more than the
few percent that are to be told apart, and in turn all see the same drift. On a CPU the same functions run
as they are under the wall clock; such numbers are for tests, and shares of roofs there say little.
What it gives up: a graph back to back keeps the GPU busier than a real step with its other kernels does.

Source: cold L2 and interleaving as in Triton's ``do_bench`` and flashinfer's benchmarks; medians with p20 and
p80 as in Liger-Kernel's.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping

import torch

#: At least this much weight between two uses of a copy, almost five times an H100's L2 of 50 MB.
ROTATE_BYTES = 240_000_000

#: Copies at least, and all that there are on a CPU, where measuring only has to work.
_LEAST_COPIES = 3

#: Copies at most: a layer so small that this many do not leave L2 is one of a model that stays there anyway.
_MAX_COPIES = 512

_REPLAYS_BEFORE = 3

#: What is read to measure the bandwidth, and the side of the square product that measures the rate.
_READ_BYTES = {"cuda": 2**31, "cpu": 2**25}
_PRODUCT_SIDE = {"cuda": 8192, "cpu": 512}

#: Microseconds of one call.
Spread = dict[str, float]


def copies_for(weight_bytes: int, device: torch.device | str = "cuda") -> int:
    """How many copies of a weight to rotate over so that none is cached when it is used again.

    Example:
        >>> copies_for(33_554_432), copies_for(600_000_000)
        (8, 3)
    """
    if torch.device(device).type != "cuda":
        return _LEAST_COPIES
    return min(_MAX_COPIES, max(_LEAST_COPIES, -(-ROTATE_BYTES // max(1, weight_bytes))))


@functools.cache
def _side_stream(index: int) -> torch.cuda.Stream:
    """One stream for all captures: the allocator keeps freed memory by stream, and many streams would hoard it."""
    return torch.cuda.Stream(index)


class CaptureError(RuntimeError):
    """A capture that could not even be ended: this process's allocator and random numbers stay in its mode."""


class Replay:
    """A function that can be run again and timed: one CUDA graph on a GPU, or else the function itself.

    Attributes:
        calls: how many calls one run makes; times are divided by it.
    """

    def __init__(
        self, run_all: Callable[[], object], calls: int, device: torch.device | str, *, graph: bool = True
    ) -> None:
        """Warm up and capture.

        Args:
            run_all: makes ``calls`` calls; to be captured it must not wait and its inputs must be static.
            calls: the calls that it makes.
            device: where they run.
            graph: capture on a GPU; otherwise each run issues the calls anew, and launches are in the time.

        Raises:
            Exception: whatever ``run_all`` raises; the device stays usable.
            CaptureError: it did something that no capture allows, such as waiting; use another process.
        """
        self.calls = calls
        self._device = torch.device(device)
        self._run_all = run_all
        self._graph: torch.cuda.CUDAGraph | None = None
        if self._device.type == "cuda" and graph:
            with torch.cuda.device(self._device):
                self._capture()
        else:
            run_all()

    def _capture(self) -> None:
        stream = _side_stream(torch.cuda.current_device())
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._run_all()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            graph.capture_begin()
            try:
                self._run_all()
            except BaseException as error:
                # end the capture, or every later call on this device would fail with it
                _end_capture(graph, error)
                raise
            _end_capture(graph, None)
        self._graph = graph

    def run(self) -> float:
        """Run once and wait; returns the microseconds of one call."""
        if self._device.type != "cuda":
            start = time.perf_counter()
            self._run_all()
            return (time.perf_counter() - start) * 1e6 / self.calls
        with torch.cuda.device(self._device):
            # what is not a graph stays on the stream that its inputs were made on
            stream = _side_stream(torch.cuda.current_device()) if self._graph else torch.cuda.current_stream()
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            with torch.cuda.stream(stream):
                begin.record()
                if self._graph is None:
                    self._run_all()
                else:
                    self._graph.replay()
                end.record()
            end.synchronize()
            return float(begin.elapsed_time(end)) * 1e3 / self.calls

    def warm_up(self) -> None:
        """Run a few times without looking at the clock."""
        for _ in range(_REPLAYS_BEFORE):
            self.run()


def _end_capture(graph: torch.cuda.CUDAGraph, cause: BaseException | None) -> None:
    try:
        graph.capture_end()
    except RuntimeError as error:
        first_line = (str(cause or error).splitlines() or [""])[0]
        raise CaptureError(f"not allowed while a CUDA graph is captured: {first_line}") from error


def spread(times_us: list[float]) -> Spread:
    """``p20``, ``median`` and ``p80`` of some times.

    Example:
        >>> spread([3.0, 1.0, 2.0, 5.0, 4.0])
        {'p20': 2.0, 'median': 3.0, 'p80': 5.0}
    """
    ordered = sorted(times_us)
    count = len(ordered)
    return {"p20": ordered[count // 5], "median": ordered[count // 2], "p80": ordered[count * 4 // 5]}


def time_calls(
    run_all: Callable[[], object], calls: int, *, device: torch.device | str = "cuda", repeats: int = 15
) -> Spread:
    """Time of one of the ``calls`` calls that ``run_all`` makes: a CUDA graph and events on a GPU, else the wall clock.

    Returns:
        ``p20``, ``median`` and ``p80`` in microseconds over ``repeats`` runs.

    Raises:
        Exception: whatever ``run_all`` raises.
    """
    replay = Replay(run_all, calls, device)
    return time_in_turn({"it": replay}, repeats=repeats)["it"]


def time_in_turn(replays: Mapping[str, Replay], *, repeats: int = 15) -> dict[str, Spread]:
    """Time several contenders in turn, so that all see the same clocks.

    Returns:
        ``p20``, ``median`` and ``p80`` in microseconds of one call, by contender.
    """
    for replay in replays.values():
        replay.warm_up()
    times: dict[str, list[float]] = {name: [] for name in replays}
    for _ in range(repeats):
        for name, replay in replays.items():
            times[name].append(replay.run())
    return {name: spread(values) for name, values in times.items()}


def read_bandwidth(device: torch.device | str = "cuda") -> float | None:
    """Bytes per second of a plain read of 2 GB, the roof that shares of bandwidth are quoted of.

    Returns:
        The rate, or None on a GPU without Triton, which the reading kernel is written in. On a CPU: the
        rate of a sum over 32 MB.
    """
    device = torch.device(device)
    size = _READ_BYTES[device.type]
    if device.type == "cpu":
        values = torch.ones(size // 4)
        return size / (time_calls(values.sum, 1, device=device, repeats=5)["median"] * 1e-6)
    try:
        from sparsert.bench.read_kernel import read_once
    except ImportError:
        return None
    free, _ = torch.cuda.mem_get_info(device)
    size = min(size, free // 4 // 4096 * 4096)
    source = torch.randint(0, 100, (size // 4,), dtype=torch.int32, device=device)
    sink = torch.zeros(1, dtype=torch.int32, device=device)
    return size / (time_calls(lambda: read_once(source, sink), 1, device=device)["median"] * 1e-6)


def dense_rate(device: torch.device | str = "cuda", dtype: torch.dtype = torch.bfloat16) -> float:
    """FLOP per second of a large square dense product (8192 on a GPU, random values), the roof of arithmetic."""
    device = torch.device(device)
    side = _PRODUCT_SIDE[device.type]
    # random values: a product of zeros draws less power and runs at higher clocks
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return 2 * side**3 / (time_calls(lambda: torch.mm(a, b), 1, device=device, repeats=9)["median"] * 1e-6)


def measure_roofs(device: torch.device | str = "cuda", dtype: torch.dtype = torch.bfloat16) -> dict[str, float | None]:
    """Both roofs as a record holds them: ``read_bytes_per_s`` and ``dense_flop_per_s``."""
    device = torch.device(device)
    roofs = {"read_bytes_per_s": read_bandwidth(device), "dense_flop_per_s": dense_rate(device, dtype)}
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return roofs
