"""``quantization_config`` in ``config.json``: what we write there, and what others say that can be run.

Our own format (docs/format.md):

    "quantization_config": {
      "quant_method": "sparsert",
      "version": 1,                        of the format; a reader refuses a higher one
      "format": "sparse-24-bitmask",       how a packed linear is stored
      "sparsity_structure": "2:4",
      "targets": ["Linear"],               modules that are packed, but for
      "ignore": ["lm_head", ...],          these, which stay dense, by name
      "provenance": {...}                  the record of `sparsert prune`, see ``prune.py``; may be empty
    }

The same tensors under the keys of compressed-tensors are what ``--to sparse-24-bitmask`` writes, for its releases up to
0.14. A checkpoint whose values are quantized beside being sparse is refused rather than run wrong; marlin-24 is the
exception, as it is decoded.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparsert.checkpoint.stored import BITMASK_24, MARLIN_24
from sparsert.errors import CheckpointError

QUANT_METHOD = "sparsert"
FORMAT_VERSION = 1

#: The last release of compressed-tensors whose configuration keys these are; it wrote and read the format.
_COMPRESSED_TENSORS_VERSION = "0.9.4"


def sparsert_config(ignore: Sequence[str], provenance: Mapping[str, Any]) -> dict[str, Any]:
    """``quantization_config`` of our format.

    Args:
        ignore: names of linear modules that are stored dense.
        provenance: what was done to the model, plain JSON types.
    """
    return {
        "quant_method": QUANT_METHOD,
        "version": FORMAT_VERSION,
        "format": BITMASK_24,
        "sparsity_structure": "2:4",
        "targets": ["Linear"],
        "ignore": list(ignore),
        "provenance": dict(provenance),
    }


def compressed_tensors_config(ignore: Sequence[str]) -> dict[str, Any]:
    """``quantization_config`` as compressed-tensors writes it for 2:4 weights that are not quantized."""
    return {
        "quant_method": "compressed-tensors",
        "version": _COMPRESSED_TENSORS_VERSION,
        "sparsity_config": {
            "format": BITMASK_24,
            "global_sparsity": 0.5,
            "ignore": list(ignore),
            "registry_requires_subclass": False,
            "sparsity_structure": "2:4",
            "targets": ["Linear"],
        },
    }


def quantization_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """``quantization_config``, or ``compression_config`` as it was called before; empty if there is none."""
    for key in ("quantization_config", "compression_config"):
        if isinstance(config.get(key), Mapping):
            found: Mapping[str, Any] = config[key]
            return found
    return {}


def pruning_record(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What ``sparsert prune`` recorded, under ``sparsert`` or, in our format, as ``provenance``; None if nothing."""
    record = config.get("sparsert")
    if isinstance(record, Mapping):
        return record
    provenance = quantization_of(config).get("provenance")
    return provenance if isinstance(provenance, Mapping) and provenance else None


def check_config(config: Mapping[str, Any], directory: Path) -> None:
    """Check the kinds of what is read from a configuration here, and refuse our format if it is newer than this reader.

    Raises:
        CheckpointError: a value is of another kind, a rule cannot be read, or the version of our format is no number or
            higher than :data:`FORMAT_VERSION`.
    """
    where = directory / "config.json"
    quantization = quantization_of(config)
    sparsity = [
        holder["sparsity_config"]
        for holder in (config, config.get("quantization_config"), config.get("compression_config"))
        if isinstance(holder, Mapping) and isinstance(holder.get("sparsity_config"), Mapping)
    ]
    lists = [("architectures", config.get("architectures")), ("layer_types", config.get("layer_types"))]
    lists += [("ignore", holder.get("ignore")) for holder in (quantization, *sparsity)]
    lists += [("dense_linears", (pruning_record(config) or {}).get("dense_linears"))]
    for key, value in lists:
        if value is not None and not (isinstance(value, list) and all(isinstance(entry, str) for entry in value)):
            raise CheckpointError(
                f"{where}: {key} is {str(value)[:80]!r}; it must be a list of names, fetch the file again"
            )
    for holder in sparsity:
        for rule in holder.get("ignore") or ():
            if rule.startswith("re:") and not _readable(rule[3:]):
                raise CheckpointError(
                    f"{where}: sparsity_config ignores {rule[:80]!r}, which is no regular expression of names, dots, "
                    "wildcards and alternatives; mend it, or write the names out"
                )
    if quantization.get("quant_method") != QUANT_METHOD:
        return
    version = quantization.get("version")
    if type(version) is not int or not 1 <= version <= FORMAT_VERSION or quantization.get("format") != BITMASK_24:
        raise CheckpointError(
            f"{where}: is of sparsert format {quantization.get('format')!r}, version {version!r}; "
            f"this sparsert reads {BITMASK_24}, version {FORMAT_VERSION}: update sparsert, or fetch the file again"
        )


#: Names, dots, alternatives and wildcards: a pattern of a stranger must not keep the regular expressions busy for ever.
_PATTERN = re.compile(r"\^?(?:\.\*|\\\.|\\d\+|\((?:[\w.|-])*\)|[\w.-])*\$?", re.ASCII)
_MOST_WILDCARDS, _LONGEST_PATTERN = 4, 200


def _readable(pattern: str) -> bool:
    wildcards = pattern.count(".*") + pattern.count("\\d+")
    return len(pattern) <= _LONGEST_PATTERN and wildcards <= _MOST_WILDCARDS and bool(_PATTERN.fullmatch(pattern))


def ignores(rule: str, module: str) -> bool:
    """Whether an ignore rule of compressed-tensors covers a module: its name, or ``re:`` and a pattern.

    Example:
        >>> ignores("re:.*lm_head", "model.lm_head"), ignores("lm_head", "model.lm_head")
        (True, False)
    """
    if rule.startswith("re:"):
        return re.match(rule[3:], module) is not None
    return rule == module


def unsupported_quantization(config: Mapping[str, Any]) -> str | None:
    """Why the values of a checkpoint cannot be run as they are; None if they can.

    Example:
        >>> unsupported_quantization({"quantization_config": {"quant_method": "gptq", "bits": 4}})
        "its weights are quantized (method 'gptq')"
    """
    quantization = quantization_of(config)
    method = quantization.get("quant_method", "compressed-tensors" if quantization.get("sparsity_config") else None)
    if not quantization or method == QUANT_METHOD:
        return None
    if method == "compressed-tensors":
        form = quantization.get("format")
        if not quantization.get("config_groups") or form in (None, "dense", MARLIN_24):
            return None
        return f"its weights are quantized (method {method!r}, format {form!r})"
    return f"its weights are quantized (method {method!r})"
