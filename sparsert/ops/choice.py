"""Which kernel runs a 2:4 linear: the capability table, as data, and the choice made from it.

Every caller goes through :func:`choose`, so what :func:`explain` prints is what runs. A named backend
that cannot run the problem is an error; ``auto`` takes the first row of the table that can, and says
why the rows above it could not.
"""

from __future__ import annotations

import dataclasses
import functools

import torch

from sparsert.errors import InputError, UnsupportedError
from sparsert.ops import native

BACKENDS = ("auto", "native", "triton", "dense")


@dataclasses.dataclass(frozen=True)
class Capability:
    """One row of the table: what a kernel takes."""

    kernel: str
    backend: str
    devices: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    max_batch: int | None  # rows of x; None: any
    summary: str
    min_batch: int = 1
    compute_capability: tuple[int, int] | None = None  # the only one it runs on; None: any
    few_rows: int = 0  # up to so many rows, a layer of fewer weights than few_weights is another kernel's
    few_weights: int = 0


#: In order of preference.
CAPABILITIES: tuple[Capability, ...] = (
    Capability(
        "wgmma_sp", "native", ("cuda",), (torch.bfloat16, torch.float16), None,
        "CUDA, Hopper's sparse tensor cores on the packed weight, for prompts and large batches",
        min_batch=17, compute_capability=(9, 0), few_rows=32, few_weights=2 << 20,
    ),
    Capability(
        "mma_sp", "native", ("cuda",), (torch.bfloat16, torch.float16), 64,
        "CUDA, sparse tensor cores on the packed weight",
    ),
    Capability(
        "mma_sp_gemm", "native", ("cuda",), (torch.bfloat16, torch.float16), None,
        "CUDA, sparse tensor cores on the packed weight in large tiles, for prompts and large batches",
    ),
    Capability(
        "triton", "triton", ("cuda",), (torch.bfloat16, torch.float16), 512,  # beyond, unpacking pays for itself
        "Triton, decompressed in registers, dense tensor cores",
    ),
    Capability(
        "cpu", "native", ("cpu",), (torch.bfloat16, torch.float16, torch.float32), 32,
        "threaded C++ on the packed weight",
    ),
    Capability(
        "unpack", "dense", ("cuda", "cpu"), (torch.bfloat16, torch.float16, torch.float32), None,
        "unpacked into a dense scratch that lives for one call, then a dense matrix product",
    ),
)  # fmt: skip


_TOO_MANY_ROWS = "takes up to"
_TOO_FEW_ROWS = "takes no less than"


@dataclasses.dataclass(frozen=True)
class Choice:
    """What runs and why.

    Attributes:
        kernel: ``wgmma_sp``, ``mma_sp``, ``mma_sp_gemm``, ``triton``, ``cpu`` or ``unpack``.
        summary: what that is, in words.
        rejected: (kernel, reason) of every preferred kernel that could not run.
    """

    kernel: str
    summary: str
    rejected: tuple[tuple[str, str], ...]

    @property
    def is_fallback(self) -> bool:
        """True when a sparse kernel was passed over for a reason other than batch, dtype or device."""
        return any(reason.startswith("unavailable") for _, reason in self.rejected)

    def __str__(self) -> str:
        lines = [f"{self.kernel}: {self.summary}"]
        lines += [f"  not {kernel}: {reason}" for kernel, reason in self.rejected]
        return "\n".join(lines)


@functools.cache
def _unavailable(kernel: str, device: torch.device) -> str | None:
    """Why a kernel is not there on this machine; None when it is."""
    if kernel == "cpu":
        reason = None if native.module() is not None else native.status()["reason"]
        return f"unavailable: {reason}" if reason else None
    if kernel in ("mma_sp", "mma_sp_gemm", "wgmma_sp"):
        reason = native.cuda_reason(device, exact=kernel == "wgmma_sp")
        return f"unavailable: {reason}" if reason else None
    if kernel == "triton" and not native.has_triton():
        return "unavailable: the package triton is not installed"
    if kernel == "triton" and torch.cuda.get_device_capability(device) < (8, 0):
        return "unavailable: needs a GPU of compute capability 8.0 or newer"
    return None


def _rejection(
    row: Capability, device: torch.device, dtype: torch.dtype, batch: int, weights: int | None
) -> str | None:
    if device.type not in row.devices:
        return f"runs on {', '.join(row.devices)}, the weight is on {device.type}"
    if dtype not in row.dtypes:
        return f"takes {', '.join(str(d).removeprefix('torch.') for d in row.dtypes)}, not {dtype}"
    if row.compute_capability is not None and torch.cuda.get_device_capability(device) != row.compute_capability:
        return f"runs on GPUs of compute capability {'.'.join(map(str, row.compute_capability))} only"
    reason = _unavailable(row.kernel, device)
    if reason is not None:
        return reason
    if batch < row.min_batch:
        return f"{_TOO_FEW_ROWS} {row.min_batch} rows of input, not {batch}"
    if row.max_batch is not None and batch > row.max_batch:
        return f"{_TOO_MANY_ROWS} {row.max_batch} rows of input, not {batch}"
    if weights is not None and weights < row.few_weights and batch <= row.few_rows:
        return f"{_TOO_FEW_ROWS} {row.few_rows + 1} rows of input for a layer of {weights} weights, not {batch}"
    return None


@functools.lru_cache(maxsize=4096)
def choose(
    device: torch.device, dtype: torch.dtype, batch: int, backend: str = "auto", weights: int | None = None
) -> Choice:
    """Choose the kernel for ``batch`` rows of ``dtype`` on ``device``.

    ``weights``, ``out_features * in_features``, tells small layers; None: it is not one.

    A backend named explicitly restricts the table to its rows, plus ``unpack`` for batches beyond what
    its kernel takes: that is how a CPU serves a prompt.

    Raises:
        InputError: unknown backend.
        UnsupportedError: the named backend cannot run this on this device and dtype.
    """
    if backend not in BACKENDS:
        raise InputError(f"backend={backend!r}: choose one of {', '.join(BACKENDS)}")
    rejected: list[tuple[str, str]] = []
    for row in CAPABILITIES:
        if backend not in ("auto", row.backend) and row.kernel != "unpack":
            continue
        reason = _rejection(row, device, dtype, batch, weights)
        if reason is None and row.kernel == "unpack" and backend not in ("auto", "dense"):
            rows = (_TOO_MANY_ROWS, _TOO_FEW_ROWS)
            hindrances = [f"{kernel} {why}" for kernel, why in rejected if not why.startswith(rows)]
            if len(hindrances) == len(rejected):  # not the batch: this backend does not run here at all
                raise UnsupportedError(f"backend={backend!r} cannot run here: {'; '.join(hindrances)}; use 'auto'")
        if reason is None:
            return Choice(row.kernel, row.summary, tuple(rejected))
        rejected.append((row.kernel, reason))
    raise UnsupportedError(
        f"no kernel runs a 2:4 linear on {device} in {dtype}: "
        + "; ".join(f"{kernel} {reason}" for kernel, reason in rejected)
    )
