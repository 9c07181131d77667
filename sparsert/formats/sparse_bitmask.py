"""The unstructured ``sparse-bitmask`` tensors of compressed-tensors, to a dense weight.

For a weight ``[rows, columns]`` with ``n`` values that are not zero:

    shape        int64 [2]                         rows, columns
    compressed   [n]                               the values, row by row, the weight's dtype
    bitmask      uint8 [rows, ceil(columns / 8)]   bit j of byte c is column 8 c + j
    row_offsets  int64 [rows]                      where each row begins in ``compressed``

Rows keep as many values as they like, so nothing here is 2:4 by its format; a weight that was pruned 2:4 still is,
and the loader finds that by its zeros. There is no writer: the format saves nothing over 2:4 at half the values and
nothing runs it.

Source: compressed-tensors up to 0.14, ``sparse_bitmask.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsert.errors import InputError, SparsityError

#: Rows are expanded in slices of about this many values.
_SLICE_VALUES = 1 << 22


def dense_from_sparse_bitmask(
    shape: Tensor, compressed: Tensor, bitmask: Tensor, row_offsets: Tensor, name: str = "weight"
) -> Tensor:
    """Dense weight, bit for bit, +0 where nothing is kept.

    Args:
        shape, compressed, bitmask, row_offsets: as drawn above, on the CPU.
        name: tensor name for errors.

    Returns:
        ``[rows, columns]`` in the dtype of ``compressed``.

    Raises:
        InputError: shapes or dtypes do not fit each other.
        SparsityError: bits, row offsets and the number of values contradict each other.

    Example:
        >>> dense_from_sparse_bitmask(
        ...     torch.tensor([2, 3]), torch.tensor([1.0, 2.0]), torch.tensor([[4], [1]], dtype=torch.uint8),
        ...     torch.tensor([0, 1]),
        ... ).tolist()
        [[0.0, 0.0, 1.0], [2.0, 0.0, 0.0]]
    """
    sizes = [int(size) for size in shape.flatten().tolist()]
    if len(sizes) != 2 or min(sizes) < 1:
        raise InputError(f"{name}: got shape {sizes}; sparse-bitmask stores a matrix here, two positive sizes")
    rows, columns = sizes
    fits = tuple(bitmask.shape) == (rows, -(-columns // 8)) and bitmask.dtype == torch.uint8
    if not fits or compressed.dim() != 1 or tuple(row_offsets.shape) != (rows,) or row_offsets.dtype != torch.int64:
        raise InputError(
            f"{name}: got compressed {tuple(compressed.shape)}, bitmask {tuple(bitmask.shape)} {bitmask.dtype} and "
            f"row_offsets {tuple(row_offsets.shape)} {row_offsets.dtype} for a weight [{rows}, {columns}]; the file is "
            f"damaged or of another format"
        )
    bits_of_byte = torch.tensor([bin(byte).count("1") for byte in range(256)], dtype=torch.int64)
    counts = torch.stack([bits_of_byte[row.int()].sum() for row in bitmask])
    ends = counts.cumsum(0)
    past = bool((bitmask[:, -1] >> (columns % 8)).any()) if columns % 8 else False
    if past or int(ends[-1]) != compressed.numel() or not torch.equal(ends - counts, row_offsets):
        raise SparsityError(
            f"{name}: the bitmask names {int(ends[-1])} values in rows that do not agree with row_offsets and the "
            f"{compressed.numel()} values stored; the file is damaged, fetch it again"
        )
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[compressed.element_size()]
    values = compressed.contiguous().view(integers)
    dense = values.new_zeros(rows, columns)
    shifts = torch.arange(8, dtype=torch.uint8)
    step = max(1, _SLICE_VALUES // columns)
    for begin in range(0, rows, step):
        end = min(begin + step, rows)
        mask = ((bitmask[begin:end].unsqueeze(-1) >> shifts) & 1).flatten(1)[:, :columns].bool()
        first = int(row_offsets[begin])
        dense[begin:end].masked_scatter_(mask, values[first : int(ends[end - 1])])
    return dense.view(compressed.dtype)
