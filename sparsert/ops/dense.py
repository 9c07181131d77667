"""Dense linear layers of a decode step: the head, and layers that are not 2:4.

For a few texts a dense layer is a read of its weight. Our kernel takes it row by row as it is stored and begins while
the kernel before it ends; for up to eight texts it was faster than cuBLAS on every layer measured (an H100, layers of
Llama-2-7B and Llama-3.1-8B), for sixteen it was not. torch runs everything else.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparsert.ops import native
from sparsert.ops.pack import dtype_code


def dense_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``y = x W^T + bias``.

    Args:
        x: ``[..., in_features]``.
        weight: ``[out_features, in_features]``, dtype and device of x.
        bias: ``[out_features]`` or None.

    Returns:
        ``[..., out_features]``, dtype of x.
    """
    if not takes_dense(x, weight):
        return torch.nn.functional.linear(x, weight, bias)
    return _cuda(x, weight, bias)


def takes_dense(x: Tensor, weight: Tensor) -> bool:
    """Whether our kernel runs a dense layer."""
    rows = x.numel() // max(1, x.shape[-1])
    if not native.fuses(x) or weight.dtype != x.dtype or (weight.requires_grad and torch.is_grad_enabled()):
        return False
    extension: Any = native.module()
    return (
        0 < rows <= extension.dense_linear_max_batch()
        and weight.is_contiguous()
        and weight.shape[1] % 8 == 0
        and weight.data_ptr() % 16 == 0
    )


def _cuda(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    flat = x.reshape(-1, x.shape[-1])
    if flat.stride(1) != 1 or flat.stride(0) % 8 or flat.data_ptr() % 16:
        flat = flat.contiguous()
    y = flat.new_empty((flat.shape[0], weight.shape[0]))
    extension: Any = native.module()
    with torch.cuda.device(x.device):
        extension.dense_linear_cuda(
            weight.data_ptr(), flat.data_ptr(), native.address(bias), y.data_ptr(), flat.shape[0], weight.shape[0],
            weight.shape[1], flat.stride(0), dtype_code(x.dtype), native.stream(x.device),
        )  # fmt: skip
    return y.view((*x.shape[:-1], weight.shape[0]))
