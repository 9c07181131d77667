"""Masks out of a job: as a checkpoint, as MaskLLM's npz, or both; kept in bits until then.

A mask of a 7B model is 6.5 GB as bool and 0.8 GB in bits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsert.checkpoint import Checkpoint, check_not_pruned, prune_checkpoint, read_maskllm, write_maskllm
from sparsert.checkpoint.work import check_output
from sparsert.errors import CheckpointError, InputError
from sparsert.formats.maskllm import mask_from_maskllm_bits, maskllm_bits
from sparsert.models import DecoderConfig


@dataclasses.dataclass(frozen=True)
class MaskedResult:
    """What a job that makes masks wrote.

    Attributes:
        output: the checkpoint, or None.
        masks_output: the mask file, or None.
        method: how the masks were made.
        masked_linears: how many linear weights have one.
        dense_linears: how many of the blocks have none.
        seconds: the whole job.
        peak_memory_bytes: of the GPU; 0 on a CPU.
        measured: further numbers, by name.
    """

    output: Path | None
    masks_output: Path | None
    method: str
    masked_linears: int
    dense_linears: int
    seconds: float
    peak_memory_bytes: int
    measured: dict[str, float] = dataclasses.field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        record = dataclasses.asdict(self)
        return {**record, "output": self._text(self.output), "masks_output": self._text(self.masks_output)}

    def to_text(self) -> str:
        """One line."""
        places = " and ".join(str(place) for place in (self.output, self.masks_output) if place is not None)
        memory = f", {self.peak_memory_bytes / 1e9:.1f} GB of GPU memory" if self.peak_memory_bytes else ""
        measured = "".join(f", {name} {value:.4g}" for name, value in self.measured.items())
        return (
            f"{places}: {self.masked_linears} linear weights 2:4 by {self.method}, {self.dense_linears} dense, "
            f"{self.seconds:.0f} s{memory}{measured}"
        )

    @staticmethod
    def _text(place: Path | None) -> str | None:
        return None if place is None else str(place)


class MaskStore(Mapping[str, Tensor]):
    """Masks by module name, held in bits on the host."""

    def __init__(self) -> None:
        self._bits: dict[str, tuple[Tensor, tuple[int, ...]]] = {}

    def put(self, name: str, mask: Tensor) -> None:
        """Keep a mask of any device."""
        self.put_bits(name, maskllm_bits(mask).cpu(), tuple(mask.shape))

    def put_bits(self, name: str, bits: Tensor, shape: tuple[int, ...]) -> None:
        """Keep a mask that is in bits already, see :func:`sparsert.formats.maskllm_bits`; on the host."""
        self._bits[name] = (bits, shape)

    def __getitem__(self, name: str) -> Tensor:
        return mask_from_maskllm_bits(*self._bits[name], name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._bits)

    def __len__(self) -> int:
        return len(self._bits)


def read_masks(path: str | Path, checkpoint: Checkpoint) -> MaskStore:
    """Masks of a file, checked against a checkpoint.

    Raises:
        CheckpointError: the file is damaged or of another model.
    """
    file = read_maskllm(path)
    linears = {name: checkpoint.shape(name) for name in checkpoint.block_linears()}
    foreign = [name for name in file.names if name not in linears]
    if foreign:
        raise CheckpointError(
            f"{path}: holds a mask for {foreign[0]!r}, which this model lacks; it is of another model"
        )
    store = MaskStore()
    for name in file.names:
        layer, stored = name.removesuffix(".weight"), file.read(name, linears[name])
        if stored.dim() == 1:  # bits; raw masks are matrices
            store.put_bits(layer, stored, linears[name])
        else:
            store.put(layer, file.unpack(stored, name, linears[name]))
    return store


def save_masks(path: str | Path, masks: Mapping[str, Tensor], *, compress: bool = True) -> None:
    """Write MaskLLM's npz, see :func:`sparsert.checkpoint.write_maskllm`.

    Raises:
        CheckpointError: the file cannot be written.
    """
    write_maskllm(path, ((f"{name}.weight", mask) for name, mask in masks.items()), compress=compress)


def check_places(output: str | None, masks_output: str | None) -> None:
    """Refuse places that results cannot be written to, before any work is done.

    Raises:
        InputError: neither is given, or the output is not free.
        CheckpointError: a directory that does not exist.
    """
    if output is None and masks_output is None:
        raise InputError(
            "there is nowhere to write to; give --output DIR for a checkpoint, --masks-output FILE, or both"
        )
    if output is not None:
        check_output(Path(output).expanduser())
    if masks_output is not None:
        file = Path(masks_output).expanduser()
        if file.suffix != ".npz":
            raise InputError(f"--masks-output {file}: masks are written as MaskLLM's npz; choose a name that ends so")
        if not file.absolute().parent.is_dir():
            raise CheckpointError(f"{file}: the directory does not exist; create it first")


def check_maskable(checkpoint: Checkpoint) -> None:
    """Refuse a model that could not be run afterwards, or whose block linears are all 2:4 already.

    Raises:
        UnsupportedError: an architecture that is not known here.
        InputError: there is nothing left to choose.
    """
    DecoderConfig.from_hf(checkpoint.config)
    check_not_pruned(checkpoint)


def write_masked(
    checkpoint: Checkpoint,
    masks: Mapping[str, Tensor],
    *,
    output: str | None,
    masks_output: str | None,
    method: str,
    base_model: str,
    target: str | None,
    weights: Callable[[str], Tensor] | None = None,
    progress: bool = True,
) -> tuple[Path | None, Path | None, int]:
    """Write masks, and the checkpoint that they make.

    Args:
        checkpoint: the source.
        masks: by module name.
        output, masks_output: where to, see :func:`check_places`.
        method: name to record.
        base_model: name to record.
        target: see :func:`sparsert.checkpoint.prune_checkpoint`.
        weights: weights to write instead of the source's, by module name; for those that have a mask.
        progress: show a bar.

    Returns:
        Both places, and how many linear weights stay dense.

    Raises:
        CheckpointError: the disk is full; what was there before is untouched.
    """
    linears = checkpoint.block_linears()
    unknown = [name for name in masks if f"{name}.weight" not in linears]
    if unknown:
        raise CheckpointError(
            f"{checkpoint.directory}: holds no weight for the layer {unknown[0]!r} of its transformers model; the "
            "checkpoint names its tensors in another way, save it anew with transformers"
        )
    keep_dense = frozenset(name for name in linears if name.removesuffix(".weight") not in masks)
    if masks_output is not None:
        save_masks(masks_output, masks)
    if output is not None:

        def replaced(name: str, tensor: Tensor) -> Tensor:
            if weights is None:
                return tensor
            return weights(name.removesuffix(".weight")).detach().to("cpu", tensor.dtype)

        prune_checkpoint(
            checkpoint,
            output,
            method=method,
            mask_maker=lambda name, weight: masks[name.removesuffix(".weight")],
            weight_maker=replaced,
            base_model=base_model,
            target=target,
            keep_dense=keep_dense,
            progress=progress,
        )
    places = [None if place is None else Path(place).expanduser() for place in (output, masks_output)]
    return places[0], places[1], len(keep_dense)


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory that tensors of this process had on a GPU; 0 on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
