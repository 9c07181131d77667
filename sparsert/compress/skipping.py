"""Run a transformers model without some of its blocks, for a while, without copying a weight.

A skipped block hands on the hidden states that it was given. The block stays where it is in the model, so indices,
sliding windows and rotations of all others stay what they are, and gradients, hooks and devices are left alone. That is
what a removed block is: what :func:`sparsert.checkpoint.prune_checkpoint` writes computes the same.

What it gives up: the key/value cache of ``generate``, in which a skipped block leaves a hole; scores need no cache.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from typing import Any

from torch import Tensor

from sparsert.compress.anatomy import Anatomy
from sparsert.schedule.blocks import check_block_indices


def _hand_on(hidden_states: Tensor, *arguments: Any, **options: Any) -> Tensor:
    return hidden_states


@contextlib.contextmanager
def skipping(anatomy: Anatomy, blocks: Collection[int]) -> Iterator[None]:
    """Leave blocks out of every forward inside the ``with``.

    Args:
        anatomy: of the model.
        blocks: indices of blocks; none is fine, and so is one that an outer ``skipping`` leaves out already.

    Raises:
        InputError: an index is out of range or repeated.
    """
    check_block_indices(tuple(blocks), anatomy.num_blocks, "skip")
    # an attribute of the object hides the method of its class; another wrapper may have set one before
    before = [(anatomy.blocks[index], vars(anatomy.blocks[index]).get("forward")) for index in blocks]
    for block, _ in before:
        block.forward = _hand_on
    try:
        yield
    finally:
        for block, forward in before:
            if forward is None:
                del block.forward
            else:
                block.forward = forward
