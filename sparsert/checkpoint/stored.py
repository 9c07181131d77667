"""How a tensor of a model stands in its files: as it is, or as the parts of a compressed format.

Whoever reads a checkpoint asks for ``model.layers.0.mlp.up_proj.weight`` and gets a matrix, whatever the files hold:

    storage             parts of a linear layer P
    dense               P.weight
    sparse-24-bitmask   P.compressed, P.bitmask, P.shape            also our own format (docs/format.md)
    sparse-bitmask      P.weight.compressed, .bitmask, .shape, .row_offsets
    marlin-24           P.weight_packed, P.scale_packed, P.meta
    weight and mask     P.weight, P._weight_mask                    a ModelOpt model whose masks were not baked in yet
                        P.weight_orig, P.weight_mask                the same of torch.nn.utils.prune

The formats are told by these names alone: what a configuration says of itself is often wrong or missing. A part that
lacks its fellows is an error here, because whoever passed over it would run a layer without its weight.

Source: compressed-tensors up to 0.14.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from sparsert.checkpoint.safetensors_file import TensorInfo
from sparsert.errors import CheckpointError, InputError
from sparsert.formats.bitmask import dense_from_bitmask
from sparsert.formats.marlin24 import dense_from_marlin24, marlin24_sizes
from sparsert.formats.sparse_bitmask import dense_from_sparse_bitmask

DENSE, BITMASK_24, BITMASK, MARLIN_24 = "dense", "sparse-24-bitmask", "sparse-bitmask", "marlin-24"
MODELOPT_MASK, TORCH_MASK = "modelopt-mask", "torch-mask"

_PARTS = {
    MODELOPT_MASK: ("weight", "_weight_mask"),
    TORCH_MASK: ("weight_orig", "weight_mask"),
    BITMASK_24: ("compressed", "bitmask", "shape"),
    BITMASK: ("compressed", "bitmask", "shape", "row_offsets"),
    MARLIN_24: ("weight_packed", "scale_packed", "meta"),
}


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """One tensor of a model.

    Attributes:
        shape: of the tensor as the model wants it.
        dtype: likewise.
        storage: ``dense``, or which of the formats above: ``sparse-24-bitmask``, ``sparse-bitmask``, ``marlin-24``,
            ``modelopt-mask``, ``torch-mask``.
        parts: name in the files of each part; a dense tensor has one, named ``""``.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    storage: str
    parts: Mapping[str, str]


def find_tensors(infos: Mapping[str, TensorInfo], read: Callable[[str], Tensor]) -> dict[str, StoredTensor]:
    """The model's tensors in what the headers list, in the order of their first parts.

    Args:
        infos: what the files hold.
        read: reads one tensor of the files; called for the few bytes of a shape that nothing else tells.

    Raises:
        CheckpointError: parts are missing, do not fit each other, or stand beside the dense tensor they stand for.
    """
    tensors: dict[str, StoredTensor] = {}
    for name, info in infos.items():
        storage = _storage(name, infos)
        if storage == DENSE:
            target, tensor = name, StoredTensor(info.shape, info.dtype, DENSE, {"": name})
        else:
            prefix = name.rpartition(".")[0]
            target = prefix if storage == BITMASK else f"{prefix}.weight"
            known = tensors.get(target)
            if known is not None and name in known.parts.values():
                continue
            tensor = _join_parts(target, prefix, storage, infos, read)
        if target in tensors:
            packed = next(form for form in (storage, tensors[target].storage) if form != DENSE)
            raise CheckpointError(
                f"{info.file}: holds {target!r} twice, dense and as parts of {packed}; the checkpoint was put "
                "together from two, fetch it again"
            )
        tensors[target] = tensor
    return tensors


def _storage(name: str, infos: Mapping[str, TensorInfo]) -> str:
    """The storage that a tensor of the files is a part of."""
    prefix, _, part = name.rpartition(".")
    if part in _PARTS[BITMASK] and (f"{prefix}.bitmask" in infos or f"{prefix}.compressed" in infos):
        return BITMASK if f"{prefix}.row_offsets" in infos else BITMASK_24
    if part in _PARTS[MARLIN_24] and f"{prefix}.weight_packed" in infos and f"{prefix}.meta" in infos:
        return MARLIN_24
    for storage in (MODELOPT_MASK, TORCH_MASK):
        if part in _PARTS[storage] and f"{prefix}.{_PARTS[storage][1]}" in infos:
            return storage
    return DENSE


