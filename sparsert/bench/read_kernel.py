"""The plain read that shares of bandwidth are quoted of: everything loaded once, nothing written.

A copy would halve the number and a torch reduction adds its own stages; a bare loop of wide loads on every
multiprocessor is what a weight-reading kernel could reach at best.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Programs a multiprocessor, each of eight warps: enough loads in flight to fill the memory of an H100 or H200.
_PROGRAMS_PER_MULTIPROCESSOR = 8


@triton.jit
def _read_kernel(source_ptr, sink_ptr, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Keep the sum, so that no load can be dropped."""
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.int32)
    for start in range(0, count, tl.num_programs(0) * BLOCK):
        total += tl.load(source_ptr + start + offsets, mask=start + offsets < count, other=0)
    tl.atomic_max(sink_ptr, tl.sum(total))


def read_once(source: Tensor, sink: Tensor) -> None:
    """Read ``source`` (int32, contiguous, fewer than 2**31 elements) once; ``sink`` is one int32 on the same GPU."""
    multiprocessors = torch.cuda.get_device_properties(source.device).multi_processor_count
    with torch.cuda.device(source.device):
        _read_kernel[(multiprocessors * _PROGRAMS_PER_MULTIPROCESSOR,)](
            source, sink, source.numel(), BLOCK=4096, num_warps=8
        )
