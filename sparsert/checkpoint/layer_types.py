"""Which blocks look through a sliding window, also where ``config.json`` leaves it unsaid.

Newer configurations list it block by block (``layer_types``). Older ones give a rule that counts blocks from
the first one, so that a model which loses a block would shift the windows of all that follow. Whoever reads
a configuration, and whoever writes that of a shortened model, asks here.

Source: the configuration classes of transformers 5.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparsert.errors import CheckpointError

SLIDING_ATTENTION, FULL_ATTENTION = "sliding_attention", "full_attention"

#: Every n-th block sees everything, the others a window; under the names of model type and class.
_FULL_EVERY = {"gemma2": 2, "Gemma2ForCausalLM": 2, "gemma3_text": 6, "Gemma3ForCausalLM": 6}

#: The first ``max_window_layers`` blocks see everything.
_FULL_AT_FIRST = ("qwen2", "Qwen2ForCausalLM", "qwen3", "Qwen3ForCausalLM")
_MAX_WINDOW_LAYERS = 28


def layer_types(config: Mapping[str, Any]) -> list[Any] | None:
    """The kind of attention of each block.

    Args:
        config: content of ``config.json``; ``num_hidden_layers`` is an integer.

    Returns:
        ``layer_types`` as it stands there, or what the model's rule says; None for models whose blocks are alike.

    Raises:
        CheckpointError: a key of the rule is no number of blocks.

    Example:
        >>> layer_types({"model_type": "gemma2", "num_hidden_layers": 3})
        ['sliding_attention', 'full_attention', 'sliding_attention']
    """
    if config.get("layer_types") is not None:
        return list(config["layer_types"])
    depth = config["num_hidden_layers"]
    names = [config.get("model_type"), *(config.get("architectures") or [])]
    every = next((_FULL_EVERY[name] for name in names if name in _FULL_EVERY), None)
    if every is not None:
        if every == _FULL_EVERY["gemma3_text"]:
            keys = ("sliding_window_pattern", "_sliding_window_pattern")
            every = next((_count(config, key) for key in keys if config.get(key) is not None), every)
        return [FULL_ATTENTION if (block + 1) % every == 0 else SLIDING_ATTENTION for block in range(depth)]
    if any(name in _FULL_AT_FIRST for name in names):
        slides = bool(config.get("use_sliding_window")) and config.get("sliding_window", 0) is not None
        given = _count(config, "max_window_layers") if "max_window_layers" in config else _MAX_WINDOW_LAYERS
        full = given if slides else depth
        return [FULL_ATTENTION if block < full else SLIDING_ATTENTION for block in range(depth)]
    return None


def _count(config: Mapping[str, Any], key: str) -> int:
    value = config[key]
    if type(value) is not int or value < (0 if key == "max_window_layers" else 1):
        raise CheckpointError(f"config.json: {key} is {value!r}; a number of blocks is needed")
    return value
