"""Importance of heads, neurons and embedding channels: how large their activations are on calibration text.

    query head i of a block   |o_i|, o_i: what head i gives to the output projection     one score a block and head
    ... its contribution      |W_o o_i|, what it adds to the residual stream             likewise
    neuron i of a block       what neuron i gives to the down projection                 one score a block and neuron
    embedding channel i       what every norm of the blocks gives in channel i           one score for the whole model,
                                                                                         summed over the norms

One forward pass, no gradient. An activation exists for every window and position; it is aggregated over the windows
first and over the positions then, each by ``mean`` of the absolute values, ``l2`` (the norm) or ``var`` (variance). L2
over windows and mean over positions is what did best in the paper and is the default. Sums are kept for each position
and unit, in float32 on the model's device: for a model of 7 billion and windows of 1024 tokens 3 GB.

Neurons are scored by what enters the down projection, behind activation and gate. The paper takes the rows of the first
layer before the activation; its models have no gate, and of a gated layer neither factor alone says what it passes on.

The contribution is not the paper's. It serves one choice only: which query heads of a group stay where groups get
smaller, for which |o_i| is no better than chance. SmolLM2-135M, perplexity 25 before, without training: two of every
three query heads kept by |o_i| 579, by contribution 132, at random 241 to 764. Whole groups and neurons are chosen
better by plain activations (two of three groups: 63 against 108; 1280 of 1536 neurons: 40 against 49).

Source: Muralidharan et al. (arXiv 2407.14679), section 2.2 and table 13.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sparsert.compress.anatomy import Anatomy
from sparsert.compress.score_windows import batches_of, check_windows
from sparsert.errors import InputError, UnsupportedError

AGGREGATIONS = ("mean", "l2", "var")

#: Norms in front of a layer; those behind one (Gemma) are normed copies of what heads and neurons count already.
_INPUT_NORMS = {
    False: ("input_layernorm", "post_attention_layernorm"),
    True: ("input_layernorm", "pre_feedforward_layernorm"),
}


@dataclasses.dataclass(frozen=True)
class WidthScores:
    """Importance of what can be trimmed; larger is needed more. All float64 on the CPU.

    Attributes:
        heads, contributions: ``[blocks, query heads]``.
        neurons: ``[blocks, intermediate]``.
        channels: ``[hidden]``.
    """

    heads: Tensor
    contributions: Tensor
    neurons: Tensor
    channels: Tensor


def score_widths(
    anatomy: Anatomy,
    windows: Tensor,
    *,
    over_windows: str = "l2",
    over_positions: str = "mean",
    batch_size: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> WidthScores:
    """Score every head, neuron and embedding channel of a model.

    Args:
        anatomy: of the model, all blocks of which have the same widths.
        windows: int64 ``[windows, length]`` of calibration text.
        over_windows, over_positions: of :data:`AGGREGATIONS`.
        batch_size: windows in one pass.
        progress: called with how many batches are done of how many.

    Returns:
        The scores.

    Raises:
        InputError: unknown aggregation, unusable windows, or scores that are not finite.
        UnsupportedError: the blocks differ in width or lack a layer.
    """
    for name, value in (("over_windows", over_windows), ("over_positions", over_positions)):
        if value not in AGGREGATIONS:
            raise InputError(f"{name} {value!r} is not known; choose one of {', '.join(AGGREGATIONS)}")
    check_windows(anatomy, windows)
    head_dim = check_uniform(anatomy)
    gathered: dict[tuple[str, int], _Gathered] = {}
    handles: list[Any] = []

    def gather(key: tuple[str, int], values: Tensor) -> None:
        gathered.setdefault(key, _Gathered(over_windows)).add(values)

    def neuron_hook(block: int) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            gather(("neurons", block), arguments[0].float())

        return hook

    def head_hook(block: int, gram: Tensor) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            heads = arguments[0].float().unflatten(-1, (-1, head_dim))
            gather(("heads", block), heads.norm(dim=-1))
            squares = (torch.einsum("bshd,hde->bshe", heads, gram) * heads).sum(-1)
            gather(("contributions", block), squares.clamp_min(0.0).sqrt())

        return hook

    def output_hook(key: tuple[str, int]) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            gather(key, output.float())

        return hook

    for index, block in enumerate(anatomy.blocks):
        parts: Any = block
        output = parts.self_attn.o_proj
        handles.append(output.register_forward_pre_hook(head_hook(index, _gram(output.weight, head_dim))))
        handles.append(parts.mlp.down_proj.register_forward_pre_hook(neuron_hook(index)))
        for number, name in enumerate(_INPUT_NORMS[hasattr(block, "pre_feedforward_layernorm")]):
            norm = getattr(block, name)
            handles.append(norm.register_forward_hook(output_hook(("channels", 2 * index + number))))
    was_training = anatomy.model.training
    anatomy.model.eval()
    try:
        batches = batches_of(windows, batch_size, anatomy.embedding.weight.device)
        with torch.no_grad():
            for done, batch in enumerate(batches, start=1):
                anatomy.hidden(batch)
                if progress is not None:
                    progress(done, len(batches))
    finally:
        anatomy.model.train(was_training)
        for handle in handles:
            handle.remove()
    scores = {key: aggregate(found.over_windows(), over_positions).double().cpu() for key, found in gathered.items()}
    blocks = range(anatomy.num_blocks)
    heads, contributions, neurons = (
        torch.stack([scores[kind, block] for block in blocks]) for kind in ("heads", "contributions", "neurons")
    )
    result = WidthScores(
        heads,
        contributions,
        neurons,
        torch.stack([scores["channels", norm] for norm in range(2 * anatomy.num_blocks)]).sum(0),
    )
    for name, values in dataclasses.asdict(result).items():
        if not bool(values.isfinite().all()):
            raise InputError(f"scores of {name} are not finite; check the weights (`sparsert inspect`)")
    return result


def aggregate(values: Tensor, how: str) -> Tensor:
    """Aggregate over the first dimension: ``[n, units]`` -> ``[units]``.

    Example:
        >>> values = torch.tensor([[3.0], [-4.0]])
        >>> [round(float(aggregate(values, how)), 2) for how in AGGREGATIONS]
        [3.5, 5.0, 12.25]
    """
    if how == "mean":
        return values.abs().mean(0)
    if how == "l2":
        return values.norm(dim=0)
    return values.var(0, correction=0)


def _gram(weight: Tensor, head_dim: int) -> Tensor:
    """``W_i^T W_i`` of each head's columns ``W_i`` of an output projection: float32 ``[heads, head_dim, head_dim]``."""
    columns = weight.detach().float().unflatten(1, (-1, head_dim))  # [hidden, heads, head_dim]
    return torch.einsum("ohd,ohe->hde", columns, columns)


