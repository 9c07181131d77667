"""Write a checkpoint from another one: an ordinary Hugging Face directory, a tensor at a time.

The tensors go through in the order of the source, each read, changed and written before the next
one is read, so host memory is bounded by the largest tensor whatever the model's size. All is
written into a hidden directory beside the target, which is renamed when the last byte is on the
disk: a run that dies leaves nothing under the target's name.

Removed blocks are left out and the others renumbered 0, 1, 2, ..., because that is what every
loader expects; lists in the configuration that hold one entry a block are cut the same way. A block
without its attention or mlp loses the tensors of that half, norms included, and ``config.json`` says so
where transformers' configurations do: ``"per_layer_config": {"2": {"skip": ["mlp"]}}``. Which
blocks are gone could not be told from the result any more, so the caller's ``record`` goes into
``config.json`` under ``sparsert``.
"""

from __future__ import annotations

import copy
import fnmatch
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsert.checkpoint.layer_types import layer_types
from sparsert.checkpoint.reader import Checkpoint, block_of, rename_block
from sparsert.checkpoint.safetensors_file import SafetensorsWriter
from sparsert.errors import CheckpointError, InputError
from sparsert.schedule import LayerPlan

#: Bytes of tensors in one file; the hub and its tools cut at the same size.
SHARD_BYTES = 5_000_000_000

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


def check_output(output: Path) -> None:
    """Refuse a target that is not free, before any work is done.

    Raises:
        InputError: ``output`` is a file or a directory that holds something.
        CheckpointError: its parent directory does not exist.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f"{output}: exists and is not an empty directory; choose a new directory or remove it first")
    if not output.absolute().parent.is_dir():
        raise CheckpointError(f"{output}: the parent directory does not exist; create it first")


def write_checkpoint(
    source: Checkpoint,
    output: str | Path,
    *,
    plan: LayerPlan | None = None,
    transform: Callable[[str, Tensor], Tensor] | None = None,
    record: Callable[[], Mapping[str, Any]] | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: bool = False,
) -> int:
    """Copy a checkpoint, changing tensors and leaving out blocks, or halves of them, on the way.

    Args:
        source: the opened checkpoint.
        output: directory to create; an empty one may exist.
        plan: what to keep, default all; what the source itself skips stays away.
        transform: called with the name in ``source`` and the tensor; returns one of the same shape and dtype.
        record: called after the last tensor; what it returns is stored in ``config.json`` under ``sparsert``.
        shard_bytes: most bytes of tensors in one file.
        progress: show a bar on standard error if that is a terminal.

    Returns:
        Bytes of tensors written.

    Raises:
        InputError: ``output`` is not free, or a plan for another number of blocks.
        CheckpointError: the source is damaged, or the disk is full or read-only.
    """
    output = Path(output).expanduser()
    check_output(output)
    stored = stored_plan(source.config, source.num_blocks)
    plan = stored if plan is None else stored.intersect(plan)
    new_names = _new_names(source, plan)
    shards = _shards(source, list(new_names), shard_bytes)
    temporary = output.absolute().with_name(f".{output.name}.{os.getpid()}.partial")
    try:
        temporary.mkdir()
        try:
            _write_shards(source, temporary, shards, new_names, transform or _unchanged, progress)
            _copy_small_files(source.directory, temporary)
            config = pruned_config(source.config, plan)
            if record is not None:
                config["sparsert"] = dict(record())
            _write_json(temporary / "config.json", config)
            if output.exists():
                output.rmdir()
            os.rename(temporary, output)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise CheckpointError(
            f"{output}: cannot be written ({error.strerror or error}); check permissions and free space "
            f"({source.total_nbytes / 1e9:.1f} GB are needed)"
        ) from error
    return sum(source.nbytes(name) for name in new_names)


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
    part = inside.partition(".")[0]
    # where a norm stands before and behind each half, this one is the second of attention; else the first of the mlp
    sandwiched = f"{prefix}{dot}pre_feedforward_layernorm.weight" in source
    if part in ("self_attn", "input_layernorm") or (part == "post_attention_layernorm" and sandwiched):
        return plan.runs_attention(block)
    if part in ("mlp", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"):
        return plan.runs_mlp(block)
    return True


def _shards(source: Checkpoint, names: list[str], shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name in names:
        if shards[-1] and filled + source.nbytes(name) > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += source.nbytes(name)
    return shards


def _write_shards(
    source: Checkpoint,
    directory: Path,
    shards: list[list[str]],
    new_names: dict[str, str],
    transform: Callable[[str, Tensor], Tensor],
    progress: bool,
) -> None:
    from tqdm import tqdm

    total = sum(source.nbytes(name) for name in new_names)
    weight_map: dict[str, str] = {}
    # disable=None: tqdm stays silent when standard error is no terminal
    with tqdm(total=total, unit="B", unit_scale=True, desc="writing", disable=None if progress else True) as bar:
        for number, shard in enumerate(shards, start=1):
            single = len(shards) == 1
            file_name = "model.safetensors" if single else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            layout: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
                new_names[name]: (source.shape(name), source.dtype(name)) for name in shard
            }
            with SafetensorsWriter(directory / file_name, layout) as writer:
                for name in shard:
                    # no variable: it would keep this tensor alive while the next one is read
                    writer.write(new_names[name], transform(name, source.read(name)))
                    bar.update(source.nbytes(name))
            weight_map.update(dict.fromkeys(layout, file_name))
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(directory / "model.safetensors.index.json", index)


def _unchanged(name: str, tensor: Tensor) -> Tensor:
    return tensor


def _copy_small_files(source: Path, target: Path) -> None:
    for file in sorted(source.iterdir()):
        if file.is_file() and _matches(file.name, _COPIED) and not _matches(file.name, _NOT_COPIED):
            shutil.copyfile(file, target / file.name)


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
