"""Formats of compressed-tensors: files that its release 0.9.4 wrote, and the same weights out of ours.

``samples/`` holds one layer a file with the dense weight beside it as ``expected``; for marlin-24 that is the integer
times its scale, rounded to bf16.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_files import tiny_config

from sparsert.checkpoint import convert_checkpoint, inspect_checkpoint, open_checkpoint
from sparsert.errors import CheckpointError, InputError, SparsityError
from sparsert.formats.marlin24 import dense_from_marlin24, marlin24_sizes
from sparsert.formats.sparse_bitmask import dense_from_sparse_bitmask

Make = Callable[..., Path]
SAMPLES = Path(__file__).parent / "samples"
LAYER = "model.layers.1.mlp.up_proj"


def sample(make_directory: Make, name: str, damage: Callable[[dict[str, torch.Tensor]], object] = bool) -> Path:
    """A model directory with the sample's layer as one of a block; ``damage`` may change its tensors."""
    tensors = {key.replace("layer.", LAYER + "."): tensor for key, tensor in load_file(SAMPLES / name).items()}
    damage(tensors)
    return make_directory({key: tensor.contiguous() for key, tensor in tensors.items()}, tiny_config())


@pytest.mark.parametrize(
    ("name", "storage", "pattern"),
    [
        ("sparse-24-bitmask-bf16", "sparse-24-bitmask", "2:4"),
        ("sparse-24-bitmask-fp8", "sparse-24-bitmask", "2:4"),
        ("sparse-bitmask-2of4", "sparse-bitmask", "2:4"),
        ("sparse-bitmask", "sparse-bitmask", "-"),  # 27 columns
        ("marlin24-int4-group", "marlin-24", "2:4"),
        ("marlin24-int4-channel", "marlin-24", "2:4"),
        ("marlin24-int8-group", "marlin-24", "2:4"),
        ("marlin24-int8-channel", "marlin-24", "2:4"),
    ],
)
def test_what_compressed_tensors_wrote(make_directory: Make, name: str, storage: str, pattern: str) -> None:
    checkpoint = open_checkpoint(sample(make_directory, name + ".safetensors"))
    weight, expected = checkpoint.read(LAYER + ".weight"), checkpoint.read("expected")
    assert sorted(checkpoint.names) == sorted(["expected", LAYER + ".weight"])
    assert checkpoint.storage(LAYER + ".weight") == storage
    assert weight.shape == checkpoint.shape(LAYER + ".weight") == expected.shape
    assert weight.dtype == checkpoint.dtype(LAYER + ".weight") == expected.dtype
    # a value that a scale takes below the smallest number of the format is a zero of either sign
    assert torch.equal(weight.float(), expected.float())
    report = next(tensor for tensor in inspect_checkpoint(checkpoint).tensors if tensor.name == LAYER + ".weight")
    assert report.pattern == pattern
    assert report.nbytes == checkpoint.total_nbytes - checkpoint.nbytes("expected")


@pytest.mark.parametrize("name", ["sparse-24-bitmask-bf16", "sparse-bitmask-2of4", "marlin24-int4-group"])
def test_they_convert_to_ours(make_directory: Make, tmp_path: Path, name: str) -> None:
    source = open_checkpoint(sample(make_directory, name + ".safetensors"))
    for target, packed in (("sparsert", 1), ("dense", 0), ("safetensors", int("24-bitmask" in name))):
        summary = convert_checkpoint(source, tmp_path / target, target=target)
        copy = open_checkpoint(tmp_path / target)
        assert summary.packed_linears == packed
        assert torch.equal(copy.read(LAYER + ".weight"), source.read("expected"))


def test_written_keys_are_those_of_compressed_tensors(make_directory: Make, tmp_path: Path) -> None:
    source = open_checkpoint(sample(make_directory, "sparse-24-bitmask-bf16.safetensors"))
    convert_checkpoint(source, tmp_path / "out", target="sparse-24-bitmask")
    config = open_checkpoint(tmp_path / "out").config["quantization_config"]
    assert config["quant_method"] == "compressed-tensors"
    assert config["sparsity_config"] == {
        "format": "sparse-24-bitmask",
        "global_sparsity": 0.5,
        "ignore": ["lm_head"],
        "registry_requires_subclass": False,
        "sparsity_structure": "2:4",
        "targets": ["Linear"],
    }
    assert sorted(load_file(tmp_path / "out" / "model.safetensors")) == sorted(
        ["expected", *(f"{LAYER}.{part}" for part in ("bitmask", "compressed", "shape"))]
    )


def test_parts_in_different_shards(make_directory: Make) -> None:
    tensors = load_file(SAMPLES / "sparse-24-bitmask-bf16.safetensors")
    checkpoint = open_checkpoint(make_directory(tensors, tiny_config(), "sharded"))
    assert len(checkpoint.files) == 3
    assert torch.equal(checkpoint.read("layer.weight"), tensors["expected"])


def _drop(part: str) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda tensors: tensors.pop(f"{LAYER}.{part}")


def _replace(part: str, tensor: torch.Tensor) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda tensors: tensors.update({f"{LAYER}.{part}": tensor})


