"""CUTLASS's sparse GEMM for Hopper, with the fastest of its kernels that gives right results.

CUTLASS is a library of headers: ``benchmarks/cutlass_sparse.cu`` makes some of its kernels into a shared library, which
the user compiles (its first lines say how) and names in the environment variable SPARSERT_CUTLASS. It is called
through ``ctypes``; which kernels it holds it says itself. A kernel is tried with several widths of the strips in which
its blocks walk over the outputs, since that decides what stays in L2. What it gives up: bf16 only, and those tiles
that are compiled, not all that CUTLASS could make.

Source: NVIDIA CUTLASS, ``GemmUniversalAdapter`` and ``StructuredSparseCompressor``.
"""

from __future__ import annotations

import ctypes
import dataclasses
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsert.errors import UnsupportedError

#: Names the shared library.
LIBRARY_VARIABLE = "SPARSERT_CUTLASS"

#: Of ``cutlass_sparse_interface``; another number means other functions.
INTERFACE = 1

#: Widths of the strips, in tiles at most.
SWIZZLES = (1, 2, 4, 8)

_INT, _BYTES, _TEXT, _POINTER = ctypes.c_int, ctypes.c_int64, ctypes.c_char_p, ctypes.c_void_p

#: Result and arguments of the functions of ``benchmarks/cutlass_sparse.cu``.
FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "interface": (_INT, []),
    "version": (_TEXT, []),
    "kernels": (_INT, []),
    "name": (_TEXT, [_INT]),
    "tile_k": (_INT, [_INT]),
    "status": (_TEXT, [_INT]),
    "values_bytes": (_BYTES, [_INT, _INT, _INT]),
    "metadata_bytes": (_BYTES, [_INT, _INT, _INT]),
    "workspace_bytes": (_BYTES, [_INT, _INT, _INT, _INT, _INT]),
    "compress": (_INT, [_INT, _POINTER, _POINTER, _POINTER, _INT, _INT, _POINTER]),
    "run": (_INT, [_INT, _POINTER, _POINTER, _POINTER, _POINTER, _POINTER, _INT, _INT, _INT, _INT, _POINTER]),
}


