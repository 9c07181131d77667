"""Mask files: MaskLLM's ``mask_compressed.npz``, read and written one tensor at a time.

The file is a zip of ``.npy`` arrays, one per pruned parameter:

    key    "<parameter name>.mask", e.g. "model.layers.0.mlp.up_proj.weight.mask"
    value  uint8 [ceil(out * in / 8)]: the 0/1 mask, row-major and flat, eight positions a byte,
           the first position in the highest bit (numpy.packbits' default order)

so a byte is two groups of four, the earlier one in the high half. The file says neither shapes nor
which model it belongs to; both are checked against the checkpoint. A whole file for 8 billion
parameters is 0.9 GB in bits and would be 7 GB in bytes: only the tensor asked for is unpacked.

Source: the released files of MaskLLM (arXiv 2409.17481); format re-implemented.
"""

from __future__ import annotations

import lzma
import os
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sparsert.errors import CheckpointError, InputError
from sparsert.formats.maskllm import mask_from_maskllm_bits

_SUFFIX = ".mask"
_MEMBER_SUFFIX = _SUFFIX + ".npy"

#: More arrays than the linear layers of any model.
_MAX_MEMBERS = 100_000

#: Masks have no repetitions, only some bytes more often than others: the default level makes 3 % less of them in three
#: times as long.
_LEVEL = 1

#: What a damaged zip or array raises while it is read: zipfile and numpy pass on the errors of their parts.
DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    struct.error,
    tokenize.TokenError,
    EOFError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,  # an "encrypted" flag; also NotImplementedError, an unknown compression
    SyntaxError,
    TypeError,
    ValueError,
)


