"""Tensors read straight onto a device: the values of the library's own reader, in pieces of any size."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from random_24 import random_24
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparsert.checkpoint import open_checkpoint
from sparsert.checkpoint.staging import Staging
from sparsert.checkpoint.tensor_stream import TensorStream
from sparsert.errors import CheckpointError
from sparsert.formats.bitmask import bitmask_from_dense

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]

#: Odd sizes around the piece of 64 bytes that the tests take.
TENSORS = {
    "model.layers.0.a.weight": torch.randn(37, 20),
    "model.layers.0.b.weight": torch.randn(5, 3, 7).to(torch.bfloat16),
    "model.layers.0.c.weight": torch.randn(32).to(torch.float16),
    "model.layers.1.d.weight": torch.randn(1, 1).to(torch.float64),
    "model.layers.1.e.weight": torch.randn(16, 4).to(torch.float64),
    "model.scalar": torch.tensor(2.5),
    "model.empty": torch.zeros(0, 4),
}

MakeDirectory = Callable[..., Path]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("piece_bytes", "pieces"), [(64, 1), (64, 3), (8, 5), (1 << 20, 2)])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float32])
def test_every_piece_arrives(
    tmp_path: Path, device: str, piece_bytes: int, pieces: int, dtype: torch.dtype | None
) -> None:
    content = os.urandom(13)
    staging = Staging(torch.device(device), piece_bytes=piece_bytes, pieces=pieces)
    for tensor in TENSORS.values():
        file = tmp_path / "file"
        file.write_bytes(content + tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() + b"more")
        target = torch.full(tensor.shape, -7.0, dtype=dtype or tensor.dtype, device=device)
        with file.open("rb") as stream:
            staging.fill(target, stream.fileno(), len(content), tensor.dtype)
        assert torch.equal(target.cpu(), tensor.to(target.dtype))
    staging.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("missing", [1, 100, 4000])
def test_a_file_that_ends_early(tmp_path: Path, dtype: torch.dtype, missing: int) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(4000 - missing))
    staging = Staging(torch.device("cpu"), piece_bytes=64, pieces=3)
    with file.open("rb") as stream, pytest.raises(EOFError, match=f"ends at byte {4000 - missing}"):
        staging.fill(torch.empty(1000, dtype=dtype), stream.fileno(), 0, torch.float32)
    # the ring still works
    with file.open("rb") as stream:
        staging.fill(target := torch.ones(0 if missing == 4000 else 16), stream.fileno(), 0, torch.float32)
    assert not target.any()


def test_the_ring_does_not_grow(tmp_path: Path) -> None:
    """Host memory is that of the pieces, however large the tensor."""
    file = tmp_path / "file"
    file.write_bytes(bytes(1 << 16))
    staging = Staging(torch.device("cpu"), piece_bytes=64, pieces=3)
    for _ in range(3):
        with file.open("rb") as stream:
            staging.fill(torch.empty(1 << 14, dtype=torch.bfloat16), stream.fileno(), 0, torch.float32)
    assert len(staging._ring) == 3 and all(len(piece.memory) == 64 for piece in staging._ring)


@pytest.mark.parametrize(("piece_bytes", "pieces"), [(0, 4), (12, 4), (64, 0)])
def test_rings_that_cannot_be(piece_bytes: int, pieces: int) -> None:
    with pytest.raises(ValueError, match=f"{pieces} pieces of {piece_bytes} bytes: need at least one"):
        Staging(torch.device("cpu"), piece_bytes=piece_bytes, pieces=pieces)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", ["single", "sharded", "bin", "bin-old"])
def test_the_values_of_the_library(make_directory: MakeDirectory, device: str, layout: str) -> None:
    checkpoint = open_checkpoint(make_directory(TENSORS, layout=layout))
    with TensorStream(checkpoint, torch.device(device)) as stream:
        for name, expected in TENSORS.items():
            for dtype in (expected.dtype, torch.float32, torch.float16):
                tensor = stream.read(name, dtype)
                assert tensor.device.type == device and tensor.is_contiguous()
                assert torch.equal(tensor.cpu(), expected.to(dtype))
        rows = stream.read("model.layers.0.b.weight", torch.bfloat16, (1, 4))
        assert torch.equal(rows.cpu(), TENSORS["model.layers.0.b.weight"][1:4])


def packed_parts(rows: int, columns: int) -> dict[str, Tensor]:
    parts = bitmask_from_dense(random_24(rows, columns, dtype=torch.bfloat16))
    return {f"model.layers.0.p.{part}": tensor for part, tensor in parts.items()}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", ["single", "sharded", "bin"])
@pytest.mark.parametrize("rows", [None, (3, 9)])
def test_packed_parts(make_directory: MakeDirectory, device: str, layout: str, rows: tuple[int, int] | None) -> None:
    parts = packed_parts(17, 44)
    checkpoint = open_checkpoint(make_directory(parts, layout=layout))
    selected = slice(None) if rows is None else slice(*rows)
    with TensorStream(checkpoint, torch.device(device)) as stream:
        compressed, bitmask = stream.read_packed("model.layers.0.p.weight", torch.float32, rows)
    assert torch.equal(compressed.cpu(), parts["model.layers.0.p.compressed"][selected].float())
    assert bitmask.dtype == torch.uint8 and torch.equal(bitmask.cpu(), parts["model.layers.0.p.bitmask"][selected])


def test_a_shape_that_says_something_else(make_directory: MakeDirectory) -> None:
    parts = packed_parts(17, 44)
    parts["model.layers.0.p.shape"][1] = 40
    checkpoint = open_checkpoint(make_directory(parts))
    with (
        TensorStream(checkpoint, torch.device("cpu")) as stream,
        pytest.raises(CheckpointError, match=r"part 'shape' says \[17, 40\], the others are those of \[17, 44\]"),
    ):
        stream.read_packed("model.layers.0.p.weight", torch.bfloat16)


def test_a_file_that_was_replaced(make_directory: MakeDirectory) -> None:
    directory = make_directory(TENSORS)
    checkpoint = open_checkpoint(directory)
    others = {"model.aaa": torch.zeros(3), **{name: tensor.clone() for name, tensor in TENSORS.items()}}
    save_file(others, directory / "model.safetensors")
    with (
        TensorStream(checkpoint, torch.device("cpu")) as stream,
        pytest.raises(CheckpointError, match=r"'model.layers.0.a.weight' was \[37, 20\].*the file was replaced, open"),
    ):
        stream.read("model.layers.0.a.weight", torch.float32)


def test_a_file_that_is_gone(make_directory: MakeDirectory) -> None:
    directory = make_directory(TENSORS)
    checkpoint = open_checkpoint(directory)
    (directory / "model.safetensors").unlink()
    with (
        TensorStream(checkpoint, torch.device("cpu")) as stream,
        pytest.raises(
            CheckpointError, match=r"model.safetensors: tensor 'model.scalar' cannot be read.*fetch it again"
        ),
    ):
        stream.read("model.scalar", torch.float32)


def test_a_file_that_is_cut_while_it_is_read(make_directory: MakeDirectory) -> None:
    directory = make_directory(TENSORS)
    checkpoint = open_checkpoint(directory)
    last = max(TENSORS, key=lambda name: checkpoint.part_infos(name)[""][1].offset)
    first = "model.scalar" if last != "model.scalar" else "model.layers.0.c.weight"
    file = directory / "model.safetensors"
    with TensorStream(checkpoint, torch.device("cpu")) as stream:
        assert torch.equal(stream.read(first, TENSORS[first].dtype), load_file(file)[first])
        os.truncate(file, checkpoint.part_infos(last)[""][1].offset)
        with pytest.raises(CheckpointError, match=rf"{last}' cannot be read \(the file ends at byte \d+\); fetch"):
            stream.read(last, torch.float32)
