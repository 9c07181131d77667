"""The linear layers that are measured: those of models people prune, separate and as the engine fuses them.

Shapes follow from the configuration of an architecture (:mod:`sparsert.bench.architectures`); all blocks of those are
alike, so the first one stands for all. A layer is named by every projection that has its shape: two projections of
one shape would be measured twice for the same number.
"""

from __future__ import annotations

import dataclasses

from sparsert.bench.architectures import ARCHITECTURES, hf_config
from sparsert.errors import InputError

#: ``fused`` is what the engine runs, ``separate`` what a checkpoint stores and torch would run.
LAYER_KINDS = ("all", "fused", "separate")

#: Projections that read the same input, which the engine joins into one layer.
_GROUPS = {"qkv fused": ("q", "k", "v"), "gate_up fused": ("gate", "up")}


@dataclasses.dataclass(frozen=True)
class LinearShape:
    """One linear layer of a model: ``[out_features, in_features]``.

    Attributes:
        model: one of :data:`sparsert.bench.architectures.ARCHITECTURES`.
        layer: the projections that have this shape, e.g. ``q, k, v, o`` or ``qkv fused``.
        fused: whether it is a layer the engine makes by joining others.
    """

    model: str
    layer: str
    out_features: int
    in_features: int
    fused: bool


def linear_shapes(model: str, layers: str = "all") -> list[LinearShape]:
    """The linear layers of one block of a model, each shape once.

    Args:
        model: one of :data:`sparsert.bench.architectures.ARCHITECTURES`.
        layers: one of :data:`LAYER_KINDS`. What is joined with nothing (``o``, ``down``, ``up`` where there is no
            gate) belongs to both.

    Returns:
        In the order in which a block runs them, separate ones first.

    Raises:
        InputError: unknown model or kind.

    Example:
        >>> [(s.layer, s.out_features, s.in_features) for s in linear_shapes("llama-3.1-8b", "fused")]
        [('o', 4096, 4096), ('down', 4096, 14336), ('qkv fused', 6144, 4096), ('gate_up fused', 28672, 4096)]
    """
    if model not in ARCHITECTURES:
        raise InputError(f"shapes of {model!r} are not known; known are {', '.join(ARCHITECTURES)}")
    if layers not in LAYER_KINDS:
        raise InputError(f"layers {layers!r}: choose one of {', '.join(LAYER_KINDS)}")
    from sparsert.models import DecoderConfig

    linears = DecoderConfig.from_hf(hf_config(model)).block_linears(0)
    # self_attn.q_proj -> q
    separate = {
        name.rpartition(".")[2].removesuffix("_proj"): (shape.out_features, shape.in_features)
        for name, shape in linears.items()
    }
    groups = {name: parts for name, parts in _GROUPS.items() if set(parts) <= set(separate)}
    joined = {part for parts in groups.values() for part in parts}
    by_shape: dict[tuple[int, int], list[str]] = {}
    for name, shape in separate.items():
        if layers != "fused" or name not in joined:
            by_shape.setdefault(shape, []).append(name)
    shapes = [LinearShape(model, ", ".join(names), *shape, fused=False) for shape, names in by_shape.items()]
    if layers != "separate":
        for name, parts in groups.items():
            outputs = sum(separate[part][0] for part in parts)
            shapes.append(LinearShape(model, name, outputs, separate[parts[0]][1], fused=True))
    return shapes
