"""``torch.sparse.SparseSemiStructuredTensor``, to and from the packed layout, for either backend.

    cutlass      ``packed`` and ``meta`` are public layouts: words and values are permuted, nothing is
                 dense in between (``cutlass.py``). Its kernels exist for compute capability 8.x alone.
    cusparselt   one opaque blob whose metadata order depends on library and GPU, so only the library
                 can make it (``torch._cslt_compress`` of a dense copy that lives for the call) and only
                 a product with the identity, which is what ``to_dense()`` runs, can read it back. That
                 product turns -0.0 into +0 and cannot carry infinities or NaN.

Such a tensor belongs to one process and one GPU: never store it, store ``bitmask.py``'s.

Source: ``torch/sparse/semi_structured.py``.
"""

from __future__ import annotations

import torch
from torch.sparse import (
    SparseSemiStructuredTensor,
    SparseSemiStructuredTensorCUSPARSELT,
    SparseSemiStructuredTensorCUTLASS,
)

from sparsert.errors import InputError, UnsupportedError
from sparsert.formats.cutlass import from_cutlass, to_cutlass
from sparsert.formats.packed import Packed24, pack_reference, unpack_reference

#: outputs and inputs must be multiples of these in bf16 and fp16 (torch's shape rules).
SHAPE_MULTIPLES = {"cutlass": (32, 64), "cusparselt": (16, 16)}


def why_unsupported(packed: Packed24, backend: str) -> str | None:
    """Why ``torch.sparse`` cannot run this weight with this backend here, or None if it can."""
    if backend not in SHAPE_MULTIPLES:
        return f"backend {backend!r} is unknown; torch.sparse has {' and '.join(map(repr, SHAPE_MULTIPLES))}"
    if packed.device.type != "cuda":
        return f"torch.sparse runs 2:4 weights on CUDA only and this one is on {packed.device}; move it to a GPU"
    if packed.dtype not in (torch.bfloat16, torch.float16):
        return f"torch.sparse has no 2:4 kernel for {packed.dtype}; use bfloat16 or float16"
    row_multiple, column_multiple = SHAPE_MULTIPLES[backend]
    if packed.out_features % row_multiple or packed.in_features % column_multiple:
        return (
            f"torch.sparse with {backend} needs outputs divisible by {row_multiple} and inputs by {column_multiple}, "
            f"got [{packed.out_features}, {packed.in_features}]; use another backend of SparseLinear"
        )
    major, minor = torch.cuda.get_device_capability(packed.device)
    if backend == "cutlass" and major != 8:
        return (
            f"torch.sparse has CUTLASS 2:4 kernels for compute capability 8.x only and this GPU has {major}.{minor}; "
            f"use 'cusparselt'"
        )
    if backend == "cusparselt" and not torch.backends.cusparselt.is_available():
        return "this build of torch comes without cuSPARSELt; install a CUDA build that has it, or use 'cutlass'"
    if backend == "cusparselt" and major < 8:
        return f"cuSPARSELt needs compute capability 8.0 or more and this GPU has {major}.{minor}"
    return None


def to_semi_structured(packed: Packed24, backend: str = "cutlass", name: str = "weight") -> SparseSemiStructuredTensor:
    """A ``torch.sparse`` tensor of a packed weight.

    Args:
        packed: bf16 or fp16 on a GPU.
        backend: ``"cutlass"`` or ``"cusparselt"``.
        name: tensor name for errors.

    Returns:
        A ``SparseSemiStructuredTensor`` ``[out_features, in_features]`` on the same device, no gradient.

    Raises:
        UnsupportedError: torch, the GPU or the backend cannot run this weight; the message says which and why.
    """
    reason = why_unsupported(packed, backend)
    if reason is not None:
        raise UnsupportedError(f"{name}: {reason}")
    if backend == "cusparselt":
        return SparseSemiStructuredTensorCUSPARSELT.from_dense(unpack_reference(packed))
    values, meta = to_cutlass(packed, name)
    return SparseSemiStructuredTensorCUTLASS(
        torch.Size((packed.out_features, packed.in_features)),
        packed=values,
        meta=meta,
        packed_t=None,
        meta_t=None,
        compressed_swizzled_bitmask=None,
    )


def from_semi_structured(tensor: SparseSemiStructuredTensor, name: str = "weight") -> Packed24:
    """Packed weight of a ``torch.sparse`` tensor of either backend.

    Args:
        tensor: bf16 or fp16, ``[out_features, in_features]``.
        name: tensor name for errors.

    Raises:
        InputError: no semi-structured tensor, or a transposed one.
    """
    if not isinstance(tensor, SparseSemiStructuredTensor):
        raise InputError(
            f"{name}: got {type(tensor).__name__}, need a torch.sparse.SparseSemiStructuredTensor; "
            f"pack a dense weight with sparsert.ops.pack"
        )
    if tensor.packed is None:
        raise InputError(
            f"{name}: this semi-structured tensor is transposed; give its .t(), [out_features, in_features]"
        )
    if isinstance(tensor, SparseSemiStructuredTensorCUTLASS) and tensor.meta is not None and tensor.meta.dim() == 2:
        return from_cutlass(tensor.packed, tensor.meta, name)
    return pack_reference(tensor.to_dense(), name=name)
