"""CUDA graphs of the decode step, captured when first needed.

At batch 1 a step of a 7B model launches several hundred kernels of a few microseconds each; issued one
by one from Python the GPU would wait most of the time. A graph replays them in one call. Graphs share
one memory pool: they never run at the same time, and the logits of one are used before the next runs.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

#: Steps run before capture, so that libraries and compilers have set up what capture forbids.
_WARM_UP_STEPS = 2


class DecodeGraphs:
    """A decode step as one graph for each (batch, window).

    Attributes:
        capture_s: seconds spent on warm-up and capture so far.
    """

    def __init__(self, step: Callable[[int, int], Tensor]) -> None:
        """Wrap a step.

        Args:
            step: (batch, window) -> logits; reads and writes static buffers only, and running it twice
                on the same buffers leaves them as running it once does.
        """
        self._step = step
        self._graphs: dict[tuple[int, int], tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self.capture_s = 0.0

    def run(self, batch: int, window: int) -> Tensor:
        """Run the step; returns its static output, which the next run may overwrite."""
        if (batch, window) not in self._graphs:
            self._graphs[batch, window] = self._capture(batch, window)
        graph, logits = self._graphs[batch, window]
        graph.replay()
        return logits

    def _capture(self, batch: int, window: int) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        torch.cuda.synchronize()
        start = time.perf_counter()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM_UP_STEPS):
                self._step(batch, window)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            logits = self._step(batch, window)
        torch.cuda.synchronize()
        self.capture_s += time.perf_counter() - start
        return graph, logits
