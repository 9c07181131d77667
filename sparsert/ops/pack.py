"""Packing and unpacking on the device where the tensor is: CUDA, Triton, threaded C++ or plain torch.

All four give the same bytes. ``auto`` takes the first that is there; the plain-torch reference
(``backend="reference"``) is slow and always works. Unpacking is an operator as well,
``sparsert::unpack24``, for what looks at a weight inside of compiled code.

Weights that stand packed in a checkpoint come as kept values and a bitmask. That is the same content in another order,
so :func:`pack_bitmask` never makes a dense weight: one CUDA kernel, and torch's own operations everywhere else, where
two permutations and a table look-up are fast enough.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from sparsert.errors import InputError, SparsityError, UnsupportedError
from sparsert.formats.bitmask import check_bitmask, check_packable_parts, from_bitmask
from sparsert.formats.groups import count_groups
from sparsert.formats.nibbles import sparsity_error
from sparsert.formats.packed import (
    Packed24,
    check_packable,
    pack_reference,
    packed_shapes,
    unpack_reference,
)
from sparsert.ops import native

PACK_BACKENDS = ("auto", "native", "triton", "reference")

_NO_BAD_GROUP = 2**63 - 1
_DTYPE_CODES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}


def dtype_code(dtype: torch.dtype) -> int:
    """The extension's number for a dtype (kernels/cuda/api.h)."""
    return _DTYPE_CODES[dtype]


def choose_packer(device: torch.device, backend: str) -> str:
    """Which implementation packs and unpacks on ``device``: ``native``, ``triton`` or ``reference``.

    Raises:
        InputError: unknown backend.
        UnsupportedError: the named backend is not available there.
    """
    if backend not in PACK_BACKENDS:
        raise InputError(f"backend={backend!r}: choose one of {', '.join(PACK_BACKENDS)}")
    if device.type == "cuda":
        reason = native.cuda_reason(device)
        triton = native.has_triton()
    elif device.type == "cpu":
        reason = None if native.module() is not None else native.status()["reason"]
        triton = False
    else:
        raise UnsupportedError(f"packing runs on cpu and cuda, the weight is on {device.type}; move it first")
    if backend == "native" and reason is not None:
        raise UnsupportedError(f"backend='native' cannot pack on {device}: {reason}")
    if backend == "triton" and not triton:
        raise UnsupportedError(f"backend='triton' cannot pack on {device}: it needs a GPU and the package triton")
    if backend != "auto":
        return backend
    return "native" if reason is None else "triton" if triton else "reference"


def pack(weight: Tensor, mask: Tensor | None = None, *, name: str = "weight", backend: str = "auto") -> Packed24:
    """Pack a 2:4 weight into the layout of :mod:`sparsert.formats.packed`.

    Args:
        weight: ``[out_features, in_features]``, bf16, fp16 or fp32, on the CPU or a GPU; any strides.
        mask: same shape and device, non-zero keeps. Without it the weight's non-zeros are the mask.
        name: tensor name for errors.
        backend: ``auto``, ``native``, ``triton`` or ``reference``.

    Returns:
        The packed weight on the same device.

    Raises:
        SparsityError: some group keeps three or four values; names the tensor, the count and the first place.
        InputError: no matrix, width no multiple of 4, unsupported dtype, or a mask that does not fit.
        UnsupportedError: the named backend is not available.

    Note:
        Waits for the GPU once, to read how many groups broke the rule. Not for use inside a graph.

    Example:
        >>> pack(torch.tensor([[1.0, 0.0, 2.0, 0.0]])).out_features
        1
    """
    rows, columns = check_packable(weight, mask, name)
    implementation = choose_packer(weight.device, backend)
    if implementation == "reference":
        return pack_reference(weight, mask, name)
    packed, bad_groups, first_group = _run_packer(weight, mask, implementation)
    if bad_groups:
        raise sparsity_error(name, bad_groups, rows, columns, first_group)
    return packed


