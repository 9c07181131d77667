"""Tensors of a checkpoint, read straight onto the device where they are wanted.

``Checkpoint.read`` gives tensors on the CPU and serves whoever looks at a checkpoint. This serves whoever runs one:
bytes go from the files to the device through a small ring (``staging.py``), values are converted there, and of a tensor
that holds several layers only the wanted rows are read. Weights that stand packed in sparse-24-bitmask arrive in their
two parts, for the device to permute. The rarer forms (marlin-24, sparse-bitmask, a mask beside its weight) and pickles
are put together on the CPU and then moved.

Every safetensors file is opened once and its header compared with what it was when the checkpoint was opened, so a file
that was replaced in between is an error instead of other bytes at the same place.
"""

from __future__ import annotations

import math
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import torch
from torch import Tensor

from sparsert.checkpoint.reader import Checkpoint
from sparsert.checkpoint.safetensors_file import TensorInfo, parse_header
from sparsert.checkpoint.staging import Staging
from sparsert.checkpoint.stored import BITMASK_24, DENSE, checked_shape
from sparsert.errors import CheckpointError, InputError

_CPU = torch.device("cpu")


class TensorStream:
    """Reads tensors of one checkpoint onto one device; close it, or use it in ``with``.

    Args:
        checkpoint: an opened model directory.
        device: where tensors go.

    Example:
        >>> with TensorStream(open_checkpoint("DIR"), torch.device("cuda")) as stream:  # doctest: +SKIP
        ...     norm = stream.read("model.norm.weight", torch.bfloat16)
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device) -> None:
        self.checkpoint, self.device = checkpoint, device
        self._staging = Staging(device)
        self._files: dict[Path, tuple[BinaryIO, dict[str, TensorInfo]]] = {}

    def read(self, name: str, dtype: torch.dtype, rows: tuple[int, int] | None = None) -> Tensor:
        """One tensor as the model wants it; a compressed one is expanded, zeros included.

        Args:
            name: of the model's tensor.
            dtype: to convert it to.
            rows: first row and the one behind the last to read; default all.

        Returns:
            A contiguous tensor of its own on the device.

        Raises:
            CheckpointError: no such tensor, its file cannot be read any more, or its parts contradict each other.
        """
        if self._streams(name, DENSE):
            return self._read_part(name, "", dtype, self.device, rows)
        tensor = self.checkpoint.read(name)
        if rows is not None:
            tensor = tensor[slice(*rows)]
        return torch.empty(tensor.shape, dtype=dtype, device=self.device).copy_(tensor)

    def read_packed(self, name: str, dtype: torch.dtype, rows: tuple[int, int] | None = None) -> tuple[Tensor, Tensor]:
        """Kept values and bitmask of a weight in ``sparse-24-bitmask``, for ``sparsert.ops.pack_bitmask``.

        Args:
            name, dtype, rows: as :meth:`read`.

        Returns:
            ``compressed [rows, columns / 2]`` in ``dtype`` and ``bitmask`` as stored, on the device.

        Raises:
            CheckpointError: as :meth:`read`, or the weight is stored in another way.
        """
        if not self._streams(name, BITMASK_24):
            compressed, bitmask = self.checkpoint.read_packed(name)
            selected = slice(None) if rows is None else slice(*rows)
            return compressed[selected].to(self.device, dtype), bitmask[selected].to(self.device)
        try:
            checked_shape(self.checkpoint.shape(name), self._read_part(name, "shape", None, _CPU), name)
        except InputError as error:
            raise CheckpointError(f"{self.checkpoint.file(name)}: {error}") from error
        compressed = self._read_part(name, "compressed", dtype, self.device, rows)
        return compressed, self._read_part(name, "bitmask", None, self.device, rows)

    def _streams(self, name: str, storage: str) -> bool:
        infos = self.checkpoint.part_infos(name).values()
        return self.checkpoint.storage(name) == storage and all(info.file.suffix == ".safetensors" for _, info in infos)

    def _read_part(
        self,
        name: str,
        part: str,
        dtype: torch.dtype | None,
        device: torch.device,
        rows: tuple[int, int] | None = None,
    ) -> Tensor:
        """One part of a tensor; ``dtype=None`` leaves it in its own."""
        stored, info = self.checkpoint.part_infos(name)[part]
        shape, offset = info.shape, info.offset
        if rows is not None:
            begin, end, _ = slice(*rows).indices(shape[0])
            offset += begin * math.prod(shape[1:]) * info.dtype.itemsize
            shape = (end - begin, *shape[1:])
        target = torch.empty(shape, dtype=dtype or info.dtype, device=device)
        try:
            self._staging.fill(target, self._open(stored, info), offset, info.dtype)
        except (OSError, EOFError) as error:
            raise CheckpointError(f"{info.file}: tensor {stored!r} cannot be read ({error}); fetch it again") from error
        return target

    def _open(self, stored: str, info: TensorInfo) -> int:
        """Descriptor of the file that holds a tensor, where it still stands where it did."""
        if info.file not in self._files:
            opened: BinaryIO = info.file.open("rb")
            self._files[info.file] = opened, parse_header(info.file, opened)
        stream, infos = self._files[info.file]
        if infos.get(stored) != info:
            raise CheckpointError(
                f"{info.file}: tensor {stored!r} was {list(info.shape)} {info.dtype} at byte {info.offset} when the "
                "checkpoint was opened and is not any more; the file was replaced, open the checkpoint again"
            )
        return stream.fileno()

    def close(self) -> None:
        """Wait for copies under way, close the files, let go of the staging memory."""
        self._staging.close()
        for stream, _ in self._files.values():
            stream.close()
        self._files.clear()

    def __enter__(self) -> TensorStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