BF16, INT4 = "sparse-24-bitmask-bf16.safetensors", "marlin24-int4-group.safetensors"
UNSTRUCTURED = "sparse-bitmask.safetensors"


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        (BF16, _drop("compressed"), r"is stored as sparse-24-bitmask but .*up_proj\.compressed is missing"),
        (BF16, _drop("bitmask"), r"is stored as sparse-24-bitmask but .*up_proj\.bitmask is missing"),
        (BF16, _drop("shape"), r"is stored as sparse-24-bitmask but .*up_proj\.shape is missing"),
        (BF16, _replace("weight", torch.zeros(20, 36)), r"up_proj\.weight' twice, dense and as parts of sparse-24-b"),
        (BF16, _replace("bitmask", torch.zeros(20, 6).byte()), r"do not fit each other: compressed \[20, 18\]"),
        (BF16, _replace("compressed", torch.zeros(9)), r"do not fit each other: compressed \[9\]"),
        (UNSTRUCTURED, _replace("weight.shape", torch.tensor([12, 40])), r"do not fit each other.*shape \[12, 40\]"),
        (UNSTRUCTURED, _replace("weight.shape", torch.tensor([12.0, 27.0])), r"do not fit each other"),
        (INT4, _replace("scale_packed", torch.zeros(5, 64).half()), r"marlin-24 has \[K/32, N bits/2\]"),
        (INT4, _replace("meta", torch.zeros(12, 130).short()), r"with N a multiple of 64 and 4 or 8 bits"),
    ],
)
def test_parts_that_do_not_fit(
    make_directory: Make, name: str, damage: Callable[[dict[str, torch.Tensor]], object], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(sample(make_directory, name, damage))


def _flip(part: str, index: int, value: int) -> Callable[[dict[str, torch.Tensor]], object]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{LAYER}.{part}"].view(-1)[index] = value

    return change


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        (BF16, _flip("bitmask", 3, 0), r"do not have exactly 2 of 4 bits"),
        (BF16, _flip("bitmask", 4, 0xF3), r"row 0 of the bitmask has bits past its 36 columns"),
        (BF16, _flip("shape", 0, 21), r"the part 'shape' says \[21, 36\], the others are those of \[20, 36\]"),
        (UNSTRUCTURED, _flip("weight.bitmask", 3, 0xFF), r"names \d+ values in rows that do not agree with row_offs"),
        (UNSTRUCTURED, _flip("weight.row_offsets", 5, 2), r"do not agree with row_offsets and the \d+ values stored"),
        (INT4, _flip("meta", 3, 0), r"groups hold no legal 2:4 nibble"),
        (INT4, _replace("meta", torch.zeros(12, 128).int()), r"marlin-24 has int32, float16 and int16"),
    ],
)
def test_content_that_contradicts_itself(
    make_directory: Make, name: str, damage: Callable[[dict[str, torch.Tensor]], object], message: str
) -> None:
    checkpoint = open_checkpoint(sample(make_directory, name, damage))
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: .*{message}"):
        checkpoint.read(LAYER + ".weight")


def test_only_packed_weights_have_packed_parts(make_directory: Make) -> None:
    checkpoint = open_checkpoint(sample(make_directory, INT4))
    with pytest.raises(CheckpointError, match="is stored as marlin-24, not as sparse-24-bitmask"):
        checkpoint.read_packed(LAYER + ".weight")


def test_names_that_only_look_like_parts(make_directory: Make) -> None:
    tensors = {"vision.shape": torch.tensor([2, 3]), "a.meta": torch.zeros(3), "b.weight_packed": torch.zeros(2, 2)}
    assert sorted(open_checkpoint(make_directory(tensors)).names) == sorted(tensors)


def test_functions_refuse_what_does_not_fit() -> None:
    with pytest.raises(InputError, match=r"w: got weight_packed \(1, 2\), scale_packed \(3,\) and meta \(\)"):
        marlin24_sizes((1, 2), (3,), (), "w")
    with pytest.raises(InputError, match="sparse-bitmask stores a matrix"):
        dense_from_sparse_bitmask(torch.tensor([3]), torch.zeros(1), torch.zeros(1).byte(), torch.tensor([0]))
    with pytest.raises(SparsityError, match="do not agree with row_offsets"):
        bits = torch.tensor([[0b1000]], dtype=torch.uint8)  # past the third column
        dense_from_sparse_bitmask(torch.tensor([1, 3]), torch.zeros(1), bits, torch.tensor([0]))
    fp16 = dense_from_marlin24(
        *(load_file(SAMPLES / INT4)[f"layer.{part}"] for part in ("weight_packed", "scale_packed", "meta")),
        dtype=torch.float16,
    )
    assert fp16.dtype == torch.float16 and fp16.shape == (64, 384)


def test_samples_are_whole(tmp_path: Path) -> None:
    """The samples open as they lie here, one file a directory."""
    files = sorted(SAMPLES.glob("*.safetensors"))
    assert len(files) == 8
    for file in files:
        shutil.copy(file, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text("{}")
        assert "layer.weight" in open_checkpoint(tmp_path)
        save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
