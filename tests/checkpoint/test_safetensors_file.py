"""The safetensors reader and writer against the library's own, and against damaged files."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparsert.checkpoint.safetensors_file import CODE_OF_DTYPE, SafetensorsWriter, read_header
from sparsert.errors import CheckpointError

TENSORS = {
    "matrix": torch.randn(5, 12).to(torch.bfloat16),
    "vector": torch.randn(7),
    "scalar": torch.tensor(3.5, dtype=torch.float64),
    "empty": torch.zeros(0, 4, dtype=torch.float16),
    "bytes": torch.arange(9, dtype=torch.uint8).view(3, 3),
    "flags": torch.tensor([True, False, True]),
    "long": torch.tensor([-1, 2**40]),
    "eight_bits": torch.randn(4, 4).to(torch.float8_e4m3fn),
}


def write(file: Path, tensors: dict[str, torch.Tensor]) -> None:
    layout = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    with SafetensorsWriter(file, layout) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)


def test_library_reads_what_we_write(tmp_path: Path) -> None:
    write(tmp_path / "ours.safetensors", TENSORS)
    loaded = load_file(tmp_path / "ours.safetensors")
    assert set(loaded) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert loaded[name].dtype == tensor.dtype and loaded[name].shape == tensor.shape
        assert torch.equal(loaded[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


def test_we_read_what_the_library_writes(tmp_path: Path) -> None:
    file = tmp_path / "theirs.safetensors"
    save_file(TENSORS, file, metadata={"format": "pt"})
    header = read_header(file)
    assert set(header) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert header[name].shape == tuple(tensor.shape)
        assert header[name].dtype == tensor.dtype
        assert header[name].nbytes == tensor.nbytes
        assert header[name].file == file


def test_non_contiguous_tensors_are_written_row_major(tmp_path: Path) -> None:
    transposed = torch.randn(6, 10).t()
    write(tmp_path / "t.safetensors", {"t": transposed})
    assert torch.equal(load_file(tmp_path / "t.safetensors")["t"], transposed)


def test_every_dtype_has_one_code() -> None:
    assert len(set(CODE_OF_DTYPE.values())) == len(CODE_OF_DTYPE)


def test_writer_holds_callers_to_the_layout(tmp_path: Path) -> None:
    layout = {"a": ((2, 2), torch.float32), "b": ((1,), torch.float32)}
    with pytest.raises(ValueError, match="out of turn"), SafetensorsWriter(tmp_path / "1", layout) as writer:
        writer.write("b", torch.zeros(1))
    with pytest.raises(ValueError, match="expected"), SafetensorsWriter(tmp_path / "2", layout) as writer:
        writer.write("a", torch.zeros(2, 2, dtype=torch.float16))
    with pytest.raises(ValueError, match="never written"), SafetensorsWriter(tmp_path / "3", layout) as writer:
        writer.write("a", torch.zeros(2, 2))


@pytest.mark.parametrize("cut", [1, 2, 100, 0.5, 0.02])
def test_truncation_is_found_from_the_header(tmp_path: Path, cut: float) -> None:
    file = tmp_path / "cut.safetensors"
    save_file({"w": torch.randn(64, 64)}, file)
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * cut)] if isinstance(cut, float) else content[:-cut])
    with pytest.raises(CheckpointError, match=r"cut\.safetensors: (truncated|.*ends inside its header).*fetch"):
        read_header(file)


def header_file(file: Path, header: object, data: bytes = b"\0" * 16) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return file


GOOD_ENTRY = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"not json", "no JSON"),
        (b"\xff\xfe", "no JSON"),
        ([1], "no JSON object"),
        ({"w": 3}, "entry of tensor 'w' is damaged"),
        ({"w": {**GOOD_ENTRY, "shape": [2, -2]}}, "entry of tensor 'w' is damaged"),
        ({"w": {**GOOD_ENTRY, "shape": [2, "2"]}}, "entry of tensor 'w' is damaged"),
        ({"w": {**GOOD_ENTRY, "data_offsets": [0]}}, "entry of tensor 'w' is damaged"),
        ({"w": {**GOOD_ENTRY, "dtype": "X7"}}, "dtype 'X7'; readable are F64"),
        ({"w": {**GOOD_ENTRY, "dtype": ["F32"]}}, "entry of tensor 'w' is damaged"),
        ({"w": {**GOOD_ENTRY, "shape": [2, 3]}}, "needs 24 bytes, the header gives it 16"),
        ({"w": {**GOOD_ENTRY, "data_offsets": [4, 20]}}, "begins at byte 4 of the data instead of 0"),
        ({"w": GOOD_ENTRY, "v": GOOD_ENTRY}, "begins at byte 0 of the data instead of 16"),
        ({}, "16 bytes follow the last tensor"),
    ],
)
def test_damaged_headers(tmp_path: Path, header: object, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_header(header_file(tmp_path / "bad.safetensors", header))


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_header(tmp_path / "absent.safetensors")
    (tmp_path / "tiny.safetensors").write_bytes(b"abc")
    with pytest.raises(CheckpointError, match="3 bytes are no safetensors file"):
        read_header(tmp_path / "tiny.safetensors")


def test_random_damage_never_escapes_as_another_error(tmp_path: Path) -> None:
    file = tmp_path / "fuzz.safetensors"
    save_file({"w": torch.randn(4, 4), "v": torch.randn(3)}, file)
    content = file.read_bytes()
    generator = random.Random(0)
    found = 0
    for _ in range(500):
        damaged = bytearray(content)
        for _ in range(generator.randint(1, 4)):
            damaged[generator.randrange(len(damaged) - 76)] = generator.randrange(256)
        file.write_bytes(damaged[: generator.choice([len(damaged), generator.randrange(len(damaged))])])
        try:
            read_header(file)
        except CheckpointError:
            found += 1
    assert found > 400
