"""From a place in a file to a tensor on a device, in pieces, as fast as file and device allow.

    file            page-locked memory             device
    |..........|    +---+---+---+---+---+---+
    |  piece 4 | -> | 4 |   |   | 1 | 2 | 3 |  ->  tensor bytes [0 .. 3)
    |  piece 5 | -> |   | 5 |   |   |   |   |
      threads           a ring of pieces       one copy after another, on the current stream

Threads read pieces of a tensor while those before them are on their way to the device. A copy from page-locked memory
needs no second copy by the driver and does not wait, and reading by threads keeps a disk busy and a copy from the page
cache from being bound by one core. The ring is all the host memory that loading takes, whatever the tensors' size.

Values are converted on the device, piece by piece, so no wider copy of a tensor is ever held. For a tensor on the CPU
the threads read straight into it, or convert from the ring.

What it gives up: a mapped file would be shared between processes; here each has its own copy of what it asked for. That
is what a device needs anyhow. A file that is cut off while it is read is an error here and a crash in a mapping.
"""

from __future__ import annotations

import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor, wait

import torch
from torch import Tensor

#: A copy of 4 MiB takes 80 us at 50 GB/s, several times what starting it costs.
PIECE_BYTES = 4 << 20
PIECES = 16

#: Threads beyond this gain nothing: eight cores copy from the page cache faster than PCIe takes it.
_MAX_THREADS = 8


class Staging:
    """A ring of pieces between files and a device.

    Args:
        device: where tensors are filled.
        piece_bytes: size of a piece, a multiple of 8; default :data:`PIECE_BYTES`.
        pieces: how many there are; default :data:`PIECES`.

    Raises:
        ValueError: sizes that cannot be.
    """

    def __init__(self, device: torch.device, *, piece_bytes: int | None = None, pieces: int | None = None) -> None:
        piece_bytes = PIECE_BYTES if piece_bytes is None else piece_bytes
        pieces = PIECES if pieces is None else pieces
        if piece_bytes < 8 or piece_bytes % 8 or pieces < 1:
            raise ValueError(f"{pieces} pieces of {piece_bytes} bytes: need at least one, of a multiple of 8 bytes")
        self.device = device
        self._piece_bytes, self._count = piece_bytes, pieces
        self._threads = ThreadPoolExecutor(min(_MAX_THREADS, os.cpu_count() or 1, pieces), "sparsert-read")
        self._ring: list[_Piece] = []
        self._next = 0

    def fill(self, target: Tensor, descriptor: int, offset: int, stored: torch.dtype) -> None:
        """Fill a tensor with the values that stand in a file from a byte on.

        Args:
            target: contiguous, on the device. On a GPU the current stream may still be copying on return.
            descriptor: of the open file.
            offset: of the first byte.
            stored: dtype of the values in the file; they are converted to the target's.

        Raises:
            OSError: the file cannot be read.
            EOFError: it ends too early.
        """
        flat = target.view(-1)
        if target.device.type == "cpu" and stored == target.dtype:
            self._read_directly(flat.view(torch.uint8), descriptor, offset)
            return
        step = self._piece_bytes // stored.itemsize
        under_way: deque[tuple[Future[None], _Piece, Tensor]] = deque()
        try:
            for part in flat.split(step):
                if len(under_way) == self._count:
                    _deliver(*under_way.popleft(), stored)
                piece = self._take_piece()
                view = piece.memory[: part.numel() * stored.itemsize]
                if flat.numel() <= step:  # nothing to read beside it
                    _read_all(descriptor, view, offset)
                    piece.deliver(part, stored)
                    return
                under_way.append((self._threads.submit(_read_all, descriptor, view, offset), piece, part))
                offset += len(view)
            while under_way:
                _deliver(*under_way.popleft(), stored)
        finally:
            wait([future for future, _, _ in under_way])  # after an error: nobody may write to the ring any more

    def _read_directly(self, target: Tensor, descriptor: int, offset: int) -> None:
        view = target.numpy().data
        starts = range(0, len(view), self._piece_bytes)
        futures = [
            self._threads.submit(_read_all, descriptor, view[start : start + self._piece_bytes], offset + start)
            for start in starts[1:]
        ]
        try:
            _read_all(descriptor, view[: self._piece_bytes], offset)
        finally:
            wait(futures)
        for future in futures:
            future.result()

    def _take_piece(self) -> _Piece:
        """The next piece of the ring, free to be written."""
        if len(self._ring) < self._count:
            self._ring.append(_Piece(self._piece_bytes, self.device))
            return self._ring[-1]
        piece = self._ring[self._next]
        self._next = (self._next + 1) % self._count
        piece.wait()
        return piece

    def close(self) -> None:
        """Wait for copies that are under way, and let go of threads and memory."""
        self._threads.shutdown()
        for piece in self._ring:
            piece.wait()
        self._ring.clear()


class _Piece:
    """Page-locked memory, and the mark of the last copy from it."""

    def __init__(self, nbytes: int, device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        self._bytes = torch.empty(nbytes, dtype=torch.uint8, pin_memory=on_gpu)
        self.memory = self._bytes.numpy().data
        self._copied = torch.cuda.Event() if on_gpu else None

    def deliver(self, target: Tensor, stored: torch.dtype) -> None:
        """Copy and convert what was read to its place on the device."""
        values = self._bytes[: target.numel() * stored.itemsize].view(stored)
        if stored != target.dtype:
            values = values.to(target.device, non_blocking=True)
        target.copy_(values, non_blocking=True)
        if self._copied is not None:
            self._copied.record(torch.cuda.current_stream(target.device))

    def wait(self) -> None:
        """Return when the last copy from this memory is done."""
        if self._copied is not None:
            self._copied.synchronize()


def _deliver(reading: Future[None], piece: _Piece, target: Tensor, stored: torch.dtype) -> None:
    reading.result()
    piece.deliver(target, stored)


def _read_all(descriptor: int, view: memoryview, offset: int) -> None:
    """Fill ``view`` from a file."""
    while len(view):
        count = os.preadv(descriptor, [view], offset)
        if count == 0:
            raise EOFError(f"the file ends at byte {offset}")
        view, offset = view[count:], offset + count
