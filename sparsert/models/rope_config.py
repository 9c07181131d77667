"""The rotary position embedding that a ``config.json`` describes, in the spellings of two releases.

transformers 4 writes ``rope_theta`` and ``rope_scaling``, with ``partial_rotary_factor`` beside them; 5 puts all of it
into ``rope_parameters``, for Gemma 3 one set for each kind of block.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparsert.checkpoint.layer_types import SLIDING_ATTENTION
from sparsert.errors import CheckpointError, UnsupportedError
from sparsert.models.config import RopeConfig
from sparsert.models.config_values import ConfigValues

SUPPORTED_ROPE_TYPES = ("default", "linear", "llama3")


def read_rope(values: ConfigValues, *, partial: bool = False) -> RopeConfig:
    """One rope for all blocks.

    Args:
        values: what holds for a block.
        partial: whether the architecture may turn only part of a head's dimensions (:func:`rotary_share`).

    Raises:
        UnsupportedError: a rope that is not computed.
        CheckpointError: a number of it is missing or wrong.
    """
    parameters = _rope_parameters(values)
    if any(isinstance(value, Mapping) for value in parameters.values()):
        raise UnsupportedError(
            f"{values.where}: rope_parameters by layer type ({', '.join(parameters)}) cannot be run here; supported: "
            f"one set for all layers"
        )
    parameters.setdefault("rope_theta", values.get("rope_theta"))
    return _rope_of(values, parameters, 10000.0, partial)


def read_rope_by_type(values: ConfigValues) -> RopeConfig:
    """Gemma 3: blocks with a window turn by another base, and only the others are stretched.

    Raises:
        UnsupportedError, CheckpointError: as :func:`read_rope`.
    """
    slides = values.get("layer_type") == SLIDING_ATTENTION
    given = _rope_parameters(values, ("rope_parameters",))
    if given:
        if not all(value is None or isinstance(value, Mapping) for value in given.values()):
            raise CheckpointError(f"{values.where}: rope_parameters {given!r} must be given by layer type")
        parameters = dict(given.get(values.get("layer_type")) or {})
    else:
        parameters = {} if slides else _rope_parameters(values, ("rope_scaling",))
    parameters.setdefault("rope_theta", values.get("rope_local_base_freq" if slides else "rope_theta"))
    return _rope_of(values, parameters, 10000.0 if slides else 1e6)


def rotary_share(values: ConfigValues, parameters: Mapping[str, Any] | None = None) -> float:
    """The share of a head's dimensions that is turned.

    Args:
        values: what holds for a block.
        parameters: where it may stand as well; default the rope's own.

    Raises:
        CheckpointError: it is no positive number.
    """
    if parameters is None:
        parameters = _rope_parameters(values)
    holder = parameters if parameters.get("partial_rotary_factor") is not None else values.values
    return ConfigValues(holder, values.where).number("partial_rotary_factor", 1.0)


def _rope_parameters(
    values: ConfigValues, keys: tuple[str, ...] = ("rope_parameters", "rope_scaling")
) -> dict[str, Any]:
    """The first of these keys that says something."""
    given: Any = next((values.get(key) for key in keys if values.get(key)), {})
    if not isinstance(given, Mapping):
        raise CheckpointError(f"{values.where}: {' or '.join(keys)} is {given!r}; a JSON object is needed")
    return dict(given)


def _rope_of(
    values: ConfigValues, parameters: Mapping[str, Any], default_theta: float, partial: bool = False
) -> RopeConfig:
    if not partial:
        values.check_supported("partial_rotary_factor", rotary_share(values, parameters), (1.0,))
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    values.check_supported("rope type", kind, SUPPORTED_ROPE_TYPES)
    rope = ConfigValues(parameters, values.where)
    theta = rope.number("rope_theta", default_theta)
    if kind == "default":
        return RopeConfig(theta=theta)
    if kind == "linear":
        return RopeConfig(kind, theta, rope.number("factor"))
    return RopeConfig(
        kind, theta, rope.number("factor"), rope.number("low_freq_factor"), rope.number("high_freq_factor"),
        rope.size("original_max_position_embeddings", values.size("max_position_embeddings")),
    )  # fmt: skip
