"""Run a transformers model as if it were pruned, for a while, without copying or changing a weight.

A skipped block hands on the hidden states that it was given. The block stays where it is in the model, so indices,
sliding windows and rotations of all others stay what they are, and gradients, hooks and devices are left alone. That is
what a removed block is: what :func:`sparsert.checkpoint.prune_checkpoint` writes computes the same.

A masked linear layer multiplies its weight by a mask whenever it runs.

What it gives up: the key/value cache of ``generate``, in which a skipped block leaves a hole (scores need no cache),
and for masks a copy of the one weight that is running.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch.nn.functional as functional
from torch import Tensor, nn

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
    with replaced_forwards({anatomy.blocks[index]: _hand_on for index in blocks}):
        yield


@contextlib.contextmanager
def masking(linears: Mapping[str, nn.Linear], masks: Mapping[str, Tensor]) -> Iterator[None]:
    """Run linear layers under masks inside the ``with``.

    Args:
        linears: by name, among them all that have a mask.
        masks: by name, bool ``[out_features, in_features]``, True keeps.
    """

    def masked(linear: nn.Linear, mask: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda x: functional.linear(x, linear.weight * mask.to(linear.weight.device), linear.bias)

    with replaced_forwards({linears[name]: masked(linears[name], mask) for name, mask in masks.items()}):
        yield


@contextlib.contextmanager
def replaced_forwards(forwards: Mapping[Any, Callable[..., Tensor]]) -> Iterator[None]:
    """Give modules another forward for a while."""
    # an attribute of the object hides the method of its class; another wrapper may have set one before
    before = [(module, vars(module).get("forward")) for module in forwards]
    for module, forward in forwards.items():
        module.forward = forward
    try:
        yield
    finally:
        for module, earlier in before:
            if earlier is None:
                del module.forward
            else:
                module.forward = earlier
