"""Linear layers of a block: dense or packed, and the groups that run as one.

Query, key and value read the same input, and so do gate and up. Run as one matrix with their outputs
one after another they cost one launch instead of three and fill the GPU better; at batch 1 that is
what small key/value layers need. They can be joined when all parts are of one kind: all dense, or all
packed 2:4 (a part whose outputs are no multiple of 16 would leave its padding in the middle). A group
that cannot be joined runs part by part and concatenates the results: same values, slower.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sparsert.formats import concatenate_outputs
from sparsert.formats.packed import ROW_TILE
from sparsert.models.config import LinearShape
from sparsert.nn import SparseLinear


def meta_linear(shape: LinearShape) -> nn.Linear:
    """A linear layer of the right shape that holds no memory."""
    return nn.Linear(shape.in_features, shape.out_features, bias=shape.bias, device="meta")


def dense_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A linear layer around existing tensors, without a copy and without gradients."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear


class LinearGroup(nn.Module):
    """Linear layers that read the same input; their outputs come back one after another.

    Attributes:
        parts: the layers by name, empty once they are joined.
        joined: the one layer that stands for all parts, or None.
    """

    joined: nn.Module | None

    def __init__(self, shapes: dict[str, LinearShape]) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({name: meta_linear(shape) for name, shape in shapes.items()})
        self.joined = None

    def forward(self, x: Tensor) -> Tensor:
        """``x: [..., in_features]`` -> ``[..., sum of out_features]``, in the order of the parts."""
        if self.joined is not None:
            output: Tensor = self.joined(x)
            return output
        return torch.cat([part(x) for part in self.parts.values()], dim=-1)

    def join_(self) -> bool:
        """Join the parts into one layer if they are of one kind; return whether they were.

        Device memory grows by the group's own size until the parts are let go at the end.
        """
        parts = list(self.parts.values())
        if len(parts) == 1:
            self.joined, self.parts = parts[0], nn.ModuleDict()
            return True
        sparse = [part for part in parts if isinstance(part, SparseLinear)]
        dense = [part for part in parts if isinstance(part, nn.Linear)]
        if len(sparse) == len(parts) and not any(part.out_features % ROW_TILE for part in sparse[:-1]):
            packed = concatenate_outputs([part.packed() for part in sparse])
            self.joined = SparseLinear.from_packed(packed, _concatenated_bias(sparse), backend=sparse[0].backend)
        elif len(dense) == len(parts):
            self.joined = dense_linear(torch.cat([part.weight for part in dense]), _concatenated_bias(dense))
        else:
            return False
        self.parts = nn.ModuleDict()
        return True


def _concatenated_bias(parts: Sequence[SparseLinear | nn.Linear]) -> Tensor | None:
    biases: list[Tensor] = [part.bias for part in parts if part.bias is not None]
    return torch.cat(biases) if biases else None
