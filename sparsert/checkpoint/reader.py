"""A model directory as named tensors, read one at a time.

Opening reads only ``config.json``, the index and the headers, checks them against each other and
against the file lengths, and so finds a missing or truncated shard before the first byte goes to a
device. Reading maps the file: a tensor costs host memory only while the caller holds it. What it
gives up: files are never fetched piece by piece from a server; a hub id is resolved to a
directory first (``sparsert.checkpoint.hub``).

The files looked for, first hit wins: ``model.safetensors``, ``model.safetensors.index.json``,
``pytorch_model.bin``, ``pytorch_model.bin.index.json``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsert.checkpoint.pickle_file import load_pickled_tensors
from sparsert.checkpoint.safetensors_file import TensorInfo, read_header
from sparsert.errors import CheckpointError

WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)

_BLOCK_NAME = re.compile(r"^((?:.*\.)?layers\.)(\d+)(\..+)$")


class Checkpoint:
    """An opened model directory. Make one with :func:`open_checkpoint`.

    Attributes:
        directory: the directory.
        config: content of ``config.json``.
        names: tensor names in file order.
    """

    def __init__(self, directory: Path, config: dict[str, Any], infos: dict[str, TensorInfo]) -> None:
        self.directory = directory
        self.config = config
        self.names: list[str] = list(infos)
        self._infos = infos
        self._open_pickle: tuple[Path, dict[str, Tensor]] | None = None

    def __contains__(self, name: object) -> bool:
        return name in self._infos

    def __repr__(self) -> str:
        return f"Checkpoint({str(self.directory)!r}, {len(self.names)} tensors, {self.total_nbytes} bytes)"

    def _info(self, name: str) -> TensorInfo:
        try:
            return self._infos[name]
        except KeyError:
            raise CheckpointError(
                f"{self.directory}: holds no tensor {name!r}; the checkpoint is incomplete or of another architecture, "
                "`sparsert inspect` lists what it has"
            ) from None

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header."""
        return self._info(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """dtype of a tensor, from the header."""
        return self._info(name).dtype

    def nbytes(self, name: str) -> int:
        """Bytes of a tensor in its file."""
        return self._info(name).nbytes

    def file(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self._info(name).file

    @property
    def total_nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for info in self._infos.values())

    @property
    def num_blocks(self) -> int:
        """Number of transformer blocks that ``config.json`` names.

        Raises:
            CheckpointError: ``num_hidden_layers`` is missing or no positive integer.
        """
        count = self.config.get("num_hidden_layers")
        if type(count) is not int or count < 1:
            raise CheckpointError(
                f"{self.directory / 'config.json'}: num_hidden_layers is {count!r}; it must be a positive integer"
            )
        return count

    def block_linears(self, blocks: Iterable[int] | None = None) -> list[str]:
        """Names of the linear weights inside blocks: those that 2:4 pruning is about.

        A matrix named ``...layers.N. ... .weight``; embeddings, head and norms are not among them.

        Args:
            blocks: block indices to list, default all.
        """
        wanted = None if blocks is None else set(blocks)
        linears = []
        for name, info in self._infos.items():
            block = block_of(name)
            if block is None or (wanted is not None and block not in wanted):
                continue
            if name.endswith(".weight") and len(info.shape) == 2:
                linears.append(name)
        return linears

    def claims_two_of_four(self, name: str) -> bool:
        """Whether the checkpoint says of itself that this weight is 2:4.

        A claim turns three kept values in a group from "runs dense" into an error. It covers every
        block linear but the listed exceptions, and is made by the ``sparsert`` record of
        ``sparsert prune`` (``pattern: "2:4"``, exceptions ``dense_linears``), or by a ``sparsity_config``
        with ``sparsity_structure: "2:4"`` as compressed-tensors writes it (exceptions ``ignore``).
        """
        if block_of(name) is None or not name.endswith(".weight") or len(self.shape(name)) != 2:
            return False
        record = self.config.get("sparsert")
        if isinstance(record, dict) and record.get("pattern") == "2:4":
            return name not in record.get("dense_linears", ())
        for holder in (self.config, self.config.get("quantization_config"), self.config.get("compression_config")):
            sparsity = holder.get("sparsity_config") if isinstance(holder, dict) else None
            if isinstance(sparsity, dict) and sparsity.get("sparsity_structure") == "2:4":
                module = name.removesuffix(".weight")
                return not any(_ignores(str(rule), module) for rule in sparsity.get("ignore") or ())
        return False

    def read(self, name: str) -> Tensor:
        """Read one tensor onto the CPU, in the shape and dtype it has on disk.

        Raises:
            CheckpointError: no such tensor, or its file cannot be read any more.
        """
        info = self._info(name)
        if info.file.suffix == ".safetensors":
            return self._read_safetensors(info, name)
        # one pickle at a time: the old format has no mapping and would keep every shard in memory
        if self._open_pickle is None or self._open_pickle[0] != info.file:
            self._open_pickle = (info.file, load_pickled_tensors(info.file))
        return self._open_pickle[1][name]

    def _read_safetensors(self, info: TensorInfo, name: str) -> Tensor:
        from safetensors import SafetensorError, safe_open

        try:
            # opened anew for each tensor: a mapping that stays would count all pages ever read as ours
            with safe_open(str(info.file), framework="pt", device="cpu") as file:
                tensor: Tensor = file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{info.file}: tensor {name!r} cannot be read ({error}); fetch it again") from error
        return tensor


def block_of(name: str) -> int | None:
    """Index of the block that a tensor name belongs to, or None.

    Example:
        >>> block_of("model.layers.12.mlp.up_proj.weight")
        12
    """
    match = _BLOCK_NAME.match(name)
    return int(match.group(2)) if match else None


def rename_block(name: str, block: int) -> str:
    """The same tensor name in another block.

    Example:
        >>> rename_block("model.layers.12.mlp.up_proj.weight", 3)
        'model.layers.3.mlp.up_proj.weight'
    """
    return _BLOCK_NAME.sub(lambda match: f"{match.group(1)}{block}{match.group(3)}", name)


def _ignores(rule: str, module: str) -> bool:
    """Whether a compressed-tensors ignore rule (a module name, or ``re:`` and a pattern) covers ``module``."""
    if rule.startswith("re:"):
        try:
            return re.match(rule[3:], module) is not None
        except re.error as error:
            raise CheckpointError(
                f"config.json: sparsity_config ignores {rule!r}, which is no regular expression ({error}); mend it"
            ) from error
    return rule == module


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a model directory and check that it is whole, without reading tensors.

    Args:
        path: directory with ``config.json`` and one of :data:`WEIGHT_FILES`.

    Returns:
        The checkpoint.

    Raises:
        CheckpointError: a file is missing, truncated or damaged, or files contradict each other.

    Example:
        >>> checkpoint = open_checkpoint("SmolLM2-135M-Instruct")  # doctest: +SKIP
        >>> checkpoint.read("model.norm.weight").shape  # doctest: +SKIP
        torch.Size([576])
    """
    directory = Path(path).expanduser()
    if not directory.exists():
        raise CheckpointError(f"{directory}: no such directory; give a model directory or a hub id like owner/name")
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: is a file; give the model directory that holds config.json")
    config = read_json(directory / "config.json")
    weight_file = next((directory / name for name in WEIGHT_FILES if (directory / name).is_file()), None)
    if weight_file is None:
        found = sorted(entry.name for entry in directory.iterdir())[:8]
        raise CheckpointError(
            f"{directory}: holds none of {', '.join(WEIGHT_FILES)} (found: {', '.join(found)}); "
            "give a directory in Hugging Face format with safetensors or .bin weights"
        )
    infos = _read_index(weight_file) if weight_file.suffix == ".json" else _read_infos(weight_file)
    if not infos:
        raise CheckpointError(f"{weight_file}: holds no tensors; fetch the checkpoint again")
    return Checkpoint(directory, config, infos)


def read_json(file: Path) -> dict[str, Any]:
    """Content of a JSON object file.

    Raises:
        CheckpointError: missing, unreadable, or no JSON object.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{file}: no such file; give a model directory in Hugging Face format") from None
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror or error}); check its permissions") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{file}: is no JSON ({error}); fetch the file again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: holds a JSON {type(content).__name__}, need an object; fetch the file again")
    return content


