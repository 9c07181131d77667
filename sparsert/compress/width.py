"""From importance to a narrower model: which heads, neurons and channels stay.

A :class:`Widths` says how wide every block is to be; a :class:`Selection` which units stay, found from the scores:

- channels: the best of the whole model, the same in every block, because the residual stream is one;
- neurons: the best of each block;
- heads: groups of query heads share a key and value head, and every group keeps as many query heads as the others, or
  no attention kernel would read them. First the groups with the largest sum of scores, then in each the heads that
  contribute most to the residual stream (:mod:`sparsert.compress.width_scores` says why these two differ).

Kept units stay in their order, so a model trimmed to its own size is the same model. Sizes are rounded to multiples of
64, which packed 2:4 weights and tensor cores want, unless told otherwise.

Source: Muralidharan et al. (arXiv 2407.14679), section 2.3.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from sparsert.compress.anatomy import Anatomy
from sparsert.compress.width_scores import WidthScores, check_uniform
from sparsert.errors import InputError

#: What sizes are rounded to: inputs of a packed weight come in units of 64, its outputs in tiles of 16.
MULTIPLE = 64


@dataclasses.dataclass(frozen=True)
class Widths:
    """Sizes of every block of a model.

    Attributes:
        hidden: channels of the residual stream.
        intermediate: neurons of the feed-forward layer.
        heads: query heads.
        kv_heads: key and value heads.
        head_dim: width of a head, which pruning never changes.

    Raises:
        InputError: a size below 1, or query heads that cannot share key and value heads evenly.
    """

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if getattr(self, field.name) < 1:
                raise InputError(f"{field.name} is {getattr(self, field.name)}; it must be at least 1")
        if self.heads % self.kv_heads:
            raise InputError(
                f"{self.heads} query heads cannot share {self.kv_heads} key/value heads evenly; ask for a multiple"
            )

    @property
    def group(self) -> int:
        """Query heads that share a key and value head."""
        return self.heads // self.kv_heads

    def __str__(self) -> str:
        return (
            f"hidden {self.hidden}, intermediate {self.intermediate}, {self.heads} query and {self.kv_heads} key/value "
            f"heads of {self.head_dim}"
        )


@dataclasses.dataclass(frozen=True)
class Selection:
    """The units that stay, ascending, int64 on the CPU.

    Attributes:
        channels: ``[hidden]``.
        neurons: ``[blocks, intermediate]``.
        heads: ``[blocks, heads]`` query heads, a group behind the other.
        kv_heads: ``[blocks, kv_heads]``.
    """

    channels: Tensor
    neurons: Tensor
    heads: Tensor
    kv_heads: Tensor


def widths_of(anatomy: Anatomy) -> Widths:
    """Sizes of a model whose blocks are alike.

    Raises:
        UnsupportedError: its blocks differ, or lack a layer.
    """
    head_dim = check_uniform(anatomy)
    block: Any = anatomy.blocks[0]
    heads = block.self_attn.o_proj.in_features // head_dim
    kv_heads = getattr(anatomy.config, "num_key_value_heads", None) or heads
    return Widths(anatomy.embedding.embedding_dim, block.mlp.down_proj.in_features, heads, kv_heads, head_dim)


def rounded_widths(
    whole: Widths,
    *,
    hidden: int | None = None,
    intermediate: int | None = None,
    heads: int | None = None,
    kv_heads: int | None = None,
    multiple: int = MULTIPLE,
) -> Widths:
    """Sizes to trim to: what is not named stays, the others to the nearest multiple.

    Args:
        whole: sizes of the model.
        hidden, intermediate, heads, kv_heads: wanted sizes.
        multiple: of hidden and intermediate; 1 takes them as they are. Heads are never rounded.

    Returns:
        The sizes. With fewer key and value heads but no word on query heads, groups stay as large as they are.

    Raises:
        InputError: larger than the model, or heads that do not fit.

    Example:
        >>> rounded_widths(Widths(576, 1536, 9, 3, 64), hidden=400, intermediate=1000)
        Widths(hidden=384, intermediate=1024, heads=9, kv_heads=3, head_dim=64)
    """
    if multiple < 1:
        raise InputError(f"multiple is {multiple}; it must be at least 1")
    wanted = {"hidden": hidden, "intermediate": intermediate, "heads": heads, "kv_heads": kv_heads}
    sizes = {}
    for name, size in wanted.items():
        most = getattr(whole, name)
        if size is None:
            sizes[name] = most
            continue
        if not 1 <= size <= most:
            raise InputError(f"{name} is to be {size}, the model has {most}; ask for 1-{most}")
        if name in ("hidden", "intermediate") and size != most:
            size = min(most, max(multiple, round(size / multiple) * multiple))
        sizes[name] = size
    if kv_heads is not None and heads is None:
        sizes["heads"] = kv_heads * whole.group
    if sizes["heads"] // sizes["kv_heads"] > whole.group:
        raise InputError(
            f"{sizes['heads']} query heads for {sizes['kv_heads']} key/value heads are more than the {whole.group} "
            f"that share one in this model; ask for fewer query heads or more key/value heads"
        )
    return Widths(**sizes, head_dim=whole.head_dim)


def select_units(scores: WidthScores, whole: Widths, target: Widths) -> Selection:
    """The most important units of a model.

    Args:
        scores: of the model.
        whole: its sizes.
        target: sizes to trim to, none larger.

    Returns:
        Which units stay.
    """
    groups = scores.heads.unflatten(1, (whole.kv_heads, whole.group))  # [blocks, kv heads, group]
    kv_heads = _best(groups.sum(-1), target.kv_heads)
    inside_groups = scores.contributions.unflatten(1, (whole.kv_heads, whole.group))
    kept = inside_groups.gather(1, kv_heads[..., None].expand(-1, -1, whole.group))
    inside = _best(kept, target.group)  # [blocks, kv heads that stay, query heads of each that stay]
    heads = (kv_heads[..., None] * whole.group + inside).flatten(1)
    return Selection(_best(scores.channels, target.hidden), _best(scores.neurons, target.intermediate), heads, kv_heads)


def retained_importance(scores: WidthScores, selection: Selection) -> float:
    """How much of the importance stays: the product over heads, neurons and channels of the share kept, 0 to 1.

    A rough order of candidates, nothing more: shares of different kinds are not worth the same.
    """
    shares = [
        scores.heads.gather(1, selection.heads).sum() / scores.heads.sum(),
        scores.neurons.gather(1, selection.neurons).sum() / scores.neurons.sum(),
        scores.channels[selection.channels].sum() / scores.channels.sum(),
    ]
    return float(torch.stack(shares).prod())


def _best(scores: Tensor, count: int) -> Tensor:
    """Indices of the largest of the last dimension, ascending; of equal ones the first."""
    order = scores.argsort(dim=-1, descending=True, stable=True)
    return order[..., :count].sort(dim=-1).values
