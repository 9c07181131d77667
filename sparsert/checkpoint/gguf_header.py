"""A look through a GGUF file's header before its reader gets it.

The reader of the package ``gguf`` believes what a file says: a damaged count of 2^60 entries keeps it busy until memory
ends. Here every length is held against what is left of the file first.

    "GGUF", u32 version, u64 tensors, u64 keys
    a key:     string, u32 type, value      a string is u64 length and bytes
    an array:  u32 type, u64 length, values
    a tensor:  string, u32 dimensions, u64 each, u32 type, u64 offset

Source: the GGUF specification of ggml.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path

from sparsert.errors import CheckpointError

_BYTES_OF_TYPE = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY = 8, 9
_MAX_DEPTH, _MAX_DIMENSIONS = 4, 4


def check_gguf_header(file: Path) -> None:
    """Walk through the keys and the list of tensors.

    Raises:
        CheckpointError: no GGUF file, or a length that points past its end.
    """
    try:
        with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
            _Walk(content).header()
    except (OSError, ValueError, struct.error) as error:
        raise CheckpointError(f"{file}: is no readable GGUF file ({error}); fetch it again") from error


class _Walk:
    """A position in a file that cannot leave it."""

    def __init__(self, content: mmap.mmap) -> None:
        self._content = content
        self._position = 0

    def header(self) -> None:
        if self._content[:4] != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        self._position = 4
        version, tensors, keys = self._numbers("<IQQ")
        if version not in (2, 3):
            raise ValueError(f"version {version}, only 2 and 3 are known")
        self._check_count(keys, 13)
        for _ in range(keys):
            self._string()
            self._value(self._numbers("<I")[0], 0)
        self._check_count(tensors, 32)
        for _ in range(tensors):
            self._string()
            (dimensions,) = self._numbers("<I")
            if not 0 < dimensions <= _MAX_DIMENSIONS:
                raise ValueError(f"a tensor of {dimensions} dimensions")
            self._skip(8 * dimensions + 4 + 8)

    def _numbers(self, form: str) -> tuple[int, ...]:
        numbers = struct.unpack_from(form, self._content, self._position)
        self._position += struct.calcsize(form)
        return numbers

    def _skip(self, count: int) -> None:
        self._position += count
        if self._position > len(self._content):
            raise ValueError("an entry goes past its end")

    def _check_count(self, count: int, least_bytes: int) -> None:
        if count * least_bytes > len(self._content) - self._position:
            raise ValueError(f"{count} entries do not fit in what is left of it")

    def _string(self) -> None:
        self._skip(self._numbers("<Q")[0])

    def _value(self, kind: int, depth: int) -> None:
        if kind in _BYTES_OF_TYPE:
            self._skip(_BYTES_OF_TYPE[kind])
        elif kind == _STRING:
            self._string()
        elif kind == _ARRAY and depth < _MAX_DEPTH:
            item, count = self._numbers("<IQ")
            if item in _BYTES_OF_TYPE:
                self._skip(_BYTES_OF_TYPE[item] * count)
                return
            self._check_count(count, 8)
            for _ in range(count):
                self._value(item, depth + 1)
        else:
            raise ValueError(f"a value of unknown type {kind}")
