"""A tiny default model: a base in our cache, and the files that the package would carry for it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from sparsert.checkpoint import default_masks, open_checkpoint, write_maskllm
from sparsert.checkpoint.default_model import DEFAULT_MODEL, cache_directory
from sparsert.schedule import LayerPlan


def random_masks(model: Path, *, seed: int = 0) -> dict[str, torch.Tensor]:
    """A random 2:4 mask for each block linear: neither the weights nor their sizes could tell it."""
    checkpoint, generator = open_checkpoint(model), torch.Generator().manual_seed(seed)
    masks = {}
    for name in checkpoint.block_linears():
        rows, columns = checkpoint.shape(name)
        order = torch.rand(rows, columns // 4, 4, generator=generator).argsort(-1)
        masks[name] = (order < 2).view(rows, columns)
    return masks


def install_default(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plan: LayerPlan | None = None
) -> dict[str, torch.Tensor]:
    """Make ``model`` the default one, with masks and a plan of its own in place of the package's.

    Returns:
        The masks, by name of the weight.
    """
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    cache_directory().mkdir(parents=True)
    os.symlink(model, cache_directory() / DEFAULT_MODEL.split("/")[-1])
    monkeypatch.setattr(default_masks, "DIRECTORY", tmp_path / "data")
    default_masks.DIRECTORY.mkdir()
    masks = random_masks(model)
    write_maskllm(default_masks.DIRECTORY / "masks.npz", masks.items())
    plan = plan or LayerPlan.full(open_checkpoint(model).num_blocks)
    (default_masks.DIRECTORY / "plan.json").write_text(plan.to_json())
    return masks