def pack_if_24(weight: Tensor, *, name: str = "weight") -> tuple[Packed24 | None, int]:
    """Pack a weight if its zeros make it 2:4, and otherwise say how far it is from that.

    Counting first and packing then would read the weight twice and wait for the GPU twice.

    Args:
        weight: as for :func:`pack`.
        name: tensor name for errors.

    Returns:
        The packed weight and 0, or None and the number of groups that keep three or four values.

    Raises:
        InputError: see :func:`pack`.

    Example:
        >>> pack_if_24(torch.tensor([[1.0, 0.0, 2.0, 3.0, 0.0, 0.0, 0.0, 4.0]]))
        (None, 1)
    """
    check_packable(weight, None, name)
    implementation = choose_packer(weight.device, "auto")
    if implementation == "reference":
        _, bad_groups, _ = count_groups(weight)
        return (None, bad_groups) if bad_groups else (pack_reference(weight, None, name), 0)
    packed, bad_groups, _ = _run_packer(weight, None, implementation)
    return (None, bad_groups) if bad_groups else (packed, 0)


def _run_packer(weight: Tensor, mask: Tensor | None, implementation: str) -> tuple[Packed24, int, int]:
    """Packed weight, number of groups that keep more than two values, and the first of them."""
    rows, columns = weight.shape
    if mask is not None:
        mask = (mask if mask.dtype in (torch.bool, torch.uint8) else mask != 0).contiguous()
    if weight.stride(1) != 1:
        weight = weight.contiguous()
    if implementation == "triton":
        from sparsert.kernels.pack24 import pack24

        values, metadata, stats = pack24(weight, mask)
        packed = Packed24(values, metadata, rows, columns)
    else:
        packed = _empty_packed(rows, columns, weight)
        stats = _pack_native(weight, mask, packed)
    bad_groups, first_group = stats.tolist()
    return packed, bad_groups, first_group


def pack_bitmask(compressed: Tensor, bitmask: Tensor, in_features: int, *, name: str = "weight") -> Packed24:
    """Pack a weight that is given as the tensors of sparse-24-bitmask (``sparsert.formats.bitmask``).

    Args:
        compressed: ``[out_features, in_features / 2]``, bf16, fp16 or fp32, on the CPU or a GPU.
        bitmask: uint8 ``[out_features, ceil(in_features / 8)]``, same device.
        in_features: inputs, a multiple of 4.
        name: tensor name for errors.

    Returns:
        The packed weight on the same device, the same bytes as ``sparsert.formats.from_bitmask``.

    Raises:
        SparsityError: a group does not have exactly two bits, or bits are set past the last column.
        InputError: shapes, dtypes or devices do not fit.

    Note:
        Waits for the GPU once, to read whether all bits were right; :func:`pack_bitmask_unchecked` does not.

    Example:
        >>> values, bits = torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.tensor([[105]], dtype=torch.uint8)
        >>> unpack(pack_bitmask(values, bits, 8)).tolist()
        [[1.0, 0.0, 0.0, 2.0, 0.0, 3.0, 4.0, 0.0]]
    """
    packed, bad = pack_bitmask_unchecked(compressed, bitmask, in_features, name=name)
    if bool(bad):
        refuse_bitmask(bitmask, in_features, name)
    return packed


def pack_bitmask_unchecked(
    compressed: Tensor, bitmask: Tensor, in_features: int, *, name: str = "weight"
) -> tuple[Packed24, Tensor]:
    """:func:`pack_bitmask` that does not wait for a GPU: for many weights after another.

    Returns:
        The packed weight, and an int32 ``[]`` on its device that is not 0 if bits are wrong. Then the weight means
        nothing, and :func:`refuse_bitmask` says what is wrong. On a CPU wrong bits raise at once.

    Raises:
        SparsityError, InputError: see :func:`pack_bitmask`.
    """
    shape = len(compressed), in_features
    if compressed.device.type != "cuda" or choose_packer(compressed.device, "auto") != "native":
        packed = from_bitmask(compressed, bitmask, shape, name)
        return packed, torch.zeros((), dtype=torch.int32, device=compressed.device)
    rows, columns = check_packable_parts(compressed, bitmask, shape, name)
    packed = _empty_packed(rows, columns, compressed)
    # a pair of values is read at once
    compressed = native.aligned_rows(compressed.contiguous(), 2 * compressed.element_size())
    bitmask = bitmask.contiguous()
    bad = torch.zeros((), dtype=torch.int32, device=compressed.device)
    extension: Any = native.module()
    with torch.cuda.device(compressed.device):
        extension.pack24_bitmask_cuda(
            compressed.data_ptr(), bitmask.data_ptr(), packed.values.data_ptr(), packed.metadata.data_ptr(),
            bad.data_ptr(), rows, columns, dtype_code(compressed.dtype), native.stream(compressed.device),
        )  # fmt: skip
    return packed, bad


