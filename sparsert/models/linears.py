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

from sparsert import ops
from sparsert.formats import concatenate_outputs, interleave_outputs
from sparsert.formats.packed import ROW_TILE, Packed24
from sparsert.models.config import LinearShape
from sparsert.nn import SparseLinear


class DenseLinear(nn.Linear):
    """A dense layer that :func:`sparsert.ops.dense_linear` runs."""

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_features]`` -> ``[..., out_features]``."""
        return ops.dense_linear(x, self.weight, self.bias)


def meta_linear(shape: LinearShape) -> DenseLinear:
    """A linear layer of the right shape that holds no memory."""
    return DenseLinear(shape.in_features, shape.out_features, bias=shape.bias, device="meta")


def dense_linear(weight: Tensor, bias: Tensor | None) -> DenseLinear:
    """A linear layer around existing tensors, without a copy and without gradients."""
    linear = DenseLinear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear


class LinearGroup(nn.Module):
    """Linear layers that read the same input; their outputs come back one after another.

    Attributes:
        parts: the layers by name, empty once they are joined.
        joined: the one layer that stands for all parts, or None.
        interleaved: its outputs are not those of the parts one after another but 16 of each of two in turn.
    """

    joined: nn.Module | None
    interleaved: bool

    def __init__(self, shapes: dict[str, LinearShape]) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({name: meta_linear(shape) for name, shape in shapes.items()})
        self.joined = None
        self.interleaved = False

    def forward(self, x: Tensor | ops.DeferredNorm) -> Tensor:
        """``x: [..., in_features]`` -> ``[..., sum of out_features]``, in the order of the parts unless interleaved."""
        if isinstance(x, ops.DeferredNorm):
            if isinstance(self.joined, SparseLinear):
                layer = self.joined
                return ops.to_rows(ops.linear24_open(x, layer.packed(), layer.bias, backend=layer.backend))
            x = x.resolve()
        if self.joined is not None:
            output: Tensor = self.joined(x)
            return output
        return torch.cat([part(x) for part in self.parts.values()], dim=-1)

    def activated(
        self, x: Tensor | ops.DeferredNorm, activation: str, *, gated: bool, tiled: bool = False
    ) -> Tensor | ops.Tiled:
        """``activation(first part) * second part`` of two parts if ``gated``, else ``activation(outputs)``.

        If ``tiled``, the result may be in tiles.
        """
        layer = self.joined
        if isinstance(layer, SparseLinear) and self.interleaved == gated:
            return ops.linear24_open(
                x, layer.packed(), layer.bias, activation=activation, gated=gated, tiled=tiled, backend=layer.backend
            )
        return ops.activate(self(x), activation, gated=gated, interleaved=self.interleaved)

    def takes_deferred(self, like: Tensor | ops.Tiled) -> bool:
        """Whether a norm in front of it may put off its division, for as many rows as ``like`` has."""
        return isinstance(self.joined, SparseLinear) and ops.fuses24(like, self.joined.backend)

    def join_(self, *, interleave: bool = False) -> bool:
        """Join the parts into one layer if they are of one kind; return whether they were.

        Args:
            interleave: of two packed parts of one shape, let 16 outputs take turns, so that :meth:`activated` is
                one kernel; parts that cannot be are joined one after another.

        Device memory grows by the group's own size until the parts are let go at the end.
        """
        parts = list(self.parts.values())
        if len(parts) == 1:
            self.joined, self.parts = parts[0], nn.ModuleDict()
            return True
        sparse = [part for part in parts if isinstance(part, SparseLinear)]
        dense = [part for part in parts if isinstance(part, nn.Linear)]
        if len(sparse) == len(parts) and not any(part.out_features % ROW_TILE for part in sparse[:-1]):
            outputs = {part.out_features for part in sparse}
            self.interleaved = interleave and len(sparse) == 2 and len(outputs) == 1 and not outputs.pop() % ROW_TILE
            packed = (interleave_outputs if self.interleaved else _concatenate)(*(part.packed() for part in sparse))
            bias = _concatenated_bias(sparse)
            if self.interleaved and bias is not None:
                bias = bias.unflatten(0, (2, -1, ROW_TILE)).transpose(0, 1).flatten()
            self.joined = SparseLinear.from_packed(packed, bias, backend=sparse[0].backend)
        elif len(dense) == len(parts):
            self.joined = dense_linear(torch.cat([part.weight for part in dense]), _concatenated_bias(dense))
        else:
            return False
        self.parts = nn.ModuleDict()
        return True


def _concatenate(*parts: Packed24) -> Packed24:
    return concatenate_outputs(list(parts))


def _concatenated_bias(parts: Sequence[SparseLinear | nn.Linear]) -> Tensor | None:
    biases: list[Tensor] = [part.bias for part in parts if part.bias is not None]
    return torch.cat(biases) if biases else None


def takes_tiles(layer: nn.Module, like: Tensor | ops.Tiled) -> bool:
    """Whether a layer takes activations in tiles, for as many rows as ``like`` has."""
    return isinstance(layer, SparseLinear) and ops.fuses24(like, layer.backend)