class MaskFile:
    """An opened mask file. Make one with :func:`read_maskllm`.

    Attributes:
        path: the file.
        names: parameter names that have a mask, e.g. ``model.layers.0.mlp.up_proj.weight``.
    """

    def __init__(self, path: Path, lengths: Mapping[str, int]) -> None:
        self.path = path
        self.names: list[str] = list(lengths)
        self._lengths = dict(lengths)

    def __contains__(self, name: object) -> bool:
        return name in self._lengths

    def __len__(self) -> int:
        return len(self._lengths)

    def __repr__(self) -> str:
        return f"MaskFile({str(self.path)!r}, {len(self)} masks)"

    def check(self, linears: Mapping[str, tuple[int, ...]]) -> None:
        """Check that the file fits a model: the same parameters, and masks of the right length.

        Args:
            linears: shape of every block linear of the model, e.g.
                ``{name: checkpoint.shape(name) for name in checkpoint.block_linears()}``.

        Raises:
            CheckpointError: masks for parameters the model lacks, parameters without a mask, or a wrong length.
        """
        self._check_known(linears)
        missing = [name for name in linears if name not in self]
        if missing:
            raise CheckpointError(
                f"{self.path}: {len(missing)} of the model's {len(linears)} block linears have no mask, "
                f"the first {missing[0]!r}; the masks belong to another model or the file is incomplete"
            )
        for name, shape in linears.items():
            self._check_length(name, shape)

    def _check_known(self, linears: Mapping[str, tuple[int, ...]]) -> None:
        foreign = [name for name in self.names if name not in linears]
        if foreign:
            raise CheckpointError(
                f"{self.path}: {len(foreign)} of {len(self)} masks are for parameters this model does not have, "
                f"the first {foreign[0]!r}; the masks belong to another model"
            )

    def _check_length(self, name: str, shape: tuple[int, ...]) -> None:
        needed = -(-int(np.prod(shape, dtype=np.int64)) // 8)
        if self._lengths[name] != needed:
            raise CheckpointError(
                f"{self.path}: the mask of {name!r} has {self._lengths[name]} bytes, a weight of shape {list(shape)} "
                f"needs {needed}; the masks belong to another model"
            )

    def mask(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """One mask on the CPU.

        Args:
            name: parameter name.
            shape: shape of the parameter, which the file does not store.

        Returns:
            bool tensor of ``shape``; True keeps.

        Raises:
            CheckpointError: no mask of that name, a wrong length, or a damaged file.
        """
        return self.unpack(self.read(name, shape), name, shape)

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """One mask as the file holds it, on the CPU: the first half of :meth:`mask`, which threads can do.

        Raises:
            CheckpointError: as :meth:`mask`.
        """
        if name not in self:
            raise CheckpointError(f"{self.path}: has no mask for {name!r}; the masks belong to another model")
        self._check_length(name, tuple(shape))
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open(name + _MEMBER_SUFFIX) as stream:
                return torch.from_numpy(np.lib.format.read_array(stream, allow_pickle=False))
        except DAMAGE as error:
            raise _damaged(self.path, name + _SUFFIX, error) from error

    def unpack(self, stored: Tensor, name: str, shape: tuple[int, ...]) -> Tensor:
        """The mask of what :meth:`read` returned, on the device where that is: the second half of :meth:`mask`.

        Raises:
            CheckpointError: the file is damaged.
        """
        try:
            return mask_from_maskllm_bits(stored, shape, name)
        except InputError as error:
            raise CheckpointError(f"{self.path}: {error}") from error


def read_maskllm(path: str | Path) -> MaskFile:
    """Open a MaskLLM mask file and check its keys and array headers, without unpacking any mask.

    Args:
        path: a ``mask_compressed.npz``, or a raw mask file ``.pt`` (``raw_masks.py``).

    Raises:
        CheckpointError: no such file, no or damaged npz, a key that is no ``<parameter>.weight.mask``, or
            an array that is not flat uint8; a pickle that holds more than tensors.

    Example:
        >>> masks = read_maskllm("mask_compressed.npz")  # doctest: +SKIP
        >>> masks.mask("model.layers.0.mlp.up_proj.weight", (14336, 4096)).sum()  # doctest: +SKIP
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise CheckpointError(f"{file}: no such mask file; give the path of a mask_compressed.npz")
    from sparsert.checkpoint.raw_masks import RawMaskFile, is_pickle

    if is_pickle(file):
        return RawMaskFile(file)
    lengths: dict[str, int] = {}
    try:
        archive = zipfile.ZipFile(file)
    except DAMAGE as error:
        raise CheckpointError(
            f"{file}: truncated or no npz file ({error}); masks are read from MaskLLM's mask_compressed.npz, "
            "fetch the file again"
        ) from error
    with archive:
        members = archive.namelist()
        if len(members) > _MAX_MEMBERS or len(set(members)) < len(members):
            raise CheckpointError(
                f"{file}: holds {len(members)} arrays, or one of them twice; this is no mask file, or it is damaged"
            )
        for member in members:
            if not member.endswith(".weight" + _MEMBER_SUFFIX):
                raise CheckpointError(
                    f"{file}: key {member.removesuffix('.npy')!r} is none of the form '<parameter>.weight.mask'; "
                    "this is no MaskLLM mask file"
                )
            shape, dtype = _read_array_header(file, archive, member)
            if len(shape) != 1 or dtype != np.uint8:
                raise CheckpointError(
                    f"{file}: key {member.removesuffix('.npy')!r} holds {dtype} of shape {list(shape)}, need flat "
                    "uint8 with eight mask positions a byte; pack the mask with numpy.packbits"
                )
            if shape[0] > archive.getinfo(member).file_size:
                raise CheckpointError(
                    f"{file}: key {member.removesuffix('.npy')!r} claims {shape[0]} bytes in a member of "
                    f"{archive.getinfo(member).file_size}; the file is damaged, fetch it again"
                )
            lengths[member.removesuffix(_MEMBER_SUFFIX)] = shape[0]
    if not lengths:
        raise CheckpointError(f"{file}: holds no masks; give a mask_compressed.npz of MaskLLM")
    return MaskFile(file, lengths)


def _read_array_header(file: Path, archive: zipfile.ZipFile, member: str) -> tuple[tuple[int, ...], np.dtype]:
    try:
        with archive.open(member) as stream:
            version = np.lib.format.read_magic(stream)
            if version == (1, 0):
                shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
            else:
                shape, _, dtype = np.lib.format.read_array_header_2_0(stream)
    except DAMAGE as error:
        raise _damaged(file, member.removesuffix(".npy"), error) from error
    return shape, dtype


def _damaged(file: Path, key: str, error: Exception) -> CheckpointError:
    return CheckpointError(f"{file}: key {key!r} is damaged ({error}); fetch the file again")


def write_maskllm(path: str | Path, masks: Iterable[tuple[str, Tensor]], *, compress: bool = True) -> None:
    """Write masks in MaskLLM's format, one at a time, under a temporary name that is renamed at the end.

    Args:
        path: file to create or replace.
        masks: ``(parameter name, mask)``; a mask is a matrix of bool or 0/1, non-zero keeps.
        compress: False makes the file 1.4 times as large in half the time: for files that do not stay.

    Raises:
        InputError: a name that does not end in ``.weight``, a name given twice, or a mask that is no matrix of 0 and 1.
        CheckpointError: the file cannot be written.
    """
    file = Path(path).expanduser()
    temporary = file.with_name(f".{file.name}.{os.getpid()}.partial")
    try:
        kind = zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED
        with zipfile.ZipFile(temporary, "w", kind, allowZip64=True, compresslevel=_LEVEL) as archive:
            seen: set[str] = set()
            for name, mask in masks:
                _check_writable(name, mask, seen)
                seen.add(name)
                packed = np.packbits((mask != 0).cpu().numpy().reshape(-1))
                with archive.open(name + _MEMBER_SUFFIX, "w", force_zip64=True) as stream:
                    np.lib.format.write_array(stream, packed, allow_pickle=False)
        os.replace(temporary, file)
    except OSError as error:
        raise CheckpointError(
            f"{file}: cannot be written ({error.strerror or error}); check the path and the free space"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def _check_writable(name: str, mask: Tensor, seen: set[str]) -> None:
    if not name.endswith(".weight") or name in seen:
        raise InputError(f"mask {name!r}: the name must be that of a weight ('....weight') and appear once")
    binary = mask.dtype == torch.bool or bool(((mask == 0) | (mask == 1)).all())
    if mask.dim() != 2 or not binary:
        raise InputError(
            f"mask {name!r}: got {mask.dtype} of shape {tuple(mask.shape)}; a mask is a matrix of bool or of 0 and 1"
        )