def _join_parts(
    target: str, prefix: str, storage: str, infos: Mapping[str, TensorInfo], read: Callable[[str], Tensor]
) -> StoredTensor:
    names = {part: f"{prefix}.{part}" for part in _PARTS[storage]}
    missing = [name for name in names.values() if name not in infos]
    if missing:
        present = next(infos[name].file for name in names.values() if name in infos)
        raise CheckpointError(
            f"{present}: {prefix!r} is stored as {storage} but {', '.join(missing)} is missing; the checkpoint is "
            "incomplete, fetch it again"
        )
    parts = {part: infos[name] for part, name in names.items()}
    if storage in (MODELOPT_MASK, TORCH_MASK):
        weight, mask = parts.values()
        if weight.shape != mask.shape:
            raise CheckpointError(
                f"{mask.file}: the mask of {target!r} has shape {list(mask.shape)}, the weight {list(weight.shape)}; "
                "they belong to different models, fetch the checkpoint again"
            )
        return StoredTensor(weight.shape, weight.dtype, storage, names)
    place = parts["shape" if "shape" in parts else "meta"].file
    if storage == MARLIN_24:
        try:
            packed, scales, meta = (parts[part].shape for part in _PARTS[MARLIN_24])
            rows, columns, _ = marlin24_sizes(packed, scales, meta, target)
        except InputError as error:
            raise CheckpointError(f"{place}: {error}") from error
        return StoredTensor((rows, columns), torch.bfloat16, storage, names)
    compressed, bitmask = parts["compressed"], parts["bitmask"]
    sizes: tuple[int, ...] = ()
    if storage == BITMASK_24:
        sizes = (compressed.shape[0], 2 * compressed.shape[1]) if len(compressed.shape) == 2 else ()
    elif parts["shape"].dtype == torch.int64 and parts["shape"].shape in ((2,), (2, 1)):
        sizes = tuple(int(size) for size in read(names["shape"]).flatten().tolist())
    if len(sizes) != 2 or min(sizes) < 1 or bitmask.shape != (sizes[0], -(-sizes[1] // 8)):
        raise CheckpointError(
            f"{place}: the parts of {target!r} do not fit each other: compressed {list(compressed.shape)}, bitmask "
            f"{list(bitmask.shape)}, shape {list(sizes) or list(parts['shape'].shape)}; the file is damaged or no "
            f"{storage}, fetch it again"
        )
    return StoredTensor(sizes, compressed.dtype, storage, names)


def expand(tensor: StoredTensor, parts: Mapping[str, Tensor], name: str) -> Tensor:
    """The tensor that parts stand for.

    Raises:
        InputError, SparsityError: the parts contradict each other.
    """
    if tensor.storage == BITMASK_24:
        return dense_from_bitmask(
            parts["compressed"], parts["bitmask"], checked_shape(tensor.shape, parts["shape"], name), name
        )
    if tensor.storage == BITMASK:
        checked_shape(tensor.shape, parts["shape"], name)
        return dense_from_sparse_bitmask(
            parts["shape"], parts["compressed"], parts["bitmask"], parts["row_offsets"], name
        )
    if tensor.storage == MARLIN_24:
        return dense_from_marlin24(
            parts["weight_packed"], parts["scale_packed"], parts["meta"], dtype=tensor.dtype, name=name
        )
    if tensor.storage in (MODELOPT_MASK, TORCH_MASK):
        weight, mask = parts.values()
        if mask.dtype != torch.bool and not torch.equal((mask != 0).to(mask.dtype), mask):
            raise InputError(f"{name}: its mask holds values beside 0 and 1; the file is damaged")
        return torch.where(mask != 0, weight, torch.zeros((), dtype=weight.dtype))
    return parts[""]


def checked_shape(shape: tuple[int, ...], stored: Tensor, name: str) -> tuple[int, ...]:
    """``shape``, after a look whether the part ``shape`` of a weight says the same.

    Raises:
        InputError: it does not.
    """
    sizes = [int(size) for size in stored.flatten().tolist()] if stored.dtype == torch.int64 else [stored.dtype]
    if sizes != list(shape):
        raise InputError(
            f"{name}: the part 'shape' says {sizes}, the others are those of {list(shape)}; the file is damaged"
        )
    return shape


def part_names(name: str, storage: str) -> dict[str, str]:
    """Part -> name in the files, for a weight that is written in a storage.

    Example:
        >>> part_names("a.weight", "sparse-24-bitmask")["bitmask"]
        'a.bitmask'
    """
    if storage == DENSE:
        return {"": name}
    prefix = name if storage == BITMASK else name.removesuffix(".weight")
    return {part: f"{prefix}.{part}" for part in _PARTS[storage]}


def file_of(tensor: StoredTensor, infos: Mapping[str, TensorInfo]) -> Path:
    """The file that holds a tensor's first part."""
    return infos[next(iter(tensor.parts.values()))].file
