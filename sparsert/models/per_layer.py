"""Configurations whose layers differ: what holds for each block, as if it were a configuration of its own.

Three spellings are read, and may be mixed:

    "per_layer_config": {"2": {"intermediate_size": 48}, "3": {"skip": ["mlp"]}}     transformers 5
    "intermediate_size": [96, 96, 48, 96]                                            a list, an entry a block
    "layer_types": ["sliding_attention", "full_attention", ...]                      Gemma, Qwen

A key that may not differ by layer is refused: left unread it would change what the model computes.

Source: ``PreTrainedConfig.per_layer_config`` of transformers 5.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparsert.checkpoint.layer_types import FULL_ATTENTION, SLIDING_ATTENTION, layer_types
from sparsert.errors import CheckpointError, UnsupportedError
from sparsert.models.config_values import ConfigValues
from sparsert.schedule import SKIP_NAMES

#: Keys that may have another value in each layer.
PER_LAYER_KEYS = (
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "sliding_window",
    "attention_bias",
    "mlp_bias",
    "skip",
)


def block_values(config: Mapping[str, Any], num_blocks: int) -> list[ConfigValues]:
    """What holds for each block.

    Args:
        config: content of ``config.json``, defaults filled in.
        num_blocks: of the model.

    Returns:
        The configuration with the block's own values in the place of lists and overrides. Two keys are added:
        ``layer_type`` (None where blocks are alike) and ``skip``, a list.

    Raises:
        CheckpointError: a list of another length, or an override of a block that does not exist.
        UnsupportedError: an override, a skipped layer or a layer type that is not known.
    """
    overrides = _overrides(config, num_blocks)
    lists = {key: config[key] for key in PER_LAYER_KEYS if key != "skip" and isinstance(config.get(key), list)}
    types = layer_types(config)
    for key, values in {**lists, **({"layer_types": types} if types is not None else {})}.items():
        if len(values) != num_blocks:
            raise CheckpointError(
                f"config.json: {key} lists {len(values)} layers, num_hidden_layers is {num_blocks}; they must agree"
            )
    blocks = []
    for block in range(num_blocks):
        own = {key: values[block] for key, values in lists.items()} | overrides.get(block, {})
        values = ConfigValues(
            {**config, **own, "skip": own.get("skip") or [], "layer_type": types[block] if types is not None else None},
            f"config.json, block {block}" if own else "config.json",
        )
        values.check_supported("layer type", values.get("layer_type"), (None, FULL_ATTENTION, SLIDING_ATTENTION))
        for skipped in values.get("skip"):
            values.check_supported("skip", skipped, SKIP_NAMES)
        blocks.append(values)
    return blocks


def _overrides(config: Mapping[str, Any], num_blocks: int) -> dict[int, dict[str, Any]]:
    given = config.get("per_layer_config") or {}
    if not isinstance(given, Mapping) or not all(isinstance(value, Mapping) for value in given.values()):
        raise CheckpointError(f"config.json: per_layer_config is {given!r}; need {{layer index: {{key: value}}}}")
    overrides = {}
    for index, values in given.items():
        if not str(index).isdecimal() or int(index) >= num_blocks:
            raise CheckpointError(f"config.json: per_layer_config names layer {index!r} of {num_blocks}")
        unknown = [key for key in values if key not in PER_LAYER_KEYS]
        if unknown:
            raise UnsupportedError(
                f"config.json: per_layer_config of layer {index} changes {', '.join(unknown)}; "
                f"supported: {', '.join(PER_LAYER_KEYS)}"
            )
        skip = values.get("skip")
        if skip is not None and not isinstance(skip, list):
            raise CheckpointError(f"config.json: per_layer_config of layer {index}: skip is {skip!r}; need a list")
        overrides[int(index)] = dict(values)
    return overrides
