"""Write a checkpoint from another one: an ordinary Hugging Face directory, a tensor at a time.

The tensors go through in the order of the source, each read, changed and written before the next
one is read, so host memory is bounded by the largest tensor whatever the model's size (``shards.py``). All is
written into a hidden directory beside the target, which is renamed when the last byte is on the
disk: a run that dies leaves nothing under the target's name (``work.py``). Weights are written dense, zeros
and all, or packed 2:4 in our format or under the keys of compressed-tensors (``quantization.py``).

Removed blocks are left out and the others renumbered 0, 1, 2, ..., because that is what every
loader expects; lists in the configuration that hold one entry a block are cut the same way. A block
without its attention or mlp loses the tensors of that half, norms included, and ``config.json`` says so
where transformers' configurations do: ``"per_layer_config": {"2": {"skip": ["mlp"]}}``. Which
blocks are gone could not be told from the result any more, so the caller's ``record`` goes into
``config.json``.
"""

from __future__ import annotations

import copy
import dataclasses
import fnmatch
import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from sparsert.checkpoint.compare import compare_shard
from sparsert.checkpoint.halves import half_of
from sparsert.checkpoint.layer_types import layer_types
from sparsert.checkpoint.paths import check_inside
from sparsert.checkpoint.quantization import (
    compressed_tensors_config,
    pruning_record,
    sparsert_config,
    unsupported_quantization,
)
from sparsert.checkpoint.reader import Checkpoint, block_of, rename_block
from sparsert.checkpoint.shards import SHARD_BYTES, Entry, Shard, plan_shards, write_json, write_shards
from sparsert.checkpoint.stored import BITMASK_24, DENSE, part_names
from sparsert.checkpoint.work import check_output, work_directory
from sparsert.errors import CheckpointError, InputError
from sparsert.formats.bitmask import bitmask_from_dense
from sparsert.schedule import LayerPlan

#: Our own format, beside ``dense`` and ``sparse-24-bitmask``.
SPARSERT = "sparsert"

#: What a checkpoint can be written as.
TARGETS = (SPARSERT, DENSE, BITMASK_24)

#: What is copied beside the weights: tokenizer, chat template, generation defaults, licence.
_COPIED = ("*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt", "LICENSE*", "NOTICE*")
_NOT_COPIED = ("config.json", "*.index.json", "adapter_config.json")

#: Lists in config.json that name blocks by index; all other lists as long as the model is deep hold an entry a block.
_BLOCK_INDEX_LISTS = ("mlp_only_layers", "full_attn_idxs", "attn_layer_indices")
_NEVER_PER_BLOCK = ("architectures", "*token_id", "*token_ids", "keys_to_ignore*")


def stored_plan(config: Mapping[str, Any], num_blocks: int) -> LayerPlan:
    """What a checkpoint runs of its own blocks: all, but for what its ``per_layer_config`` skips."""
    return LayerPlan.from_per_layer_config(num_blocks, config.get("per_layer_config"))


def pruned_config(config: Mapping[str, Any], plan: LayerPlan) -> dict[str, Any]:
    """The configuration of a model that keeps only what a plan runs.

    Args:
        config: content of ``config.json``.
        plan: what stays.

    Returns:
        A copy with ``num_hidden_layers`` reduced, per-block lists cut (``layer_types`` and the like), and skipped
        halves of blocks under ``per_layer_config``.

    Example:
        >>> config = {"num_hidden_layers": 3, "layer_types": ["a", "b", "c"]}
        >>> pruned_config(config, LayerPlan.remove(3, [1], force=True))
        {'num_hidden_layers': 2, 'layer_types': ['a', 'c']}
        >>> pruned_config(config, LayerPlan.remove(3, skip_mlp=[2], force=True))["per_layer_config"]
        {'2': {'skip': ['mlp']}}
    """
    pruned = copy.deepcopy(dict(config))
    depth = pruned["num_hidden_layers"]
    position = {block: index for index, block in enumerate(plan.kept)}
    for key, value in pruned.items():
        if key in _BLOCK_INDEX_LISTS and isinstance(value, list):
            pruned[key] = [position[block] for block in value if block in position]
        elif key == "per_layer_config" and isinstance(value, dict):
            pruned[key] = {str(position[int(k)]): v for k, v in value.items() if int(k) in position}
        elif isinstance(value, list) and len(value) == depth and not _matches(key, _NEVER_PER_BLOCK):
            pruned[key] = [value[block] for block in plan.kept]
    types = layer_types(config)
    if types is not None and len(plan.kept) < depth:
        # said outright: the rule that they follow from counts blocks, and some of these are gone
        pruned["layer_types"] = [types[block] for block in plan.kept]
    pruned["num_hidden_layers"] = len(plan.kept)
    for part, blocks in (("attention", plan.without_attention), ("mlp", plan.without_mlp)):
        for block in blocks:
            pruned["per_layer_config"] = pruned.get("per_layer_config") or {}
            pruned["per_layer_config"].setdefault(str(position[block]), {})["skip"] = [part]
    return pruned


