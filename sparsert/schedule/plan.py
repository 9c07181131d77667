"""The layer plan: which transformer blocks of a checkpoint run.

Depth pruning removes whole blocks. What remains is an ordinary, shorter model, so a plan is only the
list of kept blocks in the checkpoint's own numbering; their order is the order in which they run, and
their place in the list is the number they have at run time (KV cache slot, module index).

The first four and the last two blocks are guarded: removing any of them ruins a model (LLaMA-7B on
WikiText-2 goes from perplexity 12.6 to 21 without block 24, but to 719 without block 2 and to 8276
without block 0), and criteria that look at weights alone rank exactly these first. Whoever wants it
anyway says ``force=True``. A kept block may run without its attention or without its feed-forward layer.

Source: Kim et al., "Shortened LLaMA" (2024), section 3: the "+" rule keeps blocks 0-3 and the last two.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from sparsert.errors import InputError
from sparsert.schedule.blocks import check_block_indices, format_block_list, guarded_blocks


@dataclasses.dataclass(frozen=True)
class LayerPlan:
    """The blocks of a checkpoint that run.

    Attributes:
        num_blocks: blocks in the checkpoint.
        kept: the blocks that run, in the checkpoint's numbering, strictly ascending.
        without_attention, without_mlp: kept blocks whose attention or feed-forward layer is skipped,
            ascending; a block without both is a removed one and may not be named here.

    Raises:
        InputError: no block is kept, or blocks are out of range, repeated or out of order.

    Example:
        >>> print(LayerPlan.remove(32, [21, 22, 23, 24, 25, 27]))
        26 of 32 blocks: 0-20,26,28-31 (removed: 21-25,27)
    """

    num_blocks: int
    kept: tuple[int, ...]
    without_attention: tuple[int, ...] = ()
    without_mlp: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.num_blocks < 1:
            raise InputError(f"a layer plan needs a model of at least one block, got {self.num_blocks}")
        check_block_indices(self.kept, self.num_blocks, "keep")
        if list(self.kept) != sorted(self.kept):
            raise InputError(f"kept blocks must ascend, got {list(self.kept)}; blocks run in the checkpoint's order")
        if not self.kept:
            raise InputError(f"all {self.num_blocks} blocks would be removed; at least one has to stay")
        for part, blocks in (("attention", self.without_attention), ("mlp", self.without_mlp)):
            check_block_indices(blocks, self.num_blocks, f"skip the {part} of")
            strangers = sorted(set(blocks) - set(self.kept))
            if strangers or list(blocks) != sorted(blocks):
                raise InputError(f"blocks without {part} must be kept ones in ascending order, got {list(blocks)}")
        both = sorted(set(self.without_attention) & set(self.without_mlp))
        if both:
            raise InputError(f"block {format_block_list(both)} would run without attention and mlp; remove it instead")

    def runs_attention(self, block: int) -> bool:
        """Whether the attention layer of a block runs."""
        return block in self.kept and block not in self.without_attention

    def runs_mlp(self, block: int) -> bool:
        """Whether the feed-forward layer of a block runs."""
        return block in self.kept and block not in self.without_mlp

    @property
    def removed(self) -> tuple[int, ...]:
        """The blocks that do not run, ascending, in the checkpoint's numbering."""
        kept = set(self.kept)
        return tuple(index for index in range(self.num_blocks) if index not in kept)

    @classmethod
    def full(cls, num_blocks: int) -> LayerPlan:
        """The plan that keeps every block."""
        return cls(num_blocks, tuple(range(num_blocks)))

    @classmethod
    def remove(cls, num_blocks: int, removed: Iterable[int], *, force: bool = False) -> LayerPlan:
        """The plan that skips ``removed``.

        Args:
            num_blocks: blocks in the checkpoint.
            removed: blocks to skip, in the checkpoint's numbering, any order.
            force: also allow the guarded blocks (0-3 and the last two).

        Raises:
            InputError: an index is out of range or named twice, a guarded block is named without
                ``force``, or nothing would be left.
        """
        removed = tuple(removed)
        check_block_indices(removed, num_blocks, "remove")
        refused = sorted(set(removed) & guarded_blocks(num_blocks))
        if refused and not force:
            free = sorted(set(range(num_blocks)) - guarded_blocks(num_blocks))
            allowed = f"blocks {format_block_list(free)} can go" if free else "this model has no other blocks"
            raise InputError(
                f"refusing to remove block {format_block_list(refused)} of {num_blocks}: without one of the first four "
                f"or the last two blocks perplexity explodes; {allowed}, "
                f"or force it (force=True, --force-remove)"
            )
        gone = set(removed)
        return cls(num_blocks, tuple(index for index in range(num_blocks) if index not in gone))

    def __str__(self) -> str:
        text = f"all {self.num_blocks} blocks"
        if self.removed:
            kept, removed = format_block_list(self.kept), format_block_list(self.removed)
            text = f"{len(self.kept)} of {self.num_blocks} blocks: {kept} (removed: {removed})"
        if self.without_attention:
            text += f", without attention in {format_block_list(self.without_attention)}"
        if self.without_mlp:
            text += f", without mlp in {format_block_list(self.without_mlp)}"
        return text
