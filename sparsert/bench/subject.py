"""What is measured: one model in one of the four corners, as plain data that another process can build it from.

A model is a checkpoint or a named architecture with random weights. For the dense side of a pruned
checkpoint there are no unpruned weights at hand, so the places where it holds zeros are filled with random
values of the others' size: a zero draws less power than a number, and a baseline must not profit from that.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsert.bench.card import Card, corner_name, predict_card

if TYPE_CHECKING:
    import torch
    from torch import nn

    from sparsert.checkpoint import Checkpoint
    from sparsert.models import DecoderConfig, DecoderModel
    from sparsert.nn import SparseLinear
    from sparsert.schedule import LayerPlan

SPARSITIES = ("2:4", "dense")


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model in one corner.

    Attributes:
        name: architecture, or last part of the checkpoint's directory.
        hf_config: content of its ``config.json``.
        dtype: name of the dtype it runs in.
        sparsity: one of :data:`SPARSITIES`, of the linear layers of its blocks.
        removed: blocks that do not run.
        checkpoint: directory of its weights; None for random ones.
        masks: a mask file to apply while loading.
        prune: make magnitude masks while loading, for a checkpoint that is not 2:4 itself.
        seed: of random weights.
        backend: kernels of the packed layers.
    """

    name: str
    hf_config: dict[str, Any]
    dtype: str
    sparsity: str
    removed: tuple[int, ...] = ()
    checkpoint: str | None = None
    masks: str | None = None
    prune: bool = False
    seed: int = 0
    backend: str = "auto"

    @property
    def sparse(self) -> bool:
        """Whether the linear layers of the blocks are packed 2:4."""
        return self.sparsity == "2:4"

    @property
    def corner(self) -> str:
        """Which of the four corners it is in."""
        return corner_name(self.sparse, bool(self.removed))

    @property
    def config(self) -> DecoderConfig:
        """The architecture."""
        from sparsert.models import DecoderConfig

        return DecoderConfig.from_hf(self.hf_config)

    @property
    def plan(self) -> LayerPlan:
        """Which blocks run."""
        from sparsert.schedule import LayerPlan

        return LayerPlan.remove(self.config.num_blocks, self.removed, force=True)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype it runs in."""
        import torch

        dtype = getattr(torch, self.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype

    def at_corner(self, *, sparse: bool, removed: tuple[int, ...]) -> Subject:
        """The same model in another corner."""
        return dataclasses.replace(self, sparsity="2:4" if sparse else "dense", removed=removed)

    def card(self) -> Card:
        """What it weighs, from its configuration alone."""
        return predict_card(self.name, self.config, plan=self.plan, sparse=self.sparse, dtype=self.torch_dtype)

    def to_json(self) -> dict[str, Any]:
        """As plain types."""
        return dataclasses.asdict(self) | {"removed": list(self.removed)}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Subject:
        """The inverse of :meth:`to_json`."""
        return cls(**{**value, "removed": tuple(value["removed"])})


def build_model(subject: Subject, device: torch.device | str) -> DecoderModel:
    """Load the model, or make it.

    Raises:
        SparsertError: whatever loading finds wrong.
        torch.OutOfMemoryError: the device has no room for it.
    """
    import torch

    from sparsert.models import load_model
    from sparsert.models.random import random_model

    config, plan = subject.config, subject.plan
    if subject.checkpoint is None:
        return random_model(
            config, device=device, dtype=subject.torch_dtype, plan=plan, sparse=subject.sparse, seed=subject.seed,
            backend=subject.backend,
        )  # fmt: skip
    from sparsert.checkpoint import open_checkpoint, read_maskllm
    from sparsert.compress import magnitude_mask

    model = load_model(
        open_checkpoint(Path(subject.checkpoint)),
        device=device,
        dtype=subject.torch_dtype,
        plan=plan,
        masks=read_maskllm(subject.masks) if subject.masks is not None and subject.sparse else None,
        mask_maker=magnitude_mask if subject.prune and subject.sparse else None,
        backend=subject.backend,
    )
    if not subject.sparse:
        fill_dense_(model, torch.Generator(model.device).manual_seed(subject.seed))
    return model


def fill_dense_(model: nn.Module, generator: torch.Generator) -> int:
    """Replace packed linear layers by dense ones without zeros: pruned places get values of the others' size.

    Args:
        model: changed in place, a layer at a time.
        generator: on the model's device.

    Returns:
        How many layers were replaced.
    """
    import torch

    def filled(packed: SparseLinear) -> nn.Module:
        linear = packed.to_linear()
        weight = linear.weight.data
        scale = float(packed.values.float().std())
        noise = torch.randn(weight.shape, generator=generator, device=weight.device, dtype=weight.dtype)
        linear.weight.data = torch.where(weight == 0, noise.mul_(scale), weight)
        return linear

    return replace_packed_(model, filled)


def replace_packed_(model: nn.Module, replace: Callable[[SparseLinear], nn.Module]) -> int:
    """Replace every packed layer by what ``replace`` makes of it, one at a time, in place; returns how many."""
    from sparsert.nn import SparseLinear

    found = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, SparseLinear)
    ]
    for parent, name, child in found:
        setattr(parent, name, replace(child))
    return len(found)


def stored_sparsity(checkpoint: Checkpoint, config: DecoderConfig) -> str:
    """Whether a checkpoint is 2:4, judged by the linear layers of its first block, which are read.

    Returns:
        One of :data:`SPARSITIES`.
    """
    from sparsert.formats.groups import count_groups
    from sparsert.models.names import TensorNames

    names = TensorNames(config, checkpoint)
    for tensor in dict.fromkeys(names.block_linear(0, name).tensor for name in config.block_linears(0)):
        weight = checkpoint.read(f"{tensor}.weight")
        if weight.shape[1] % 4 or count_groups(weight)[1]:
            return "dense"
    return "2:4"
