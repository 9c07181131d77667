"""The linear layers that are measured: those of models people prune, separate and as the engine fuses them.

Shapes follow from a handful of sizes of an architecture, so a table of those is all there is. ``tiny`` is
for machines without a GPU. A layer is named by every projection that has its shape: two projections of
one shape would be measured twice for the same number.
"""

from __future__ import annotations

import dataclasses

from sparsert.errors import InputError

#: ``fused`` is what the engine runs, ``separate`` what a checkpoint stores and torch would run.
LAYER_KINDS = ("all", "fused", "separate")


@dataclasses.dataclass(frozen=True)
class LinearShape:
    """One linear layer of a model: ``[out_features, in_features]``.

    Attributes:
        model: name in :data:`SIZES`.
        layer: the projections that have this shape, e.g. ``q, k, v, o`` or ``qkv fused``.
        fused: whether it is a layer the engine makes by joining others.
    """

    model: str
    layer: str
    out_features: int
    in_features: int
    fused: bool


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """What the linear layers of one block follow from."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int


#: Source: each model's config.json.
SIZES: dict[str, BlockSizes] = {
    "llama-2-7b": BlockSizes(4096, 11008, 32, 32, 128),
    "llama-2-13b": BlockSizes(5120, 13824, 40, 40, 128),
    "llama-3.1-8b": BlockSizes(4096, 14336, 32, 8, 128),
    "llama-3.2-1b": BlockSizes(2048, 8192, 32, 8, 64),
    "smollm2-135m": BlockSizes(576, 1536, 9, 3, 64),
    "tiny": BlockSizes(64, 128, 2, 1, 32),
}


def linear_shapes(model: str, layers: str = "all") -> list[LinearShape]:
    """The linear layers of one block of a model, each shape once.

    Args:
        model: name in :data:`SIZES`.
        layers: one of :data:`LAYER_KINDS`. ``o`` and ``down``, which are joined with nothing, belong to both.

    Returns:
        In the order in which a block runs them, separate ones first.

    Raises:
        InputError: unknown model or kind.

    Example:
        >>> [(s.layer, s.out_features, s.in_features) for s in linear_shapes("llama-3.1-8b", "fused")]
        [('o', 4096, 4096), ('down', 4096, 14336), ('qkv fused', 6144, 4096), ('gate_up fused', 28672, 4096)]
    """
    if model not in SIZES:
        raise InputError(f"shapes of {model!r} are not known; known are {', '.join(SIZES)}")
    if layers not in LAYER_KINDS:
        raise InputError(f"layers {layers!r}: choose one of {', '.join(LAYER_KINDS)}")
    sizes = SIZES[model]
    query, key = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    projections = [("o", (sizes.hidden, query)), ("down", (sizes.hidden, sizes.intermediate))]
    if layers != "fused":
        projections = [
            ("q", (query, sizes.hidden)),
            ("k", (key, sizes.hidden)),
            ("v", (key, sizes.hidden)),
            ("o", (sizes.hidden, query)),
            ("gate", (sizes.intermediate, sizes.hidden)),
            ("up", (sizes.intermediate, sizes.hidden)),
            ("down", (sizes.hidden, sizes.intermediate)),
        ]
    by_shape: dict[tuple[int, int], list[str]] = {}
    for name, shape in projections:
        by_shape.setdefault(shape, []).append(name)
    shapes = [LinearShape(model, ", ".join(names), *shape, fused=False) for shape, names in by_shape.items()]
    if layers != "separate":
        shapes.append(LinearShape(model, "qkv fused", query + 2 * key, sizes.hidden, fused=True))
        shapes.append(LinearShape(model, "gate_up fused", 2 * sizes.intermediate, sizes.hidden, fused=True))
    return shapes
