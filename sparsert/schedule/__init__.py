"""Which transformer blocks of a model run: pure data, no tensors."""

from sparsert.schedule.blocks import format_block_list, guarded_blocks, parse_block_list, read_block_order
from sparsert.schedule.plan import Blocks, LayerPlan

__all__ = ["Blocks", "LayerPlan", "format_block_list", "guarded_blocks", "parse_block_list", "read_block_order"]
