"""``sparsify_``: replace the 2:4 linears of any model, in place.

Walks a module tree, packs every ``nn.Linear`` whose weight already is 2:4 (or has a mask given for
it), one layer at a time, so that at most one dense layer lives beside what is packed. What is not
2:4 stays as it is and is listed in the report, as are modules that hold linear weights in another
way than ``nn.Linear``: nothing is pruned here and nothing is silent.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from sparsert.errors import InputError, SparsertError, SparsityError
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
        """A line for each kind of layer: names that differ in their numbers alone share one."""
        lines = [f"{len(self.packed)} linears packed 2:4, {self.dense_bytes:,} -> {self.packed_bytes:,} bytes"]
        lines += [f"  2:4: {kind}" for kind in _kinds([(name, "") for name in self.packed])]
        lines += [f"  dense: {kind}" for kind in _kinds(list(self.dense.items()))]
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
        InputError: unknown backend, a mask that does not fit its layer, or one for a name that is no linear of the
            model.

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
    kept = _kept_by_their_owners(model)
    linears = [(name, module) for name, module in model.named_modules() if type(module) is nn.Linear]
    _check_mask_names(masks, [name for name, _ in linears])
    for name, linear in linears:
        reason = kept.pop(name, None)
        if filter_fn is not None and not filter_fn(linear, name):
            reason = "left out by filter_fn"
        elif id(linear.weight) in shared:
            reason = "its weight is shared with another module"
        elif not name:
            reason = "the model itself is a linear; use SparseLinear.from_linear"
        mask = masks.get(name)
        if reason is None and mask is None and 2 * int(torch.count_nonzero(linear.weight)) > linear.weight.numel():
            reason = "more than half of its values are not zero"
        if reason is not None:
            dense[name] = reason
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
        setattr(model.get_submodule(parent), child, sparse)
        packed.append(name)
    return SparsifyReport(tuple(packed), {**dense, **kept}, dense_bytes, packed_bytes)


def _check_mask_names(masks: Mapping[str, Tensor], linears: list[str]) -> None:
    unknown = sorted(set(masks) - set(linears))
    if unknown:
        raise InputError(
            f"{len(unknown)} masks are for no nn.Linear of the model, the first {unknown[0]!r}; name modules as "
            f"model.named_modules() does, e.g. {linears[0] if linears else 'none: there is no nn.Linear'!r}"
        )


def _kept_by_their_owners(model: nn.Module) -> dict[str, str]:
    """name -> reason, of linear weights that a module in between reads past the layer, or that are no ``nn.Linear``."""
    kept: dict[str, str] = {}
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        if isinstance(module, nn.MultiheadAttention):
            kept[f"{prefix}in_proj_weight"] = "a bare parameter of nn.MultiheadAttention, no nn.Linear"
        elif isinstance(module, nn.TransformerEncoderLayer):
            for child in ("linear1", "linear2"):
                kept[f"{prefix}{child}"] = "nn.TransformerEncoderLayer hands its weight to a fused operator"
        elif type(module).__name__ == "Conv1D" and type(module).__module__.startswith("transformers."):
            kept[name] = "transformers' Conv1D stores its weight transposed; convert it to nn.Linear first"
        elif isinstance(module, nn.Linear) and type(module) is not nn.Linear:
            kept[name] = f"a {type(module).__name__}, whose forward may differ from nn.Linear's"
    return kept


def _shared_weights(model: nn.Module) -> set[int]:
    """ids of parameters that more than one module holds."""
    seen: set[int] = set()
    shared: set[int] = set()
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            (shared if id(parameter) in seen else seen).add(id(parameter))
    return shared


def _kinds(entries: list[tuple[str, str]]) -> list[str]:
    """(name, reason) of layers -> texts, with the numbers of blocks as ``*`` and how often a kind occurs."""
    counts: dict[str, int] = {}
    for name, reason in entries:
        kind = re.sub(r"(?<![^.])\d+(?![^.])", "*", name) + (f": {reason}" if reason else "")
        counts[kind] = counts.get(kind, 0) + 1
    return [f"{kind} ({count}x)" if count > 1 else kind for kind, count in counts.items()]