@dataclasses.dataclass(frozen=True)
class Compressed:
    """A weight ``[out_features, in_features]`` as CUTLASS stores it.

    Attributes:
        values: uint8, the kept values.
        metadata: uint8, their places, in an order for each inner tile size (``tile_k``) of the kernels.
    """

    out_features: int
    in_features: int
    values: Tensor
    metadata: dict[int, Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes that one product reads: the values and one order of their places."""
        return self.values.nbytes + min(places.nbytes for places in self.metadata.values())

    def clone(self) -> Compressed:
        """Equal contents in memory of their own."""
        places = {tile_k: metadata.clone() for tile_k, metadata in self.metadata.items()}
        return dataclasses.replace(self, values=self.values.clone(), metadata=places)


class Library:
    """The shared library.

    Attributes:
        version: of CUTLASS, e.g. ``"4.2.1"``.
    """

    def __init__(self, file: Path) -> None:
        """Load it.

        Raises:
            UnsupportedError: it is no shared library, or not one of this version of ``cutlass_sparse.cu``.
        """
        again = "compile benchmarks/cutlass_sparse.cu again, as its first lines say"
        try:
            library = ctypes.CDLL(str(file))
        except OSError as error:
            raise UnsupportedError(f"{LIBRARY_VARIABLE}={file} cannot be loaded ({error}); {again}") from None
        self._call: dict[str, Any] = {}
        for name, (result, arguments) in FUNCTIONS.items():
            function = getattr(library, f"cutlass_sparse_{name}", None)
            if function is None:
                raise UnsupportedError(f"{LIBRARY_VARIABLE}={file} has no function cutlass_sparse_{name}; {again}")
            function.restype, function.argtypes = result, arguments
            self._call[name] = function
        found = self._call["interface"]()
        if found != INTERFACE:
            raise UnsupportedError(
                f"{LIBRARY_VARIABLE}={file} has interface {found}, and interface {INTERFACE} is needed; {again}"
            )
        self.version = str(self._call["version"]().decode())
        self._tile_k = [self._call["tile_k"](kernel) for kernel in range(self._call["kernels"]())]

    def compress(self, weight: Tensor) -> Compressed:
        """Compress a dense weight, bf16 ``[out_features, in_features]`` on the GPU, that has its zeros.

        Raises:
            RuntimeError: CUTLASS does not take this shape.
        """
        out_features, in_features = weight.shape
        weight = weight.contiguous()

        def empty(what: str, kernel: int) -> Tensor:
            return weight.new_empty(self._call[what](kernel, out_features, in_features), dtype=torch.uint8)

        values = empty("values_bytes", 0)
        metadata: dict[int, Tensor] = {}
        for kernel, tile_k in enumerate(self._tile_k):
            if tile_k not in metadata:
                places = metadata[tile_k] = empty("metadata_bytes", kernel)
                pointers = (weight.data_ptr(), values.data_ptr(), places.data_ptr())
                self._check("compress", kernel, *pointers, out_features, in_features, _stream(weight))
        return Compressed(out_features, in_features, values, metadata)

    def candidates(self) -> list[Kernel]:
        """Every kernel with every width of its strips."""
        return [Kernel(self, kernel, swizzle) for kernel in range(len(self._tile_k)) for swizzle in SWIZZLES]

    def name(self, kernel: int) -> str:
        """Tile, cluster and schedule of a kernel."""
        return str(self._call["name"](kernel).decode())

    def run(self, kernel: int, swizzle: int, weight: Compressed, x: Tensor) -> Tensor:
        """``x W^T`` by one kernel; see :meth:`Kernel.run`."""
        sizes = (weight.out_features, x.shape[0], weight.in_features)
        workspace_bytes = self._call["workspace_bytes"](kernel, *sizes, swizzle)
        if workspace_bytes < 0:
            raise RuntimeError(f"CUTLASS {self.name(kernel)}: the GPU could not be asked for its properties")
        workspace = x.new_empty(workspace_bytes, dtype=torch.uint8)
        y = x.new_empty(x.shape[0], weight.out_features)
        places = weight.metadata[self._tile_k[kernel]]
        pointers = [tensor.data_ptr() for tensor in (weight.values, places, x, y, workspace)]
        self._check("run", kernel, *pointers, *sizes, swizzle, _stream(x))
        return y

    def _check(self, what: str, kernel: int, *arguments: int) -> None:
        status = self._call[what](kernel, *arguments)
        if status != 0:
            reason = self._call["status"](status).decode()
            raise RuntimeError(f"CUTLASS {self.name(kernel)}: {what} answers {reason!r}")


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One kernel with one width of its strips."""

    library: Library
    index: int
    swizzle: int

    def run(self, weight: Compressed, x: Tensor) -> Tensor:
        """``x W^T``: x bf16 ``[batch, in_features]``, contiguous; returns ``[batch, out_features]``; can be captured.

        Raises:
            RuntimeError: the kernel does not take this shape, or did not start.
        """
        return self.library.run(self.index, self.swizzle, weight, x)

    def __str__(self) -> str:
        return f"CUTLASS {self.library.version} {self.library.name(self.index)}, strips of {self.swizzle}"


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot run on a device and dtype; None if they may."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) != (9, 0):
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()
        return f"CUTLASS's sparse kernels here are for Hopper GPUs (compute capability 9.0), and this is the {name}"
    if dtype != torch.bfloat16:
        return f"CUTLASS's kernels are compiled for bfloat16 here, and this is {str(dtype).removeprefix('torch.')}"
    return None


def load() -> Library:
    """The library that the variable names.

    Raises:
        UnsupportedError: it names none, or no file, or one that does not fit.
    """
    file = os.environ.get(LIBRARY_VARIABLE)
    if not file:
        raise UnsupportedError(
            "CUTLASS's kernels are not compiled: compile benchmarks/cutlass_sparse.cu with nvcc and a checkout of "
            f"CUTLASS, as its first lines say, and give the library in the variable {LIBRARY_VARIABLE}"
        )
    if not Path(file).is_file():
        raise UnsupportedError(f"{LIBRARY_VARIABLE}={file}: there is no such file; give the compiled library")
    return Library(Path(file).resolve())


def _stream(tensor: Tensor) -> int:
    return int(torch.cuda.current_stream(tensor.device).cuda_stream)
