"""The activation of a feed-forward layer, with or without a gate.

The reference is torch's; on a GPU one kernel reads gate and up once and writes their product.
"""

from __future__ import annotations

import torch.nn.functional as functional
from torch import Tensor

from sparsert.errors import InputError

#: What :func:`activate` computes. relu2 is the square of relu (So et al., "Primer", 2021).
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu2")


def activate(x: Tensor, kind: str, *, gated: bool) -> Tensor:
    """Apply an activation.

    Args:
        x: ``[..., 2 * width]``, gate then up, if ``gated``; else ``[..., width]``.
        kind: one of :data:`ACTIVATIONS`.
        gated: return ``activation(gate) * up``.

    Returns:
        ``[..., width]``, dtype of x.

    Raises:
        InputError: an unknown kind.
    """
    if kind not in ACTIVATIONS:
        raise InputError(f"activation {kind!r} is not known; choose of {', '.join(ACTIVATIONS)}")
    gate, up = x.chunk(2, dim=-1) if gated else (x, None)
    if kind == "silu":
        y = functional.silu(gate)
    elif kind == "relu2":
        y = functional.relu(gate).square()
    else:
        y = functional.gelu(gate, approximate="tanh" if kind == "gelu_tanh" else "none")
    return y if up is None else y * up
