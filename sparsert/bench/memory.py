"""Peak memory of a measurement: what torch's allocator gave out on a GPU, the process's peak on a CPU."""

from __future__ import annotations

import gc
import resource
from typing import Any

import torch


class PeakMemory:
    """The most memory in use since the last reset.

    On a CPU the system keeps one peak for the whole life of a process, so there nothing is cleared or reset.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def clear(self) -> None:
        """Let go of what earlier measurements left behind: runners and their graphs refer to each other."""
        if self._device.type == "cuda":
            gc.collect()
            torch.cuda.synchronize(self._device)
            torch.cuda.empty_cache()

    def reset(self) -> None:
        """Count from here on."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)

    def peak_bytes(self) -> int:
        """Bytes of tensors at the worst moment; on a CPU, of the process."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def to_dict(self) -> dict[str, Any]:
        """``peak_bytes``, ``peak_reserved_bytes`` (with what the allocator keeps unused), ``peak_of`` (whose peak)."""
        on_gpu = self._device.type == "cuda"
        return {
            "peak_bytes": self.peak_bytes(),
            "peak_reserved_bytes": torch.cuda.max_memory_reserved(self._device) if on_gpu else None,
            "peak_of": "tensors on the GPU" if on_gpu else "the process",
        }
