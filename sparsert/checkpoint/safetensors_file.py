"""The safetensors file format: a header that is checked before anything is read, and a writer that streams.

    8 bytes   N, little-endian unsigned
    N bytes   JSON: {"name": {"dtype": "BF16", "shape": [out, in], "data_offsets": [begin, end]}, ...,
              "__metadata__": {"format": "pt"}}, padded with spaces to a multiple of 8
    rest      the tensors, row-major, without gaps; offsets count from here

The header says how long the file must be, so a download that stopped early is found when the
checkpoint is opened, not after minutes of loading. The writer exists because the library's own
``save_file`` wants all tensors of a file in memory at once; this one writes the header first and
takes the tensors one by one. What it gives up: shapes and dtypes must be known beforehand.

Source: the format description of the safetensors project.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch
from torch import Tensor

from sparsert.checkpoint.json_file import DuplicateKeyError, unique_keys
from sparsert.errors import CheckpointError

DTYPE_OF_CODE: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
CODE_OF_DTYPE: dict[torch.dtype, str] = {dtype: code for code, dtype in DTYPE_OF_CODE.items()}

#: The library refuses longer headers; a longer one here is a damaged length field.
_MAX_HEADER_BYTES = 100_000_000

#: Beyond these a header is damaged: no tensor has more dimensions, elements or a longer name.
_MAX_DIMENSIONS, _MAX_NUMBER, _MAX_NAME = 8, 2**48, 1000


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """What a file says about a tensor before it is read.

    Attributes:
        file: the file that holds it.
        shape: sizes, row-major.
        dtype: torch dtype.
        offset: of its first byte in a safetensors file; 0 for a tensor of a pickle.
    """

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int = 0

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Names, shapes and dtypes of a safetensors file, checked against its length.

    Raises:
        CheckpointError: the file is missing, truncated, too long, or its header is damaged.
    """
    try:
        with file.open("rb") as stream:
            return parse_header(file, stream)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror or error}); check its permissions") from error


def parse_header(file: Path, stream: BinaryIO) -> dict[str, TensorInfo]:
    """:func:`read_header` of a file that is open already, from its beginning.

    Raises:
        CheckpointError: as :func:`read_header`.
        OSError: the file cannot be read.
    """
    size_bytes = os.fstat(stream.fileno()).st_size
    prefix = stream.read(8)
    if len(prefix) < 8:
        raise CheckpointError(f"{file}: {size_bytes} bytes are no safetensors file; fetch the file again")
    (header_bytes,) = struct.unpack("<Q", prefix)
    if header_bytes > min(size_bytes - 8, _MAX_HEADER_BYTES):
        raise CheckpointError(
            f"{file}: the file ends inside its header ({size_bytes} bytes, header of {header_bytes}); "
            "it is truncated or no safetensors file, fetch it again"
        )
    text = stream.read(header_bytes)
    try:
        header = json.loads(text, object_pairs_hook=unique_keys)
    except DuplicateKeyError as error:
        raise CheckpointError(
            f"{file}: the safetensors header names {error.args[0]!r} twice; the file is damaged, fetch it again"
        ) from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{file}: the safetensors header is no JSON; the file is damaged, fetch it again"
        ) from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{file}: the safetensors header is no JSON object; the file is damaged, fetch it again")
    header.pop("__metadata__", None)
    infos: dict[str, TensorInfo] = {}
    spans: list[tuple[int, int, str]] = []
    for name, entry in header.items():
        info, begin, end = _parse_entry(file, name, entry)
        infos[name] = dataclasses.replace(info, offset=8 + header_bytes + begin)
        spans.append((begin, end, name))
    _check_spans(file, sorted(spans), size_bytes - 8 - header_bytes)
    return infos


def _parse_entry(file: Path, name: str, entry: Any) -> tuple[TensorInfo, int, int]:
    try:
        code, shape = entry["dtype"], tuple(entry["shape"])
        begin, end = entry["data_offsets"]
        numbers_fit = len(shape) <= _MAX_DIMENSIONS and all(
            type(number) is int and 0 <= number < _MAX_NUMBER for number in (*shape, begin, end)
        )
        # a name that is no text, half of a surrogate pair, could not be asked for
        well_formed = numbers_fit and isinstance(code, str) and bool(name.encode()) and len(name) <= _MAX_NAME
    except (TypeError, KeyError, ValueError):
        well_formed = False
    if not well_formed:
        raise CheckpointError(f"{file}: the header entry of tensor {name[:200]!r} is damaged; fetch the file again")
    if code not in DTYPE_OF_CODE:
        raise CheckpointError(
            f"{file}: tensor {name!r} has dtype {code!r}; readable are {', '.join(DTYPE_OF_CODE)}; convert it"
        )
    info = TensorInfo(file, shape, DTYPE_OF_CODE[code])
    if end - begin != info.nbytes:
        raise CheckpointError(
            f"{file}: tensor {name!r} of shape {list(shape)} in {code} needs {info.nbytes} bytes, "
            f"the header gives it {end - begin}; the file is damaged, fetch it again"
        )
    return info, begin, end


def _check_spans(file: Path, spans: list[tuple[int, int, str]], data_bytes: int) -> None:
    position = 0
    for begin, end, name in spans:
        if begin != position:
            raise CheckpointError(
                f"{file}: tensor {name!r} begins at byte {begin} of the data instead of {position}; "
                "the header is damaged, fetch the file again"
            )
        position = end
    if data_bytes < position:
        raise CheckpointError(
            f"{file}: truncated: the header promises {position} bytes of tensors, the file holds {data_bytes}; "
            "fetch the file again"
        )
    if data_bytes > position:
        raise CheckpointError(
            f"{file}: {data_bytes - position} bytes follow the last tensor; the file is damaged, fetch it again"
        )


class SafetensorsWriter:
    """Write one safetensors file, a tensor at a time, in the order of ``layout``.

    Args:
        file: path to create; must not exist.
        layout: name -> (shape, dtype), in writing order.

    Example:
        >>> with SafetensorsWriter(file, {"w": ((2, 4), torch.float32)}) as writer:  # doctest: +SKIP
        ...     writer.write("w", torch.zeros(2, 4))
    """

    def __init__(self, file: Path, layout: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> None:
        self._file = file
        self._layout = dict(layout)
        self._pending = list(layout)
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        position = 0
        for name, (shape, dtype) in self._layout.items():
            end = position + math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": CODE_OF_DTYPE[dtype], "shape": list(shape), "data_offsets": [position, end]}
            position = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._stream: BinaryIO = file.open("xb")
        self._stream.write(struct.pack("<Q", len(text)) + text)

    def write(self, name: str, tensor: Tensor) -> None:
        """Append ``tensor``, which must be the next of the layout and have its shape and dtype."""
        if not self._pending or self._pending[0] != name:
            raise ValueError(f"tensor {name!r} is out of turn, expected {self._pending[:1]}")
        shape, dtype = self._layout[name]
        if tuple(tensor.shape) != tuple(shape) or tensor.dtype != dtype:
            raise ValueError(f"tensor {name!r} is {tuple(tensor.shape)} {tensor.dtype}, expected {shape} {dtype}")
        self._pending.pop(0)
        if tensor.numel():
            # reshape before view: a view to bytes needs at least one dimension
            self._stream.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)

    def close(self) -> None:
        """Flush to the disk; every tensor of the layout must have been written."""
        if self._pending:
            raise ValueError(f"{len(self._pending)} tensors of {self._file} were never written")
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            self._stream.close()
