"""The compiled extension ``sparsert._C``, or the reason it is not there.

The extension is optional: without a compiler the install still succeeds, and Triton and plain torch
serve. It is loaded on first use and never at ``import sparsert``. Whether Triton is there is asked here as well.
"""

from __future__ import annotations

import functools
import importlib.util
import types
from typing import Any

import torch


@functools.cache
def _load() -> tuple[types.ModuleType | None, str | None]:
    try:
        from sparsert import _C
    except ImportError as error:
        return None, f"the compiled extension sparsert._C cannot be imported ({error}); reinstall with a C++ compiler"
    return _C, None


def module() -> Any:
    """The extension module, or None."""
    return _load()[0]


@functools.cache
def has_triton() -> bool:
    """Whether the package triton is installed; it is not imported."""
    return importlib.util.find_spec("triton") is not None


def status() -> dict[str, Any]:
    """What was built.

    Returns:
        ``available``: the extension loads. ``cuda``: it holds CUDA kernels. ``architectures``: their GPUs,
        e.g. ``["80", "90a"]``. ``reason``: why something is missing, or None.
    """
    extension, reason = _load()
    if extension is None:
        return {"available": False, "cuda": False, "architectures": [], "reason": reason}
    architectures = list(extension.cuda_architectures())
    if not architectures:
        reason = "built without CUDA kernels because no nvcc was found; install the CUDA toolkit and reinstall"
    return {"available": True, "cuda": bool(architectures), "architectures": architectures, "reason": reason}


def architecture_matches(architecture: str, capability: tuple[int, int]) -> bool:
    """Whether machine code for ``architecture`` ("80", "90a") runs on a GPU of ``capability``.

    Code for X.Y runs on X.Z with Z >= Y; an "a" suffix ties it to exactly X.Y.
    """
    exact = architecture.endswith(("a", "f"))
    number = int(architecture.rstrip("af"))
    major, minor = divmod(number, 10)
    if major != capability[0]:
        return False
    return minor == capability[1] if exact else minor <= capability[1]


@functools.cache
def cuda_reason(device: torch.device, *, exact: bool = False) -> str | None:
    """Why the CUDA kernels cannot run on ``device``; None when they can.

    Args:
        device: a GPU.
        exact: ask about kernels with instructions that only this kind of GPU has (``wgmma``): code for sm_90 lacks
            them, code for sm_90a does not.
    """
    state = status()
    if not state["cuda"]:
        return str(state["reason"])
    capability = torch.cuda.get_device_capability(device)
    matching = [name for name in state["architectures"] if architecture_matches(name, capability)]
    number = f"{capability[0]}{capability[1]}"
    if not matching:
        return (
            f"the CUDA kernels were built for sm_{', sm_'.join(state['architectures'])}, this GPU is sm_{number}; "
            f"reinstall on a machine with this GPU's toolkit"
        )
    if exact and not any(name.endswith("a") for name in matching):
        return (
            f"the CUDA kernels were built for sm_{', sm_'.join(matching)}, and this one has instructions of "
            f"sm_{number}a; reinstall with -C cmake.define.SPARSERT_CUDA_ARCHS={number}a"
        )
    return None


def stream(device: torch.device) -> int:
    """The current CUDA stream of ``device`` as an integer handle."""
    return int(torch.cuda.current_stream(device).cuda_stream)


def fuses(x: torch.Tensor) -> bool:
    """Whether the CUDA kernels of a step (norm, activation, attention) take ``x``.

    They compute in bfloat16 and float16 and know no gradients; where one is wanted, and inside a compiler that
    cannot look into them, torch's operations run.
    """
    return (
        x.is_cuda
        and x.dtype in (torch.bfloat16, torch.float16)
        and not (torch.is_grad_enabled() and x.requires_grad)
        and not torch.compiler.is_compiling()
        and cuda_reason(x.device) is None
    )


def aligned_rows(x: torch.Tensor, nbytes: int) -> torch.Tensor:
    """``x``, ``[rows, columns]``, or a copy whose rows are contiguous inside and begin at multiples of ``nbytes``.

    Args:
        nbytes: what a kernel reads at once; a whole row is a multiple of it.
    """
    fits = x.stride(1) == 1 and x.stride(0) * x.element_size() % nbytes == 0 and x.data_ptr() % nbytes == 0
    return x if fits else x.clone(memory_format=torch.contiguous_format)


def address(tensor: torch.Tensor | None) -> int:
    """Address of a tensor's first element; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()
