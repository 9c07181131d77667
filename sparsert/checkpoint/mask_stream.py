"""The masks of a model in the order in which it is loaded, read ahead by threads and unpacked on the device.

A mask file is compressed, and one core inflates some 300 MB of bits a second: for a model of seven billion parameters
that takes longer than reading its weights. So the next few masks are inflated while a layer is loaded, and what goes to
the device are bits, an eighth of a mask. At most :data:`AHEAD` are held, together less than the largest dense layer.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import torch
from torch import Tensor

from sparsert.checkpoint.masks import MaskFile

#: Masks in memory at most, inflated or being inflated.
AHEAD = 8

_MAX_THREADS = 4


class MaskStream:
    """Masks of a file on a device; close it, or use it in ``with``.

    Args:
        masks: an opened mask file.
        shapes: of the parameters that will be asked for, in that order. Names without a mask are left out; other names
            may be asked for, and these more than once, only slower.
        device: where masks go.
    """

    def __init__(self, masks: MaskFile, shapes: Mapping[str, tuple[int, ...]], device: torch.device) -> None:
        self._masks, self._shapes, self._device = masks, dict(shapes), device
        self._threads = ThreadPoolExecutor(min(_MAX_THREADS, os.cpu_count() or 1), "sparsert-masks")
        self._waiting = deque(name for name in shapes if name in masks)
        self._ahead: dict[str, Future[Tensor]] = {}
        self._last: tuple[str, Tensor] | None = None  # parts of one stored tensor ask for its mask one after another
        self._read_ahead()

    def __contains__(self, name: object) -> bool:
        return name in self._masks

    def mask(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """One mask: bool of ``shape`` on the device, True keeps.

        Raises:
            CheckpointError: no mask of that name, one of another shape, or a damaged file.
        """
        if self._last is None or self._last[0] != name:
            future = self._ahead.pop(name, None)
            self._last = name, self._masks.read(name, shape) if future is None else future.result()
            self._read_ahead()
        return self._masks.unpack(self._last[1].to(self._device), name, shape)

    def _read_ahead(self) -> None:
        while self._waiting and len(self._ahead) < AHEAD:
            name = self._waiting.popleft()
            self._ahead[name] = self._threads.submit(self._masks.read, name, self._shapes[name])

    def close(self) -> None:
        """Stop reading ahead."""
        self._threads.shutdown(cancel_futures=True)

    def __enter__(self) -> MaskStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