def _read_infos(file: Path) -> dict[str, TensorInfo]:
    if file.suffix == ".safetensors":
        return read_header(file)
    return {
        name: TensorInfo(file, tuple(tensor.shape), tensor.dtype) for name, tensor in load_pickled_tensors(file).items()
    }


def _read_index(index: Path) -> dict[str, TensorInfo]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise CheckpointError(f"{index}: has no weight_map from tensor names to files; fetch the file again")
    shards: dict[str, dict[str, TensorInfo]] = {}
    for shard in dict.fromkeys(weight_map.values()):
        file = index.parent / shard
        if Path(shard).name != shard or file.suffix not in (".safetensors", ".bin"):
            raise CheckpointError(f"{index}: names {shard!r}, which is no weight file beside it; fetch the index again")
        if not file.is_file():
            raise CheckpointError(
                f"{file}: missing, but {index.name} names it among {len(set(weight_map.values()))} shards; "
                "fetch the checkpoint again"
            )
        shards[shard] = _read_infos(file)
    for name, shard in weight_map.items():
        if name not in shards[shard]:
            raise CheckpointError(
                f"{index.parent / shard}: holds no tensor {name!r}, but {index.name} says so; "
                "index and shards are of different checkpoints, fetch both again"
            )
    return {name: shards[shard][name] for name, shard in weight_map.items()}
