"""Masks read ahead: the same masks, few of them in memory, errors where they are asked for."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from random_24 import random_mask
from torch import Tensor

from sparsert.checkpoint import read_maskllm, write_maskllm
from sparsert.checkpoint.mask_stream import AHEAD, MaskStream
from sparsert.checkpoint.masks import MaskFile
from sparsert.errors import CheckpointError

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
COUNT = AHEAD + 5


def name_of(block: int) -> str:
    return f"model.layers.{block}.a.weight"


@pytest.fixture(params=["npz", "pt"])
def masks(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, dict[str, Tensor]]:
    torch.manual_seed(3)
    made = {name_of(block): random_mask(3 + block, 12) for block in range(COUNT)}
    file = tmp_path / f"masks.{request.param}"
    if request.param == "npz":
        write_maskllm(file, made.items())
    else:
        torch.save({f"{name}.mask": mask.half() for name, mask in made.items()}, file)
    return file, made


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("order", [list(range(COUNT)), list(range(COUNT))[::-1], [0, 0, 5, 1, 1, 0, COUNT - 1]])
def test_any_order_gives_the_masks(masks: tuple[Path, dict[str, Tensor]], device: str, order: list[int]) -> None:
    file, expected = masks
    shapes = {name: tuple(mask.shape) for name, mask in expected.items()}
    with MaskStream(read_maskllm(file), shapes, torch.device(device)) as stream:
        for block in order:
            mask = stream.mask(name_of(block), shapes[name_of(block)])
            assert mask.device.type == device and mask.dtype == torch.bool
            assert torch.equal(mask.cpu(), expected[name_of(block)])
        assert name_of(2) in stream and "model.norm.weight" not in stream


def test_few_masks_are_held(masks: tuple[Path, dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch) -> None:
    file, expected = masks
    opened = read_maskllm(file)
    read, lock, reads = type(opened).read, threading.Lock(), []

    def count(self: MaskFile, name: str, shape: tuple[int, ...]) -> Tensor:
        with lock:
            reads.append(name)
        return read(self, name, shape)

    monkeypatch.setattr(type(opened), "read", count)
    shapes = {
        "model.layers.0.left_dense.weight": (4, 4),
        **{name: tuple(mask.shape) for name, mask in expected.items()},
    }
    with MaskStream(opened, shapes, torch.device("cpu")) as stream:
        for asked, (name, mask) in enumerate(expected.items(), start=1):
            assert torch.equal(stream.mask(name, tuple(mask.shape)), mask)
            assert len(reads) <= asked + AHEAD
    assert sorted(reads) == sorted(expected), "each mask is read once"


def test_errors_come_where_the_mask_is_asked_for(masks: tuple[Path, dict[str, Tensor]]) -> None:
    file, expected = masks
    shapes = {name: tuple(mask.shape) for name, mask in expected.items()}
    shapes[name_of(1)] = (400, 12)
    with MaskStream(read_maskllm(file), shapes, torch.device("cpu")) as stream:
        assert torch.equal(stream.mask(name_of(0), shapes[name_of(0)]), expected[name_of(0)])
        with pytest.raises(CheckpointError, match="the masks belong to another model"):
            stream.mask(name_of(1), shapes[name_of(1)])
        with pytest.raises(CheckpointError, match=r"has no mask for 'model.layers.99"):
            stream.mask("model.layers.99.a.weight", (4, 4))