def refuse_bitmask(bitmask: Tensor, in_features: int, name: str) -> NoReturn:
    """Raise what is wrong with a bitmask that a kernel found to be wrong.

    Raises:
        SparsityError: always, with the place.
    """
    check_bitmask(bitmask, in_features, name)
    raise SparsityError(f"{name}: the GPU found groups without exactly 2 of 4 bits; its memory or driver is at fault")


def _empty_packed(rows: int, columns: int, like: Tensor) -> Packed24:
    values_shape, metadata_shape = packed_shapes(rows, columns)
    values = torch.empty(values_shape, dtype=like.dtype, device=like.device)
    return Packed24(values, torch.empty(metadata_shape, dtype=torch.int32, device=like.device), rows, columns)


def _unpack24_impl(values: Tensor, metadata: Tensor, out_features: int, in_features: int) -> Tensor:
    return unpack(Packed24(values, metadata, out_features, in_features))


def _unpack24_fake(values: Tensor, metadata: Tensor, out_features: int, in_features: int) -> Tensor:
    return values.new_empty((out_features, in_features))


_library = torch.library.Library("sparsert", "FRAGMENT")
_library.define("unpack24(Tensor values, Tensor metadata, int out_features, int in_features) -> Tensor")
_library.impl("unpack24", _unpack24_impl, "CPU")
_library.impl("unpack24", _unpack24_impl, "CUDA")
torch.library.register_fake("sparsert::unpack24", _unpack24_fake, lib=_library)


def _pack_native(weight: Tensor, mask: Tensor | None, packed: Packed24) -> Tensor:
    extension: Any = native.module()
    stats = torch.tensor([0, _NO_BAD_GROUP], dtype=torch.int64, device=weight.device)
    arguments = (
        weight.data_ptr(), 0 if mask is None else mask.data_ptr(), packed.values.data_ptr(),
        packed.metadata.data_ptr(), stats.data_ptr(), weight.shape[0], weight.shape[1], weight.stride(0),
        dtype_code(weight.dtype),
    )  # fmt: skip
    if weight.device.type == "cpu":
        extension.pack24_cpu(*arguments, torch.get_num_threads())
    else:
        with torch.cuda.device(weight.device):
            extension.pack24_cuda(*arguments, native.stream(weight.device))
    return stats


def unpack(packed: Packed24, *, backend: str = "auto") -> Tensor:
    """Dense ``[out_features, in_features]`` of a packed weight, on the same device.

    Raises:
        InputError: unknown backend.
        UnsupportedError: the named backend is not available.
    """
    implementation = choose_packer(packed.device, backend)
    if implementation == "reference":
        return unpack_reference(packed)
    return unpack_into(packed.values, packed.metadata, packed.out_features, packed.in_features, implementation)


def unpack_into(values: Tensor, metadata: Tensor, rows: int, columns: int, implementation: str) -> Tensor:
    """:func:`unpack` on bare tensors; ``implementation`` is ``native`` or ``triton``. Safe in a CUDA graph."""
    if implementation == "triton":
        from sparsert.kernels.pack24 import unpack24

        dense: Tensor = unpack24(values, metadata, rows, columns)
        return dense
    extension: Any = native.module()
    dense = torch.empty((rows, columns), dtype=values.dtype, device=values.device)
    arguments = (values.data_ptr(), metadata.data_ptr(), dense.data_ptr(), rows, columns, dtype_code(values.dtype))
    if values.device.type == "cpu":
        extension.unpack24_cpu(*arguments, torch.get_num_threads())
    else:
        with torch.cuda.device(values.device):
            extension.unpack24_cuda(*arguments, native.stream(values.device))
    return dense
