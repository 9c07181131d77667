"""Pure tensor functions between 2:4 masks, nibbles, the packed layout and other projects' layouts."""

from sparsert.formats.bitmask import bitmask_columns, bitmask_from_dense, dense_from_bitmask, from_bitmask, to_bitmask
from sparsert.formats.cutlass import from_cutlass, to_cutlass
from sparsert.formats.maskllm import mask_from_maskllm_bits, maskllm_bits, nibbles_from_maskllm_bits
from sparsert.formats.nibbles import mask_to_nibbles, nibbles_to_mask
from sparsert.formats.packed import (
    Packed24,
    concatenate_outputs,
    interleave_outputs,
    pack_nibbles,
    pack_reference,
    packed_kept_values,
    packed_mask,
    packed_nbytes,
    packed_nibbles,
    packed_shapes,
    unpack_reference,
)
from sparsert.formats.semi_structured import from_semi_structured, to_semi_structured

__all__ = [
    "Packed24",
    "bitmask_columns",
    "bitmask_from_dense",
    "concatenate_outputs",
    "dense_from_bitmask",
    "from_bitmask",
    "from_cutlass",
    "from_semi_structured",
    "interleave_outputs",
    "mask_from_maskllm_bits",
    "mask_to_nibbles",
    "maskllm_bits",
    "nibbles_from_maskllm_bits",
    "nibbles_to_mask",
    "pack_nibbles",
    "pack_reference",
    "packed_kept_values",
    "packed_mask",
    "packed_nbytes",
    "packed_nibbles",
    "packed_shapes",
    "to_bitmask",
    "to_cutlass",
    "to_semi_structured",
    "unpack_reference",
]
