"""CUTLASS as a contender: a stand-in for its library on the CPU, the interface in its source, all kernels on a GPU."""

from __future__ import annotations

import ctypes
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsert.bench import cutlass
from sparsert.bench.contenders import random_24
from sparsert.bench.cutlass import FUNCTIONS, INTERFACE, LIBRARY_VARIABLE, SWIZZLES
from sparsert.bench.layer_task import LayerTask
from sparsert.bench.layers import measure_layer, relative_error
from sparsert.errors import UnsupportedError

SOURCE = Path(__file__).parents[2] / "benchmarks" / "cutlass_sparse.cu"


def at(address: int, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Memory at an address, as the library sees it."""
    size = torch.Size(shape).numel() * dtype.itemsize
    return torch.frombuffer((ctypes.c_char * size).from_address(address), dtype=dtype).view(shape)


class StandIn:
    """Speaks the library's interface on the CPU: values are the dense weight, metadata one byte that names its order.

    Kernel 0 is right and slow, 1 wrong, 2 refuses, 3 is right and fast with strips of 4, 4 is fastest and wrong from
    its third run on.
    """

    tile_ks = (128, 128, 64, 64, 64)

    def __init__(self) -> None:
        self.runs = [0] * 5
        self.compressed: list[int] = []
        for name in FUNCTIONS:
            setattr(self, f"cutlass_sparse_{name}", self._function(name))

    def _function(self, name: str) -> Callable[..., Any]:
        def function(*arguments: Any) -> Any:
            return getattr(self, name)(*arguments)

        return function  # unlike a method it takes restype and argtypes

    def interface(self) -> int:
        return INTERFACE

    def version(self) -> bytes:
        return b"4.99.1"

    def kernels(self) -> int:
        return len(self.tile_ks)

    def name(self, kernel: int) -> bytes:
        return b"tile %d" % kernel

    def tile_k(self, kernel: int) -> int:
        return self.tile_ks[kernel]

    def status(self, status: int) -> bytes:
        return {4: b"Error Invalid Problem"}[status]

    def values_bytes(self, kernel: int, m: int, k: int) -> int:
        return m * k * 2

    def metadata_bytes(self, kernel: int, m: int, k: int) -> int:
        return 1

    def workspace_bytes(self, kernel: int, m: int, n: int, k: int, swizzle: int) -> int:
        return -1 if n == 13 else kernel * 8

    def compress(self, kernel: int, weight: int, values: int, metadata: int, m: int, k: int, stream: int) -> int:
        if m % 8:
            return 4
        self.compressed.append(kernel)
        at(values, m, k).copy_(at(weight, m, k))
        at(metadata, 1, dtype=torch.uint8).fill_(self.tile_ks[kernel])
        return 0

    def run(
        self,
        kernel: int,
        values: int,
        metadata: int,
        x: int,
        y: int,
        workspace: int,
        m: int,
        n: int,
        k: int,
        swizzle: int,
        stream: int,
    ) -> int:
        assert stream == 77 and bool(workspace) == bool(kernel)
        if kernel == 2:
            return 4
        self.runs[kernel] += 1
        time.sleep({3: 0.004 if swizzle != 4 else 0.001}.get(kernel, 0.008 if kernel == 0 else 0))
        right_order = int(at(metadata, 1, dtype=torch.uint8)) == self.tile_ks[kernel]
        wrong = kernel == 1 or not right_order or (kernel == 4 and self.runs[4] > 2)
        at(y, n, m).copy_(at(x, n, k) @ at(values, m, k).t() + float(wrong))
        return 0


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> StandIn:
    """The stand-in behind the variable, and a CPU that passes for a Hopper GPU."""
    file = tmp_path / "libcutlass_sparse.so"
    file.touch()
    library = StandIn()
    monkeypatch.setenv(LIBRARY_VARIABLE, str(file))
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library if name == str(file) else None)
    monkeypatch.setattr(cutlass, "why_not", lambda device, dtype: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=77))
    return library


def test_the_fastest_right_kernel_becomes_the_row(stand_in: StandIn) -> None:
    task = LayerTask(24, 136, (5,), ("dense", "cutlass"), "cpu", "bfloat16", repeats=3)
    row = next(row for row in next(measure_layer(task)) if row["contender"] == "cutlass")
    assert row["correct"] is True and row["reason"] is None and row["error"] <= 2 * row["dense_error"]
    assert row["kernel"] == "CUTLASS 4.99.1 tile 3, strips of 4"
    # wrong are all four of kernel 1, three of kernel 4 at once, and its first one when it had won
    assert row["search"] == {"tried": 16, "wrong": 8, "refused": 4}
    assert stand_in.compressed == [0, 2], "once for each order of the metadata"
    assert row["gb_per_s"] == pytest.approx((24 * 136 * 2 + 1) / row["time_us"]["median"] / 1e3)


def test_a_library_that_takes_nothing_says_what_it_refused(stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stand_in, "tile_ks", (128, 128, 64))
    monkeypatch.setattr(stand_in, "run", lambda kernel, *_: 4)
    task = LayerTask(8, 64, (2,), ("dense", "cutlass"), "cpu", "bfloat16", repeats=3)
    dense, theirs = next(measure_layer(task))
    assert dense["correct"] and theirs["time_us"] is None
    assert theirs["reason"] == (
        "CUTLASS runs this product with none of its algorithms correctly (0 tried, 0 wrong; 12 refused, the first "
        "with: CUTLASS tile 0: run answers 'Error Invalid Problem')"
    )


def test_the_compressor_may_refuse_and_so_may_the_gpu(stand_in: StandIn) -> None:
    library = cutlass.load()
    with pytest.raises(RuntimeError, match="CUTLASS tile 0: compress answers 'Error Invalid Problem'"):
        library.compress(random_24(12, 64, torch.bfloat16, "cpu"))
    weight = library.compress(random_24(16, 64, torch.bfloat16, "cpu"))
    with pytest.raises(RuntimeError, match="CUTLASS tile 3: the GPU could not be asked"):
        library.run(3, 1, weight, torch.randn(13, 64, dtype=torch.bfloat16))


def test_copies_share_no_memory(stand_in: StandIn) -> None:
    library = cutlass.load()
    weight = library.compress(random_24(16, 64, torch.bfloat16, "cpu"))
    copy = weight.clone()
    assert torch.equal(copy.values, weight.values) and copy.metadata.keys() == {64, 128}
    copy.values.zero_()
    copy.metadata[64].zero_()
    assert bool(weight.values.any()) and int(weight.metadata[64]) == 64
    assert weight.nbytes == 16 * 64 * 2 + 1


def test_which_library_is_missing_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(LIBRARY_VARIABLE, raising=False)
    with pytest.raises(UnsupportedError, match=r"compile benchmarks/cutlass_sparse\.cu with nvcc .* SPARSERT_CUTLASS"):
        cutlass.load()
    monkeypatch.setenv(LIBRARY_VARIABLE, str(tmp_path / "none.so"))
    with pytest.raises(UnsupportedError, match=r"none\.so: there is no such file; give the compiled library"):
        cutlass.load()
    text = tmp_path / "text.so"
    text.write_text("no library")
    monkeypatch.setenv(LIBRARY_VARIABLE, str(text))
    with pytest.raises(UnsupportedError, match=r"text\.so cannot be loaded \(.*\); compile .* again"):
        cutlass.load()


def test_another_library_is_refused(stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stand_in, "interface", lambda: INTERFACE + 1)
    with pytest.raises(UnsupportedError, match=f"has interface {INTERFACE + 1}, and interface {INTERFACE} is needed"):
        cutlass.load()
    del stand_in.cutlass_sparse_run  # type: ignore[attr-defined]
    with pytest.raises(UnsupportedError, match="has no function cutlass_sparse_run; compile"):
        cutlass.load()


def test_where_it_cannot_run_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    hopper = torch.device("cuda:0")
    assert "are for Hopper GPUs" in str(cutlass.why_not(torch.device("cpu"), torch.bfloat16))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert str(cutlass.why_not(hopper, torch.bfloat16)).endswith("and this is the NVIDIA A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert str(cutlass.why_not(hopper, torch.float16)).endswith("compiled for bfloat16 here, and this is float16")
    assert cutlass.why_not(hopper, torch.bfloat16) is None


def test_the_source_exports_what_is_called() -> None:
    source = SOURCE.read_text()
    c_types = {"int": ctypes.c_int, "int64_t": ctypes.c_int64, "const char*": ctypes.c_char_p}
    found = {}
    pattern = r"EXPORT ([\w ]+\*?) cutlass_sparse_(\w+)\(([^)]*)\)"
    for result, name, parameters in re.findall(pattern, source):
        kinds = [parameter.rsplit(" ", 1)[0] for parameter in re.split(r",\s+", parameters) if parameter]
        found[name] = (c_types[result], [ctypes.c_void_p if "void*" in kind else c_types[kind] for kind in kinds])
    assert found == FUNCTIONS
    assert f"cutlass_sparse_interface() {{ return {INTERFACE}; }}" in source
    kernels = re.findall(r"^    KERNEL\((.*)\),$", source, re.MULTILINE)
    assert len(set(kernels)) == len(kernels) >= 10, "kernels are told apart by their names"
    assert {kernel.split(", ")[2] for kernel in kernels} == {"64", "128"}


@pytest.mark.gpu
@pytest.mark.skipif(LIBRARY_VARIABLE not in os.environ, reason=f"needs the library that {LIBRARY_VARIABLE} names")
@pytest.mark.parametrize(("out_features", "in_features", "batch"), [(264, 192, 1), (1024, 4096, 257), (64, 64, 7)])
def test_every_kernel_computes_the_product(out_features: int, in_features: int, batch: int) -> None:
    device = torch.device("cuda")
    reason = cutlass.why_not(device, torch.bfloat16)
    if reason is not None:
        pytest.skip(reason)
    dense = random_24(out_features, in_features, torch.bfloat16, device)
    x = torch.randn(batch, in_features, device=device).bfloat16()
    exact = x.double() @ dense.double().t()
    tolerance = 2 * relative_error(x @ dense.t(), exact)
    library = cutlass.load()
    weight = library.compress(dense)
    assert weight.nbytes >= dense.nbytes * 9 // 16
    errors = {str(kernel): relative_error(kernel.run(weight, x), exact) for kernel in library.candidates()}
    assert len(errors) >= 10 * len(SWIZZLES)
    assert {name: error for name, error in errors.items() if not error <= tolerance} == {}
