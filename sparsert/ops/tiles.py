"""Activations in tiles: how the kernels of a decode step hand them to each other for more than a few texts.

A packed linear layer reads its input a chunk of 256 values at a time. Stored by rows, that is one copy for each
row of the batch, and at 16 rows those copies take longer than the weights they go with. In tiles a chunk is
contiguous whatever the batch:

    [width / 32, row tiles, 4, 8, 8]   =   (32 inputs, 8 rows, 8 inputs of the 32, row, input)

Nobody but the kernels looks at them; whoever else gets one calls :meth:`Tiled.to_rows`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from sparsert.ops import native

#: Fewer rows are copied row by row in less time than the padded tile.
_LEAST_ROWS = 5

#: More rows are not read this way (kernels/cuda/linear24.cuh).
_MOST_ROWS = 16

_INPUTS = 64


@dataclasses.dataclass(frozen=True)
class Tiled:
    """Activations in tiles.

    Attributes:
        data: ``[width / 32, row tiles, 4, 8, 8]`` on a GPU; rows past the batch hold anything.
        shape: of the tensor it stands for, ``(..., width)``.
    """

    data: Tensor
    shape: torch.Size

    def to_rows(self) -> Tensor:
        """The tensor it stands for, ``[..., width]``."""
        rows = self.shape[:-1].numel()
        by_rows = self.data.permute(1, 3, 0, 2, 4).reshape(-1, self.shape[-1])
        return by_rows[:rows].reshape(self.shape)


def worth_tiling(rows: int, width: int) -> bool:
    """Whether kernels hand over ``rows`` x ``width`` activations in tiles."""
    return _LEAST_ROWS <= rows <= _MOST_ROWS and width % _INPUTS == 0


def empty_tiles(shape: torch.Size, like: Tensor) -> Tiled:
    """Room for activations of a shape, of the dtype and on the device of ``like``."""
    extension: Any = native.module()
    tiles = extension.activation_tiles(shape[:-1].numel())
    return Tiled(like.new_empty((shape[-1] // 32, tiles, 4, 8, 8)), shape)


def to_rows(x: Tensor | Tiled) -> Tensor:
    """``x`` as a tensor."""
    return x.to_rows() if isinstance(x, Tiled) else x