@dataclasses.dataclass(frozen=True)
class Form:
    """In what form weights are written.

    Attributes:
        target: ``dense`` (zeros and all), ``sparsert`` (our format) or ``sparse-24-bitmask`` (the same tensors under
            the keys of compressed-tensors).
        packed: names in the source of the weights that are written packed; each must be 2:4.
    """

    target: str = DENSE
    packed: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if self.target not in TARGETS:
            raise InputError(f"cannot write a checkpoint as {self.target!r}; choose one of {', '.join(TARGETS)}")


def write_checkpoint(
    source: Checkpoint,
    output: str | Path,
    *,
    plan: LayerPlan | None = None,
    transform: Callable[[str, Tensor], Tensor] | None = None,
    record: Callable[[], Mapping[str, Any]] | None = None,
    form: Form | None = None,
    checked_resume: bool = False,
    shard_bytes: int = SHARD_BYTES,
    progress: bool = False,
) -> int:
    """Copy a checkpoint, changing tensors and leaving out blocks, or halves of them, on the way.

    Args:
        source: the opened checkpoint.
        output: directory to create; an empty one may exist.
        plan: what to keep, default all; what the source itself skips stays away.
        transform: called with the name in ``source`` and the tensor; returns one of the same shape and dtype.
        record: called after the last tensor; what it returns is stored in ``config.json``, under ``sparsert`` or, in
            our format, as ``provenance``. Default: the record of the source, if it has one.
        form: how to write, default dense.
        checked_resume: read every finished file back and compare it with the source, and leave what is finished for
            the next run if this one fails. ``transform`` must then give the same result each time.
        shard_bytes: most bytes of tensors in one file.
        progress: show a bar on standard error if that is a terminal.

    Returns:
        Bytes of tensors written.

    Raises:
        InputError: ``output`` is not free, or a plan for another number of blocks.
        SparsityError: a weight to be packed is not 2:4.
        CheckpointError: the source is damaged, or the disk is full or read-only.
    """
    output = Path(output).expanduser()
    check_output(output)
    form = form or Form()
    change = transform or _unchanged
    stored = stored_plan(source.config, source.num_blocks)
    plan = stored if plan is None else stored.intersect(plan)
    entries = [
        Entry(name, new, source.shape(name), source.dtype(name), BITMASK_24 if name in form.packed else DENSE)
        for name, new in _new_names(source, plan).items()
    ]
    shards = plan_shards(entries, shard_bytes)

    def read(entry: Entry) -> Mapping[str, Tensor]:
        if entry.storage == DENSE:
            return {entry.name: change(entry.source, source.read(entry.source))}
        names = part_names(entry.name, BITMASK_24)
        parts = bitmask_from_dense(change(entry.source, source.read(entry.source)).contiguous(), entry.source)
        return {names[part]: tensor for part, tensor in parts.items()}

    def check(file: Path, shard: Shard) -> None:
        compare_shard(file, shard, lambda name: change(name, source.read(name)))

    key = _resume_key(source, shards, form) if checked_resume else None
    try:
        with work_directory(output, key) as directory:
            write_shards(
                directory,
                shards,
                read,
                check=check if checked_resume else None,
                keep_finished=checked_resume,
                progress=progress,
            )
            copy_small_files(source.directory, directory)
            written = pruning_record(source.config) if record is None else record()
            write_json(directory / "config.json", _written_config(source, plan, form, entries, written))
    except OSError as error:
        needed = sum(entry.nbytes for entry in entries)
        raise CheckpointError(
            f"{output}: cannot be written ({error.strerror or error}); check permissions and free space "
            f"({needed / 1e9:.1f} GB are needed)"
        ) from error
    return sum(entry.nbytes for entry in entries)


