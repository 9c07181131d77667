"""CUDA graphs of decode steps and short prefills, captured when first needed.

At batch 1 a step of a 7B model launches several hundred kernels of a few microseconds each; issued one
by one from Python the GPU would wait most of the time. A graph replays them in one call. Graphs share
one memory pool: they never run at the same time, and what one gives back is used before it runs again; so what a
step returns lasts until another one runs.
Going back to a step that was run before, under whatever plan, captures nothing; the graphs longest unused are
let go of once there are very many, so that a process that keeps making up plans does not grow.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

#: Steps run before capture, so that libraries and compilers have set up what capture forbids.
_WARM_UP_STEPS = 2

#: Graphs held at most. A model that serves every batch size in four windows has 64, and 30 of short prefills; one takes
#: a few MB with its logits.
_MOST_GRAPHS = 256


class StepGraphs:
    """Steps as graphs, each under a key that says what it computes and in which shapes.

    Attributes:
        capture_s: seconds spent on warm-up and capture so far.
    """

    def __init__(self, state: Sequence[Tensor]) -> None:
        """Set up.

        Args:
            state: static buffers that steps change; put back after the warm-up.
        """
        self._state = tuple(state)
        self._graphs: OrderedDict[Hashable, tuple[torch.cuda.CUDAGraph, Tensor]] = OrderedDict()
        self._pool = torch.cuda.graph_pool_handle()
        self.capture_s = 0.0

    def __len__(self) -> int:
        return len(self._graphs)

    def clear(self) -> None:
        """Forget all graphs: a buffer that they read or write has moved."""
        self._graphs.clear()
        self._pool = torch.cuda.graph_pool_handle()

    def run(self, key: Hashable, step: Callable[[], Tensor]) -> Tensor:
        """Run a step.

        Args:
            key: same key, same step in the same shapes.
            step: reads and writes static buffers only; run when the key is new.

        Returns:
            What the step returns: static, overwritten when the same key runs again, perhaps when another one does.
        """
        if key not in self._graphs:
            self._graphs[key] = self._capture(step)
        self._graphs.move_to_end(key)
        graph, output = self._graphs[key]
        graph.replay()
        return output

    def _capture(self, step: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        torch.cuda.synchronize()
        start = time.perf_counter()
        while len(self._graphs) >= _MOST_GRAPHS:
            self._graphs.popitem(last=False)
        before = [buffer.clone() for buffer in self._state]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM_UP_STEPS):
                step()
                # each from the same state: a step that ran on could leave the window it is made for
                for buffer, value in zip(self._state, before, strict=True):
                    buffer.copy_(value)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            output = step()
        torch.cuda.synchronize()
        self.capture_s += time.perf_counter() - start
        return graph, output
