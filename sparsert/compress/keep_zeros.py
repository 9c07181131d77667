"""Train a pruned model without losing its zeros.

A weight under a 2:4 mask stays under it: the gradient is masked before the optimizer sees it, so its moments stay zero
there, and the weight is masked after every update, so that nothing an optimizer does (rounding, momentum of an earlier
run, decay) can bring a value back. The two places a group keeps are found from the zeros at the start. A group that
keeps fewer than two values names a spare position, as the packed format does (:mod:`sparsert.formats.nibbles`), which
may learn.

Which weights: the linear layers of the blocks that are 2:4 now. One that is half zero but not 2:4 is an error and not
left to grow dense. What it gives up: a bool a weight, a seventh of what training in fp32 holds of it anyway.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sparsert.errors import SparsityError
from sparsert.formats import mask_to_nibbles, nibbles_to_mask
from sparsert.formats.groups import count_groups

#: A weight of so many zeros was pruned; none of a trained dense model comes near.
_PRUNED_SHARE = 0.4


def is_24(weight: Tensor) -> bool:
    """Whether no group of four inputs of a weight ``[out_features, in_features]`` keeps more than two values."""
    return weight.shape[1] % 4 == 0 and count_groups(weight)[1] == 0


def masks_of(linears: Mapping[str, nn.Linear]) -> dict[str, Tensor]:
    """2:4 masks of those linear layers whose weights are 2:4.

    Args:
        linears: by name, as :meth:`sparsert.compress.anatomy.Anatomy.block_linears` gives them.

    Returns:
        Name -> bool ``[out_features, in_features]``, two True in every group of four; dense layers are left out.

    Raises:
        SparsityError: a weight is pruned but not 2:4.
    """
    masks = {}
    for name, linear in linears.items():
        weight = linear.weight.detach()
        if weight.shape[1] % 4:
            continue
        zeros, bad_groups, _ = count_groups(weight)
        if bad_groups == 0:
            masks[name] = nibbles_to_mask(mask_to_nibbles(weight != 0, name), name)
        elif zeros >= _PRUNED_SHARE * weight.numel():
            raise SparsityError(
                f"{name}: {zeros / weight.numel():.0%} of its values are zero, but {bad_groups} of "
                f"{weight.numel() // 4} groups keep more than 2; training would fill the zeros. Prune it 2:4 first, or "
                f"train it as dense (preserve_zeros off)"
            )
    return masks


class ZeroKeeper:
    """Keeps masked weights of a model masked while they are trained.

    Attributes:
        masks: by name of the linear layer.

    Args:
        linears: linear layers by name.
        masks: what each keeps, bool ``[out_features, in_features]``; default :func:`masks_of`.

    Example:
        >>> linear = nn.Linear(8, 2, bias=False)
        >>> _ = linear.weight.data.copy_(torch.tensor([[1.0, 2.0, 0.0, 0.0] * 2] * 2))
        >>> keeper = ZeroKeeper({"linear": linear})
        >>> linear(torch.ones(1, 8)).sum().backward()
        >>> linear.weight.grad[0, :4].tolist()
        [1.0, 1.0, 0.0, 0.0]
    """

    def __init__(self, linears: Mapping[str, nn.Linear], masks: Mapping[str, Tensor] | None = None) -> None:
        self.masks = dict(masks_of(linears) if masks is None else masks)
        self._weights = {name: linears[name].weight for name in self.masks}
        self._handles = []
        for name, weight in self._weights.items():
            if weight.requires_grad:
                mask = self.masks[name]
                self._handles.append(weight.register_hook(lambda gradient, mask=mask: gradient * mask))

    def apply_(self) -> None:
        """Set what the masks leave out to zero; call it after every update."""
        with torch.no_grad():
            for name, weight in self._weights.items():
                weight.masked_fill_(~self.masks[name].to(weight.device), 0.0)

    def close(self) -> None:
        """Take the hooks on the gradients away."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
