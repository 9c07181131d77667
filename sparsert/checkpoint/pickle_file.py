"""``pytorch_model.bin``: a pickle, opened only in the mode that cannot run code.

``torch.load(weights_only=True)`` rebuilds tensors and plain containers and refuses every other
name a pickle may ask for, so a file that wants code is turned away before anything of it runs.
There is no switch to trust a file: who trusts one can convert it to safetensors elsewhere.
Files in torch's zip format are mapped, not read, so opening a shard of many gigabytes is cheap;
the older format (before torch 1.6) has to be read whole.
"""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from sparsert.errors import CheckpointError, first_line


def load_pickled_tensors(file: Path) -> dict[str, Tensor]:
    """All tensors of a ``.bin`` file on the CPU, mapped from the file where its format allows.

    Raises:
        CheckpointError: missing, damaged, wants to run code, or holds no plain ``name -> tensor`` mapping.
    """
    if not file.is_file():
        raise CheckpointError(f"{file}: no such file; fetch the checkpoint again")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols; what cannot be read is an error anyway
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
        raise CheckpointError(
            f"{file}: this pickle asks for {wanted.group(1) if wanted else 'objects'} that hold more than tensors, "
            "and loading them would run code from the file; nothing was run: get the model as safetensors instead"
        ) from error
    # a damaged pickle calls what it may call with arguments of any kind, and fails there with any error
    except Exception as error:
        raise CheckpointError(f"{file}: truncated or damaged ({first_line(error)}); fetch the file again") from error
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in content.items()
    ):
        raise CheckpointError(
            f"{file}: holds {type(content).__name__} with more than named tensors; a checkpoint file is a plain "
            "mapping of parameter names to tensors, save `model.state_dict()`"
        )
    for name, tensor in content.items():
        _check_tensor(file, name, tensor)
    return content


def _check_tensor(file: Path, name: str, tensor: Tensor) -> None:
    """Refuse what is a tensor to torch and none to us: sparse, quantized, or more elements than bytes in the file."""
    plain = tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
    # one value repeated by a stride of 0 can claim any size, and would only be found out when it is copied
    if not plain or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise CheckpointError(
            f"{file}: tensor {name!r} of shape {list(tensor.shape)} is sparse, quantized or larger than what is stored "
            "for it; the file is damaged, or save `model.state_dict()` with plain tensors"
        )
