"""``sparsify_``: replace the 2:4 linears of any model, in place.

Walks a module tree, packs every ``nn.Linear`` whose weight already is 2:4 (or has a mask given for
it), one layer at a time, so that at most one dense layer lives beside what is packed. What is not
2:4 stays as it is and is listed in the report: nothing is pruned here and nothing is silent.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from sparsert.errors import SparsertError, SparsityError
from sparsert.nn.linear import SparseLinear, _check_backend


@dataclasses.dataclass(frozen=True)
class SparsifyReport:
    """What :func:`sparsify_` did.

    Attributes:
        packed: names of the replaced linears.
        dense: name -> reason, of every linear that stayed dense.
        dense_bytes: weight bytes of the replaced linears before.
        packed_bytes: the same after.
    """

    packed: tuple[str, ...]
    dense: Mapping[str, str]
    dense_bytes: int
    packed_bytes: int

    def __str__(self) -> str:
        lines = [f"{len(self.packed)} linears packed 2:4, {self.dense_bytes:,} -> {self.packed_bytes:,} bytes"]
        lines += [f"  dense: {name}: {reason}" for name, reason in self.dense.items()]
        return "\n".join(lines)


def sparsify_(
    model: nn.Module,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    *,
    masks: Mapping[str, Tensor] | None = None,
    backend: str = "auto",
) -> SparsifyReport:
    """Replace 2:4 ``nn.Linear`` modules of ``model`` by :class:`SparseLinear`, in place.

    Args:
        model: any torch or transformers module; weights stay on their device.
        filter_fn: ``(module, name) -> bool``; which linears to consider, all by default. Weights shared
            with another module (a tied head) are never touched.
        masks: module name -> 2:4 mask ``[out_features, in_features]``; a linear without one is packed by
            its zeros if at least half of its values are zero.
        backend: for the new layers, see :class:`SparseLinear`.

    Returns:
        A :class:`SparsifyReport`; print it.

    Raises:
        SparsityError: a mask given for a layer keeps three or four of a group.
        InputError: unknown backend, or a mask that does not fit its layer.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8))
        >>> _ = model[0].weight.data.mul_(torch.tensor([1.0, 0.0, 1.0, 0.0]).repeat(2))
        >>> sparsify_(model).packed
        ('0',)
    """
    _check_backend(backend)
    masks = masks or {}
    packed: list[str] = []
    dense: dict[str, str] = {}
    dense_bytes = packed_bytes = 0
    shared = _shared_weights(model)
    linears = [(name, module) for name, module in model.named_modules() if type(module) is nn.Linear]
    for name, linear in linears:
        if filter_fn is not None and not filter_fn(linear, name):
            dense[name] = "left out by filter_fn"
            continue
        if id(linear.weight) in shared:
            dense[name] = "its weight is shared with another module"
            continue
        mask = masks.get(name)
        if mask is None and 2 * int(torch.count_nonzero(linear.weight)) > linear.weight.numel():
            dense[name] = "more than half of its values are not zero"
            continue
        try:
            sparse = SparseLinear.from_linear(
                linear, None if mask is None else mask.to(linear.weight.device), name=f"{name}.weight", backend=backend
            )
        except SparsertError as error:
            if mask is not None:
                raise
            dense[name] = "not 2:4" if isinstance(error, SparsityError) else str(error)
            continue
        sparse.train(linear.training)
        dense_bytes += linear.weight.nbytes
        packed_bytes += sparse.weight_nbytes
        parent, _, child = name.rpartition(".")
        if name:
            setattr(model.get_submodule(parent), child, sparse)
            packed.append(name)
        else:
            dense[name] = "the model itself is a linear; use SparseLinear.from_linear"
    return SparsifyReport(tuple(packed), dense, dense_bytes, packed_bytes)


def _shared_weights(model: nn.Module) -> set[int]:
    """ids of parameters that more than one module holds."""
    seen: set[int] = set()
    shared: set[int] = set()
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            (shared if id(parameter) in seen else seen).add(id(parameter))
    return shared
