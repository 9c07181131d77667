"""A layer between file and kernel: the tensors of our format, waiting to be packed.

transformers fills a module tree whose tensors carry the names and shapes of the checkpoint. So a packed linear enters
its loading as a ``SparseLinear`` that holds ``compressed``, ``bitmask`` and ``shape`` in place of ``values`` and
``metadata``; once filled, each is packed in place, one layer at a time. The module object stays the same throughout,
so hooks that accelerate has put on it in between stay as well.

Why not transformers' weight converters, which would pack on arrival: their interface changed between 5.17 and 5.23
(several tensors to several was not possible before), and what they raise is collected into a table instead of ending
the loading. What this gives up: for a moment the device holds one layer twice.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from sparsert import ops
from sparsert.errors import CheckpointError, SparsertError, UnsupportedError
from sparsert.formats import to_bitmask
from sparsert.formats.packed import PACKED_DTYPES
from sparsert.nn import SparseLinear

#: What stands behind a layer's name in our format.
STORED = ("compressed", "bitmask", "shape")
_PACKED = ("values", "metadata")


def stored_names(tensor_names: Iterable[str]) -> list[str]:
    """Names of the packed layers of a checkpoint.

    Args:
        tensor_names: of the whole checkpoint.

    Raises:
        CheckpointError: a packed layer lacks one of its tensors, or is stored dense as well.
    """
    present = set(tensor_names)
    names = sorted({name.rpartition(".")[0] for name in present if name.endswith((".compressed", ".bitmask"))})
    for name in names:
        lacking = [part for part in STORED if f"{name}.{part}" not in present]
        if lacking:
            raise CheckpointError(f"{name}: {', '.join(lacking)} of a packed weight is missing; the file is damaged")
        if f"{name}.weight" in present:
            raise CheckpointError(f"{name}: is stored both packed and as a dense weight; the file is damaged")
    return names


def stored_layer(linear: nn.Linear, name: str) -> SparseLinear:
    """An empty layer in place of ``linear``, to be filled under the names of our format.

    Args:
        linear: gives sizes, dtype, device (may be meta) and whether there is a bias.
        name: of the module, for errors.

    Raises:
        CheckpointError: its width is no multiple of 4.
        UnsupportedError: a dtype that cannot be packed.
    """
    rows, columns, dtype, device = linear.out_features, linear.in_features, linear.weight.dtype, linear.weight.device
    if columns % 4:
        raise CheckpointError(f"{name}: is stored packed, but the model's layer has {columns} inputs, no multiple of 4")
    if dtype not in PACKED_DTYPES:
        raise UnsupportedError(f"{name}: {dtype} cannot be packed; load with dtype bfloat16, float16 or float32")
    layer = SparseLinear(columns, rows, linear.bias is not None, device=device, dtype=dtype)
    for buffer in _PACKED:
        delattr(layer, buffer)
    layer.register_buffer("compressed", torch.empty((rows, columns // 2), dtype=dtype, device=device))
    layer.register_buffer("bitmask", torch.empty((rows, -(-columns // 8)), dtype=torch.uint8, device=device))
    layer.register_buffer("shape", torch.empty((2, 1), dtype=torch.int64, device=device))
    return layer.train(linear.training)


def is_stored(layer: nn.Module) -> bool:
    """Whether a module is a layer that waits to be packed."""
    return isinstance(layer, SparseLinear) and "compressed" in layer._buffers


def pack_stored_(layer: SparseLinear, name: str) -> None:
    """Pack a filled layer in place, on its device.

    Raises:
        CheckpointError: the tensors are damaged or of another layer.
        UnsupportedError: the layer was offloaded.
    """
    compressed, bitmask, shape = (layer.get_buffer(part) for part in STORED)
    if compressed.is_meta or getattr(getattr(layer, "_hf_hook", None), "offload", False):
        raise UnsupportedError(
            f"{name}: packed layers cannot be offloaded; give a device_map of GPUs, or of the CPU alone"
        )
    if shape.flatten().tolist() != [layer.out_features, layer.in_features]:
        raise CheckpointError(
            f"{name}: stored for a weight {shape.flatten().tolist()}, the model's is "
            f"{[layer.out_features, layer.in_features]}; the checkpoint is of another model"
        )
    try:
        packed = ops.pack_bitmask(compressed, bitmask, layer.in_features, name=name)
    except SparsertError as error:
        raise CheckpointError(str(error)) from error
    for part in STORED:
        delattr(layer, part)
    layer.register_buffer("values", packed.values)
    layer.register_buffer("metadata", packed.metadata)


def stored_state(model: nn.Module) -> dict[str, Tensor]:
    """The model's state dict under the names of our format; what was packed is on the host.

    Raises:
        SparsityError: the metadata of a layer is damaged.
    """
    state: dict[str, Tensor] = dict(model.state_dict())
    for name, layer in model.named_modules():
        if isinstance(layer, SparseLinear) and not is_stored(layer):
            prefix = f"{name}." if name else ""
            for buffer in _PACKED:
                del state[f"{prefix}{buffer}"]
            state.update({f"{prefix}{part}": tensor.cpu() for part, tensor in to_bitmask(layer.packed(), name).items()})
    return state
