"""Where the packed 2:4 layout keeps things, as Triton index arithmetic shared by all Triton kernels.

``sparsert/formats/packed.py`` defines the layout; this page restates it as addresses. A *group* is
four consecutive inputs of one output; it keeps one *pair* of values and one metadata nibble. In a
block (16 outputs x 32 inputs) lane ``4 g + q`` holds the pairs of groups ``q`` and ``q + 4`` of rows
``g`` and ``g + 8``, so the pairs lie in memory as ``[g][q][half][row half]``. Kernels here therefore
walk a block in *slot* order

    slot = 2 q + half  (0-7)        group of the block = 4 half + q        input = 32 block + 4 group

because then the pairs of rows g and g + 8 of one slot are neighbours, and the eight slots of a row
are contiguous: a tile ``[rows g, slots]`` loads with wide, fully used accesses. One metadata word
serves both rows and four slots (q = 0..3).

All sizes are in 64-bit units for values (two 16-bit pairs, or one float32 pair) and 32-bit words
for metadata.
"""

from __future__ import annotations

import triton
import triton.language as tl

#: Nibble i of this number is the metadata nibble of the 4-bit mask i (bit p: position p is kept); 0
#: for the five masks that keep three or more. The table of sparsert/formats/nibbles.py, in one
#: register: a shift looks it up, where an array would need a load.
NIBBLES_OF_MASKS = tl.constexpr(0x000E_0DCE_098E_498E)


def interpreted(kernel: object) -> bool:
    """Whether ``kernel`` runs in Triton's interpreter (``TRITON_INTERPRET=1`` when triton was imported)."""
    return not isinstance(kernel, triton.runtime.JITFunction)


@triton.jit
def slot_input(index):
    """Input (0-31, then on through the next blocks) of the index-th input in slot order: blocks, slots, positions."""
    return index // 32 * 32 + (index // 4 % 2) * 16 + (index // 8 % 4) * 4 + index % 4


@triton.jit
def slot_group(index):
    """Group (0-7, then on through the next blocks) of the index-th group in slot order."""
    return index // 8 * 8 + (index % 2) * 4 + index // 2 % 4


@triton.jit
def value_offset(block, g, slot):
    """64-bit unit with the 16-bit pairs of rows g and g + 8, from the start of the row tile.

    float32 pairs are 64 bits each: row g at twice this offset, row g + 8 right after it.
    """
    return block * 64 + g * 8 + slot


@triton.jit
def word_offset(unit, lane, units):
    """Metadata word of a lane for a unit of 64 inputs, from the start of the row tile."""
    chunked = (unit // 4 * 32 + lane) * 4 + unit % 4
    return tl.where(unit < units // 4 * 4, chunked, unit * 32 + lane)


@triton.jit
def slot_word_offset(block, g, slot, units):
    """Metadata word that holds the nibbles of a slot of rows g and g + 8, from the start of the row tile."""
    return word_offset(block // 2, 4 * g + block % 2 * 2 + slot % 2, units)


@triton.jit
def load_pairs(values, offset, mask, WIDE: tl.constexpr):
    """Pairs of rows g and g + 8: first and second value of each, as raw bits (int16, or int32 if ``WIDE``).

    Args:
        values: pointer to 64-bit units.
        offset: from :func:`value_offset`.
        mask: where to load; elsewhere the bits are 0.
        WIDE: float32 values.
    """
    if WIDE:
        low = tl.load(values + 2 * offset, mask=mask, other=0)
        high = tl.load(values + 2 * offset + 1, mask=mask, other=0)
        return low.to(tl.int32), (low >> 32).to(tl.int32), high.to(tl.int32), (high >> 32).to(tl.int32)
    else:
        both = tl.load(values + offset, mask=mask, other=0)
        return both.to(tl.int16), (both >> 16).to(tl.int16), (both >> 32).to(tl.int16), (both >> 48).to(tl.int16)
