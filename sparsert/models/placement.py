"""Where a model runs and in which dtype: names that users write -> torch objects, checked."""

from __future__ import annotations

import torch

from sparsert.errors import InputError, UnsupportedError

#: dtypes a model can be loaded in. The GPU kernels multiply the 16-bit ones.
SUPPORTED_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def resolve_device(device: str | torch.device | None) -> torch.device:
    """The device to run on.

    Args:
        device: ``"cpu"``, ``"cuda"``, ``"cuda:1"``; None takes a GPU if there is one.

    Raises:
        UnsupportedError: a GPU is asked for and there is none of that number, or another kind of device.
        InputError: no device name.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        resolved = torch.device(device)
    except RuntimeError:
        raise InputError(f"device {device!r} is no device name; give cpu, cuda or cuda:N") from None
    if resolved.type not in ("cpu", "cuda"):
        raise UnsupportedError(f"device {resolved} cannot be used; supported: cpu, cuda")
    if resolved.type == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UnsupportedError(
            f"device {resolved}: torch finds no CUDA GPU here; run on the CPU (--device cpu, device='cpu'), "
            f"or see `sparsert env` for what is missing"
        )
    index = torch.cuda.current_device() if resolved.index is None else resolved.index
    if index >= torch.cuda.device_count():
        raise UnsupportedError(f"device {resolved}: there are {torch.cuda.device_count()} GPUs, numbered from 0")
    return torch.device("cuda", index)


def resolve_dtype(dtype: str | torch.dtype | None, device: torch.device, stored: torch.dtype) -> torch.dtype:
    """The dtype to run in.

    Args:
        dtype: a name of :data:`SUPPORTED_DTYPES`, a torch dtype, or None for the default: float32 on a
            CPU; on a GPU float16 for a checkpoint stored so, else bfloat16.
        device: where the model will run.
        stored: dtype of the checkpoint's weights.

    Raises:
        UnsupportedError: another dtype.
    """
    if dtype is None:
        if device.type == "cpu":
            return torch.float32
        return torch.float16 if stored == torch.float16 else torch.bfloat16
    resolved = SUPPORTED_DTYPES.get(str(dtype).removeprefix("torch."))
    if resolved is None:
        raise UnsupportedError(f"dtype {dtype} cannot be run; supported: {', '.join(SUPPORTED_DTYPES)}")
    return resolved
