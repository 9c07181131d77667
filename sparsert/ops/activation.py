"""The activation of a feed-forward layer, with or without a gate.

The reference is torch's; on a GPU one kernel reads gate and up once and writes their product.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor

from sparsert.errors import InputError
from sparsert.formats.packed import ROW_TILE
from sparsert.ops import native
from sparsert.ops.pack import dtype_code

#: What :func:`activate` computes. relu2 is the square of relu (So et al., "Primer", 2021).
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu2")

#: The kernel reads 16 bytes at a time.
_VECTOR = 8


def activate(x: Tensor, kind: str, *, gated: bool, interleaved: bool = False) -> Tensor:
    """Apply an activation.

    Args:
        x: ``[..., 2 * width]``, gate then up, if ``gated``; else ``[..., width]``.
        kind: one of :data:`ACTIVATIONS`.
        gated: return ``activation(gate) * up``.
        interleaved: gate and up alternate every 16 values (see :func:`sparsert.ops.linear24_open`).

    Returns:
        ``[..., width]``, dtype of x.

    Raises:
        InputError: an unknown kind.
    """
    if kind not in ACTIVATIONS:
        raise InputError(f"activation {kind!r} is not known; choose of {', '.join(ACTIVATIONS)}")
    width = x.shape[-1] // 2 if gated else x.shape[-1]
    interleaved = gated and interleaved
    if native.fuses(x) and width % (ROW_TILE if interleaved else _VECTOR) == 0 and x.numel() > 0:
        return _cuda(x.contiguous(), kind, gated, interleaved, width)
    if interleaved:
        x = x.unflatten(-1, (-1, 2, ROW_TILE)).transpose(-2, -3).flatten(-3)
    gate, up = x.chunk(2, dim=-1) if gated else (x, None)
    if kind == "silu":
        y = functional.silu(gate)
    elif kind == "relu2":
        y = functional.relu(gate).square()
    else:
        y = functional.gelu(gate, approximate="tanh" if kind == "gelu_tanh" else "none")
    return y if up is None else y * up


def _cuda(x: Tensor, kind: str, gated: bool, interleaved: bool, width: int) -> Tensor:
    y = x.new_empty((*x.shape[:-1], width))
    extension: Any = native.module()
    with torch.cuda.device(x.device):
        extension.activate_cuda(
            x.data_ptr(), y.data_ptr(), y.numel() // width, width, ACTIVATIONS.index(kind), gated, interleaved,
            dtype_code(x.dtype), native.stream(x.device),
        )  # fmt: skip
    return y
