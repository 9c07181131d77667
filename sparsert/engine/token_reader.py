"""The way of new tokens from the device to the host: the one thing that a step of decoding waits for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class TokenReader:
    """Brings whole numbers to the host; on a GPU the copy is queued first and waited for later."""

    def __init__(self, shape: tuple[int, ...], device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._host = torch.empty(shape, dtype=torch.int64, pin_memory=self._on_gpu)
        self._copied = torch.cuda.Event() if self._on_gpu else None

    def start(self, values: Tensor) -> None:
        """Queue the copy of int64 values of the reader's shape."""
        self._host.copy_(values, non_blocking=self._on_gpu)
        if self._copied is not None:
            self._copied.record(torch.cuda.current_stream(values.device))

    def finish(self) -> list[Any]:
        """The values of the last copy, as nested lists."""
        if self._copied is not None:
            self._copied.synchronize()
        values: list[Any] = self._host.tolist()
        return values