class _Gathered:
    """Sums over windows, for each position and unit, from which the aggregate over windows follows."""

    def __init__(self, how: str) -> None:
        self._how = how
        self._count = 0
        self._sum: Tensor | float = 0.0
        self._square: Tensor | float = 0.0

    def add(self, values: Tensor) -> None:
        """Args: values: float32 ``[windows, positions, units]``."""
        self._count += values.shape[0]
        if self._how == "mean":
            self._sum = self._sum + values.abs().sum(0)
        else:
            self._square = self._square + values.square().sum(0)
            if self._how == "var":
                self._sum = self._sum + values.sum(0)

    def over_windows(self) -> Tensor:
        """``[positions, units]``."""
        total, square = torch.as_tensor(self._sum), torch.as_tensor(self._square)
        if self._how == "mean":
            return total / self._count
        if self._how == "l2":
            return square.sqrt()
        return (square / self._count - (total / self._count).square()).clamp_min(0.0)


def check_uniform(anatomy: Anatomy) -> int:
    """Width of a head, if all blocks have the same widths and all layers.

    Raises:
        UnsupportedError: they differ, or a block skips a layer.
    """
    widths = set()
    for index, block in enumerate(anatomy.blocks):
        parts: Any = block
        attention: Any = getattr(parts, "self_attn", None)
        mlp: Any = getattr(parts, "mlp", None)
        if not (hasattr(attention, "o_proj") and hasattr(mlp, "down_proj") and hasattr(attention, "head_dim")):
            raise UnsupportedError(
                f"block {index} has no attention or no mlp; width can be pruned where every block has both"
            )
        widths.add((attention.o_proj.in_features, mlp.down_proj.in_features, attention.head_dim))
    if len(widths) > 1:
        raise UnsupportedError(
            f"the blocks differ in width ({', '.join(map(str, sorted(widths)))}: heads x head_dim, intermediate, "
            f"head_dim); width can be pruned where all are alike"
        )
    return int(widths.pop()[2])
