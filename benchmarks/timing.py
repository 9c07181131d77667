"""How kernels are timed here: weights rotated past L2, one CUDA graph, CUDA events, median.

An H100's L2 holds 50 MB, so a loop over one layer's weight measures the cache. Every measurement
runs the same layer over enough copies of its weight that none is still cached when its turn comes
again, all in one graph, so that neither Python nor launches are in the number.
"""

from __future__ import annotations

import datetime
import platform
import subprocess
from collections.abc import Callable

import torch
import triton
import triton.language as tl

import sparsert

ROTATE_BYTES = 240_000_000  #: at least this much weight between two uses of a copy, almost five times an H100's L2


def copies_for(weight_bytes: int) -> int:
    """How many copies of a weight to rotate over."""
    return max(3, -(-ROTATE_BYTES // weight_bytes))


def graph_time_us(run_all: Callable[[], object], calls: int, repeats: int = 15) -> dict[str, float]:
    """Time of one of ``calls`` calls that ``run_all`` makes, replayed from one CUDA graph.

    Returns:
        ``p20``, ``median`` and ``p80`` in microseconds over ``repeats`` replays.
    """
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run_all()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin()
        run_all()
        graph.capture_end()
        for _ in range(3):
            graph.replay()
        times = []
        for _ in range(repeats):
            start, end = torch.cuda.Event(True), torch.cuda.Event(True)
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 1e3 / calls)
    times.sort()
    return {"p20": times[len(times) // 5], "median": times[len(times) // 2], "p80": times[len(times) * 4 // 5]}


@triton.jit
def _read_kernel(source_ptr, sink_ptr, count, BLOCK: tl.constexpr):
    """Read everything once and keep the sum, so that no load can be dropped."""
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.int32)
    for start in range(0, count, tl.num_programs(0) * BLOCK):
        total += tl.load(source_ptr + start + offsets, mask=start + offsets < count, other=0)
    tl.atomic_max(sink_ptr, tl.sum(total))


def read_bandwidth() -> float:
    """Bytes per second of a plain read of 2 GB, the roof that shares are quoted of."""
    source = torch.randint(0, 100, (2**29,), dtype=torch.int32, device="cuda")
    sink = torch.zeros(1, dtype=torch.int32, device="cuda")
    programs = torch.cuda.get_device_properties(0).multi_processor_count * 8
    time = graph_time_us(
        lambda: _read_kernel[(programs,)](source, sink, source.numel(), BLOCK=4096, num_warps=8), calls=1
    )
    return source.nbytes / (time["median"] * 1e-6)


def machine() -> dict[str, object]:
    """What every record says about where it was made."""
    properties = torch.cuda.get_device_properties(0)
    query = "--query-gpu=driver_version,clocks.sm,clocks.mem,temperature.gpu"
    smi = subprocess.run(["nvidia-smi", query, "--format=csv,noheader"], capture_output=True, text=True, check=False)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "date": datetime.date.today().isoformat(),
        "gpu": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "driver_clocks_temperature": smi.stdout.strip(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "sparsert": sparsert.__version__,
        "commit": commit.stdout.strip() or None,
    }