def _written_config(
    source: Checkpoint, plan: LayerPlan, form: Form, entries: Sequence[Entry], record: Mapping[str, Any] | None
) -> dict[str, Any]:
    """``config.json`` of the copy."""
    config = pruned_config(source.config, plan)
    if unsupported_quantization(config) is None:
        for key in ("quantization_config", "compression_config"):
            config.pop(key, None)
    config.pop("sparsert", None)
    if form.target == SPARSERT:
        config["quantization_config"] = sparsert_config(_kept_dense(entries), record or {})
        return config
    if form.target == BITMASK_24:
        config["quantization_config"] = compressed_tensors_config(_kept_dense(entries))
    if record is not None:
        config["sparsert"] = dict(record)
    return config


def _kept_dense(entries: Sequence[Entry]) -> list[str]:
    """Names of the linear modules that stay dense: the head, and what of a block is not packed."""
    modules = [
        entry.name.removesuffix(".weight")
        for entry in entries
        if entry.storage == DENSE and entry.name.endswith(".weight") and len(entry.shape) == 2
    ]
    heads = [name for name in modules if name.endswith("lm_head")] or ["lm_head"]
    return heads + [name for name in modules if block_of(f"{name}.weight") is not None]


def _resume_key(source: Checkpoint, shards: Sequence[Shard], form: Form) -> str:
    """Says what is being made of what; another key, another result."""
    files = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in source.files]
    layout = [
        (shard.file_name, [(name, list(shape), str(dtype)) for name, (shape, dtype) in shard.layout.items()])
        for shard in shards
    ]
    content = [str(source.directory.resolve()), files, source.config, form.target, layout]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _new_names(source: Checkpoint, plan: LayerPlan) -> dict[str, str]:
    """Name in the source -> name in the copy, for every tensor that stays."""
    position = {block: index for index, block in enumerate(plan.kept)}
    names: dict[str, str] = {}
    for name in source.names:
        block = block_of(name)
        if block is None:
            names[name] = name
        elif block >= source.num_blocks:
            raise CheckpointError(
                f"{source.directory}: tensor {name!r} belongs to block {block}, but config.json says there are "
                f"{source.num_blocks}; config.json is of another checkpoint"
            )
        elif block in position and _half_runs(source, name, block, plan):
            names[name] = rename_block(name, position[block])
    return names


def _half_runs(source: Checkpoint, name: str, block: int, plan: LayerPlan) -> bool:
    """Whether the half of a block that a tensor belongs to, its norms included, runs."""
    prefix, dot, inside = name.partition(f"layers.{block}.")
    half = half_of(inside, post_norms=f"{prefix}{dot}pre_feedforward_layernorm.weight" in source)
    runs = {"attention": plan.runs_attention, "mlp": plan.runs_mlp}
    return half is None or runs[half](block)


def _unchanged(name: str, tensor: Tensor) -> Tensor:
    return tensor


def copy_small_files(source: Path, target: Path) -> None:
    """Copy what stands beside the weights and the configuration: tokenizer, chat template, licence."""
    for file in sorted(source.iterdir()):
        if file.is_file() and _matches(file.name, _COPIED) and not _matches(file.name, _NOT_COPIED):
            check_inside(source, file)
            shutil.copyfile(file, target / file.name)


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
