"""MaskLLM's raw masks: a ``.pt`` file of 0/1 tensors, as its tools leave them before they are packed into bits.

    {"<parameter name>.mask": tensor of 0 and 1 in the parameter's shape, any dtype, ...}

Beside ``mask_compressed.npz`` the shapes are known, and a parameter without a mask is one that was left dense: the tool
that makes these files leaves out whatever is not half zeros. The file is a pickle, so it is opened in the mode that
cannot run code, and mapped: a file of 7 GB costs no memory until a mask is asked for.

Source: MaskLLM (arXiv 2409.17481); format re-implemented.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from sparsert.checkpoint.masks import DAMAGE, MaskFile
from sparsert.checkpoint.pickle_file import load_pickled_tensors
from sparsert.errors import CheckpointError

_SUFFIX = ".mask"


class RawMaskFile(MaskFile):
    """An opened file of raw masks. Made by :func:`sparsert.checkpoint.read_maskllm`."""

    def __init__(self, path: Path) -> None:
        tensors = load_pickled_tensors(path)
        foreign = [key for key in tensors if not key.endswith(".weight" + _SUFFIX)]
        if foreign:
            raise CheckpointError(
                f"{path}: key {foreign[0]!r} is none of the form '<parameter>.weight.mask'; this is no mask file"
            )
        if not tensors:
            raise CheckpointError(f"{path}: holds no masks; give a mask file of MaskLLM")
        self._masks = {key.removesuffix(_SUFFIX): tensor for key, tensor in tensors.items()}
        super().__init__(path, {name: -(-mask.numel() // 8) for name, mask in self._masks.items()})

    def check(self, linears: Mapping[str, tuple[int, ...]]) -> None:
        """Check that the file fits a model; a block linear without a mask stays as it is.

        Raises:
            CheckpointError: masks for parameters the model lacks, or a wrong shape.
        """
        self._check_known(linears)
        for name in self.names:
            self._check_shape(name, linears[name])

    def _check_shape(self, name: str, shape: tuple[int, ...]) -> None:
        stored = tuple(self._masks[name].shape)
        if stored != tuple(shape):
            raise CheckpointError(
                f"{self.path}: the mask of {name!r} has shape {list(stored)}, the weight {list(shape)}; the masks "
                "belong to another model"
            )

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """One mask as it is stored, mapped from the file, see :meth:`MaskFile.read`.

        Raises:
            CheckpointError: no mask of that name, or a wrong shape.
        """
        if name not in self:
            raise CheckpointError(f"{self.path}: has no mask for {name!r}; the masks belong to another model")
        self._check_shape(name, shape)
        return self._masks[name]

    def unpack(self, stored: Tensor, name: str, shape: tuple[int, ...]) -> Tensor:
        """A stored mask as bool, see :meth:`MaskFile.unpack`.

        Raises:
            CheckpointError: values beside 0 and 1.
        """
        mask = stored != 0
        if stored.dtype != torch.bool and not torch.equal(mask.to(stored.dtype), stored):
            raise CheckpointError(
                f"{self.path}: the mask of {name!r} holds values beside 0 and 1; the file is damaged, make it again"
            )
        return mask


def is_pickle(path: Path) -> bool:
    """Whether a file is one of ``torch.save`` rather than an npz, by its ending or by what its archive holds."""
    if path.suffix in (".pt", ".pth", ".bin"):
        return True
    try:
        with zipfile.ZipFile(path) as archive:
            return any(member.endswith("/data.pkl") for member in archive.namelist())
    except DAMAGE:
        return False
