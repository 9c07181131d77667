"""A model directory as named tensors, read one at a time.

A tensor has the name, shape and dtype that the model wants, also where the files hold it in the parts of a
compressed format (``stored.py``); who can use the parts themselves asks for them.

Opening reads only ``config.json``, the index and the headers, checks them against each other and
against the file lengths, and so finds a missing or truncated shard before the first byte goes to a
device. Reading maps the file: a tensor costs host memory only while the caller holds it. What it
gives up: files are never fetched piece by piece from a server; a hub id is resolved to a
directory first (``sparsert.checkpoint.hub``).

The files looked for, first hit wins: ``model.safetensors``, ``model.safetensors.index.json``,
``pytorch_model.bin``, ``pytorch_model.bin.index.json``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsert.checkpoint.json_file import read_json
from sparsert.checkpoint.paths import check_inside
from sparsert.checkpoint.pickle_file import load_pickled_tensors
from sparsert.checkpoint.quantization import check_config, ignores, pruning_record
from sparsert.checkpoint.safetensors_file import TensorInfo, read_header
from sparsert.checkpoint.stored import BITMASK_24, StoredTensor, checked_shape, expand, file_of, find_tensors
from sparsert.errors import CheckpointError, InputError, SparsityError

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
        names: names of the model's tensors, in file order.
    """

    def __init__(self, directory: Path, config: dict[str, Any], infos: dict[str, TensorInfo]) -> None:
        self.directory = directory
        self.config = config
        self._infos = infos
        self._open_pickle: tuple[Path, dict[str, Tensor]] | None = None
        self._tensors: dict[str, StoredTensor] = find_tensors(infos, self._read_stored)
        self.names: list[str] = list(self._tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __repr__(self) -> str:
        return f"Checkpoint({str(self.directory)!r}, {len(self.names)} tensors, {self.total_nbytes} bytes)"

    def _tensor(self, name: str) -> StoredTensor:
        try:
            return self._tensors[name]
        except KeyError:
            raise CheckpointError(
                f"{self.directory}: holds no tensor {name!r}; the checkpoint is incomplete or of another architecture, "
                "`sparsert inspect` lists what it has"
            ) from None

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header."""
        return self._tensor(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """dtype of a tensor, from the header."""
        return self._tensor(name).dtype

    def storage(self, name: str) -> str:
        """How a tensor is stored, see :class:`~sparsert.checkpoint.stored.StoredTensor`."""
        return self._tensor(name).storage

    def nbytes(self, name: str) -> int:
        """Bytes of a tensor in its files."""
        return sum(self._infos[part].nbytes for part in self._tensor(name).parts.values())

    def file(self, name: str) -> Path:
        """The file that holds a tensor, or its first part."""
        return file_of(self._tensor(name), self._infos)

    def part_infos(self, name: str) -> dict[str, tuple[str, TensorInfo]]:
        """Where each part of a tensor stands: part -> its name in the files, and what their headers say of it.

        A dense tensor has one part, ``""``.
        """
        return {part: (stored, self._infos[stored]) for part, stored in self._tensor(name).parts.items()}

    @property
    def files(self) -> list[Path]:
        """The files that hold tensors."""
        return list(dict.fromkeys(info.file for info in self._infos.values()))

    @property
    def total_nbytes(self) -> int:
        """Bytes of all tensors in their files."""
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
        for name, tensor in self._tensors.items():
            block = block_of(name)
            if block is None or (wanted is not None and block not in wanted):
                continue
            if name.endswith(".weight") and len(tensor.shape) == 2:
                linears.append(name)
        return linears

    def claims_two_of_four(self, name: str) -> bool:
        """Whether the checkpoint says of itself that this weight is 2:4.

        A claim turns three kept values in a group from "runs dense" into an error. It covers every
        block linear but the listed exceptions, and is made by the record of ``sparsert prune`` (``pattern: "2:4"``,
        exceptions ``dense_linears``), or by a ``sparsity_config`` with ``sparsity_structure: "2:4"`` as
        compressed-tensors writes it (exceptions ``ignore``).
        """
        if block_of(name) is None or not name.endswith(".weight") or len(self.shape(name)) != 2:
            return False
        if self.storage(name) == BITMASK_24:
            return True
        record = pruning_record(self.config)
        if record is not None and record.get("pattern") == "2:4":
            return name not in (record.get("dense_linears") or ())
        for holder in (self.config, self.config.get("quantization_config"), self.config.get("compression_config")):
            sparsity = holder.get("sparsity_config") if isinstance(holder, dict) else None
            if isinstance(sparsity, dict) and sparsity.get("sparsity_structure") == "2:4":
                module = name.removesuffix(".weight")
                return not any(ignores(rule, module) for rule in sparsity.get("ignore") or ())
        return False

    def read(self, name: str) -> Tensor:
        """Read one tensor onto the CPU, in its shape and dtype; a compressed one is expanded, zeros included.

        Raises:
            CheckpointError: no such tensor, its file cannot be read any more, or its parts contradict each other.
        """
        tensor = self._tensor(name)
        parts = self.read_parts(name)
        try:
            return expand(tensor, parts, name)
        except (InputError, SparsityError) as error:
            raise CheckpointError(f"{self.file(name)}: {error}") from error

    def read_parts(self, name: str) -> dict[str, Tensor]:
        """Read the parts of one tensor onto the CPU as its files hold them; a dense tensor has one part, ``""``.

        Raises:
            CheckpointError: no such tensor, or a file cannot be read any more.
        """
        return {part: self._read_stored(stored) for part, stored in self._tensor(name).parts.items()}

    def read_packed(self, name: str) -> tuple[Tensor, Tensor]:
        """Kept values and bitmask of a weight in ``sparse-24-bitmask``, for ``sparsert.formats.from_bitmask``.

        Returns:
            ``compressed [rows, columns / 2]`` and ``bitmask`` uint8 ``[rows, ceil(columns / 8)]``.

        Raises:
            CheckpointError: as :meth:`read`, or the weight is stored in another way.
        """
        tensor = self._tensor(name)
        if tensor.storage != BITMASK_24:
            raise CheckpointError(f"{self.file(name)}: {name!r} is stored as {tensor.storage}, not as {BITMASK_24}")
        parts = self.read_parts(name)
        try:
            checked_shape(tensor.shape, parts["shape"], name)
        except InputError as error:
            raise CheckpointError(f"{self.file(name)}: {error}") from error
        return parts["compressed"], parts["bitmask"]

    def _read_stored(self, stored: str) -> Tensor:
        """One tensor of the files."""
        info = self._infos[stored]
        if info.file.suffix == ".safetensors":
            return self._read_safetensors(info, stored)
        # one pickle at a time: the old format has no mapping and would keep every shard in memory
        if self._open_pickle is None or self._open_pickle[0] != info.file:
            self._open_pickle = (info.file, load_pickled_tensors(info.file))
        return self._open_pickle[1][stored]

    def _read_safetensors(self, info: TensorInfo, name: str) -> Tensor:
        from safetensors import SafetensorError, safe_open

        try:
            # opened anew for each tensor: a mapping that stays would count all pages ever read as ours
            with safe_open(str(info.file), framework="pt", device="cpu") as file:
                tensor: Tensor = file.get_tensor(name)
        except (SafetensorError, OSError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{info.file}: tensor {name!r} cannot be read ({error}); fetch it again") from error
        if tuple(tensor.shape) != info.shape or tensor.dtype != info.dtype:
            raise CheckpointError(
                f"{info.file}: tensor {name!r} is {list(tensor.shape)} {tensor.dtype} and was {list(info.shape)} "
                f"{info.dtype} when the checkpoint was opened; the file was replaced, open it again"
            )
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
    check_inside(directory, directory / "config.json")
    config = read_json(directory / "config.json")
    check_config(config, directory)
    weight_file = next((directory / name for name in WEIGHT_FILES if (directory / name).is_file()), None)
    if weight_file is None:
        found = sorted(entry.name for entry in directory.iterdir())[:8]
        raise CheckpointError(
            f"{directory}: holds none of {', '.join(WEIGHT_FILES)} (found: {', '.join(found)}); "
            "give a directory in Hugging Face format with safetensors or .bin weights"
        )
    check_inside(directory, weight_file)
    infos = _read_index(weight_file) if weight_file.suffix == ".json" else _read_infos(weight_file)
    if not infos:
        raise CheckpointError(f"{weight_file}: holds no tensors; fetch the checkpoint again")
    return Checkpoint(directory, config, infos)


def _read_infos(file: Path) -> dict[str, TensorInfo]:
    if file.suffix == ".safetensors":
        return read_header(file)
    return {
        name: TensorInfo(file, tuple(tensor.shape), tensor.dtype) for name, tensor in load_pickled_tensors(file).items()
    }


def _read_index(index: Path) -> dict[str, TensorInfo]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) and shard for shard in weight_map.values()):
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
        check_inside(index.parent, file)
        shards[shard] = _read_infos(file)
    for name, shard in weight_map.items():
        if name not in shards[shard]:
            raise CheckpointError(
                f"{index.parent / shard}: holds no tensor {name!r}, but {index.name} says so; "
                "index and shards are of different checkpoints, fetch both again"
            )
    return {name: shards[shard][name] for name, shard in weight_map.items()}
