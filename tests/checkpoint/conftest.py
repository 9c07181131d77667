"""Fixtures for checkpoints on disk."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_files import tiny_config, tiny_tensors, write_sharded


@pytest.fixture
def make_directory(tmp_path: Path) -> Callable[..., Path]:
    """Call with tensors, config and layout ("single", "sharded", "bin", "bin-old", "bin-sharded") -> directory."""
    made = 0

    def make(
        tensors: dict[str, torch.Tensor] | None = None, config: dict[str, Any] | None = None, layout: str = "single"
    ) -> Path:
        nonlocal made
        made += 1
        directory = tmp_path / f"tiny{made}"
        directory.mkdir()
        tensors = tiny_tensors() if tensors is None else tensors
        (directory / "config.json").write_text(json.dumps(tiny_config() if config is None else config))
        if layout == "single":
            save_file(tensors, directory / "model.safetensors")
        elif layout == "sharded":
            write_sharded(directory, tensors, 3)
        elif layout == "bin-sharded":
            write_sharded(directory, tensors, 2, "bin")
        else:
            zipped = layout != "bin-old"
            torch.save(tensors, directory / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
        return directory

    return make
