"""Which transformer blocks of a model run: pure data, no tensors."""

from sparsert.schedule.blocks import (
    format_block_list,
    guarded_blocks,
    parse_block_list,
    read_block_order,
    write_order_file,
)
from sparsert.schedule.plan import SKIP_NAMES, Blocks, LayerPlan

__all__ = [
    "SKIP_NAMES",
    "Blocks",
    "LayerPlan",
    "format_block_list",
    "guarded_blocks",
    "parse_block_list",
    "read_block_order",
    "write_order_file",
]
