"""Our format: bit-exact round trips, read straight into the packed layout, nothing half-written, resumed runs."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_files import BLOCKS, tiny_config, tiny_tensors

from sparsert.checkpoint import (
    Checkpoint,
    convert_checkpoint,
    inspect_checkpoint,
    open_checkpoint,
    prune_checkpoint,
)
from sparsert.compress import magnitude_mask
from sparsert.errors import CheckpointError, InputError, SparsityError, UnsupportedError
from sparsert.formats import bitmask_from_dense
from sparsert.schedule import LayerPlan

Make = Callable[..., Path]
ODD = "model.layers.6.mlp.up_proj.weight"


def pruned_tensors(dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """2:4 in every block linear but one that is dense; one group is empty and one keeps a single value."""
    tensors = tiny_tensors(dtype)
    for name, tensor in tensors.items():
        if name.endswith("_proj.weight") and name != ODD:
            tensors[name] = tensor * magnitude_mask(tensor)
    tensors["model.layers.3.mlp.up_proj.weight"][7, 4:8] = 0
    tensors["model.layers.3.mlp.up_proj.weight"][9, 0:3] = 0
    return tensors


def assert_same(checkpoint: Checkpoint, tensors: dict[str, torch.Tensor]) -> None:
    assert sorted(checkpoint.names) == sorted(tensors)
    for name, tensor in tensors.items():
        read = checkpoint.read(name)
        assert read.dtype == tensor.dtype and checkpoint.shape(name) == tuple(tensor.shape), name
        assert torch.equal(read.view(torch.uint8), tensor.view(torch.uint8)), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shard_bytes", [10**9, 4000])
def test_there_and_back_bit_for_bit(make_directory: Make, tmp_path: Path, dtype: torch.dtype, shard_bytes: int) -> None:
    tensors = pruned_tensors(dtype)
    source = open_checkpoint(make_directory(tensors, layout="sharded"))
    summary = convert_checkpoint(source, tmp_path / "ours", shard_bytes=shard_bytes)
    ours = open_checkpoint(tmp_path / "ours")
    assert summary.packed_linears == 4 * BLOCKS - 1 and summary.dense_linears == (ODD,)
    assert summary.source_bytes == source.total_nbytes and summary.total_bytes == ours.total_nbytes
    assert_same(ours, tensors)
    assert (len(ours.files) > 3) == (shard_bytes == 4000)

    for target in ("dense", "sparse-24-bitmask", "safetensors"):
        convert_checkpoint(ours, tmp_path / target, target=target, shard_bytes=shard_bytes)
        assert_same(open_checkpoint(tmp_path / target), tensors)
    assert "quantization_config" not in open_checkpoint(tmp_path / "dense").config
    assert open_checkpoint(tmp_path / "dense").storage("model.layers.0.mlp.up_proj.weight") == "dense"
    assert open_checkpoint(tmp_path / "safetensors").config == ours.config


def test_the_files_hold_what_the_specification_says(make_directory: Make, tmp_path: Path) -> None:
    tensors = pruned_tensors()
    source = open_checkpoint(make_directory(tensors, layout="bin"))
    convert_checkpoint(source, tmp_path / "ours")
    stored = load_file(tmp_path / "ours" / "model.safetensors")
    prefix = "model.layers.3.mlp.up_proj"
    expected = bitmask_from_dense(tensors[prefix + ".weight"])
    assert prefix + ".weight" not in stored and ODD in stored
    assert all(torch.equal(stored[f"{prefix}.{part}"], tensor) for part, tensor in expected.items())
    assert stored[prefix + ".shape"].tolist() == [[40], [24]] and stored[prefix + ".bitmask"].dtype == torch.uint8
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert config["quantization_config"] == {
        "quant_method": "sparsert",
        "version": 1,
        "format": "sparse-24-bitmask",
        "sparsity_structure": "2:4",
        "targets": ["Linear"],
        "ignore": ["lm_head", ODD.removesuffix(".weight")],
        "provenance": {},
    }
    report = inspect_checkpoint(open_checkpoint(tmp_path / "ours"))
    assert report.totals()["sparse_linears"] == 4 * BLOCKS - 1


def test_pruning_writes_it_and_records_where_it_comes_from(make_directory: Make, tmp_path: Path) -> None:
    tensors = tiny_tensors()
    first = prune_checkpoint(
        open_checkpoint(make_directory(tensors)),
        tmp_path / "ours",
        method="magnitude",
        mask_maker=lambda name, weight: magnitude_mask(weight, name=name),
        base_model="owner/base",
        target="sparsert",
    )
    ours = open_checkpoint(tmp_path / "ours")
    assert first.total_bytes == ours.total_nbytes < sum(tensor.nbytes for tensor in tensors.values())
    provenance = ours.config["quantization_config"]["provenance"]
    assert provenance["base_model"] == "owner/base" and provenance["kept_blocks"] == list(range(BLOCKS))
    assert "sparsert" not in ours.config and all(map(ours.claims_two_of_four, ours.block_linears()))
    # shorter, without new masks: the form and the record stay
    prune_checkpoint(
        ours, tmp_path / "shorter", method="none", mask_maker=None, base_model="x", plan=LayerPlan.remove(BLOCKS, [4])
    )
    shorter = open_checkpoint(tmp_path / "shorter")
    provenance = shorter.config["quantization_config"]["provenance"]
    assert provenance["removed_blocks"] == [4] and provenance["method"] == "magnitude"
    assert "runs 7 of 8 blocks" in inspect_checkpoint(shorter).to_text()
    name = "mlp.down_proj.weight"
    original = tensors[f"model.layers.5.{name}"]
    assert shorter.storage(f"model.layers.4.{name}") == "sparse-24-bitmask"
    assert torch.equal(shorter.read(f"model.layers.4.{name}"), original * magnitude_mask(original))
    convert_checkpoint(shorter, tmp_path / "dense", target="dense")
    assert open_checkpoint(tmp_path / "dense").config["sparsert"] == provenance


def test_one_tensor_in_memory(make_directory: Make, tmp_path: Path) -> None:
    """Host memory follows the largest tensor, not the checkpoint."""
    largest = torch.randn(256, 512)
    largest = largest * magnitude_mask(largest)
    tensors = {f"model.layers.{block}.mlp.up_proj.weight": largest.clone() for block in range(BLOCKS)}
    source = open_checkpoint(make_directory(tensors))
    living: list[int] = []
    original = Checkpoint.read

    def read(self: Checkpoint, name: str) -> torch.Tensor:
        living.append(tracemalloc.get_traced_memory()[0])
        return original(self, name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoint, "read", read)
        tracemalloc.start()
        convert_checkpoint(source, tmp_path / "out")
        tracemalloc.stop()
    # torch's memory is not traced, its Python objects are: a list of tensors kept would grow with every read
    assert len(living) == 3 * BLOCKS and max(living[3:]) - min(living[3:]) < 200_000


def test_an_interrupted_conversion_goes_on(
    make_directory: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = pruned_tensors()
    source = open_checkpoint(make_directory(tensors))
    original, calls = Checkpoint.read, []

    def stops(self: Checkpoint, name: str) -> torch.Tensor:
        calls.append(name)
        if len(calls) == 90:
            raise KeyboardInterrupt
        return original(self, name)

    monkeypatch.setattr(Checkpoint, "read", stops)
    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(source, tmp_path / "out", shard_bytes=4000)
    assert not (tmp_path / "out").exists()
    finished = {file.name: file.stat().st_mtime_ns for file in (tmp_path / ".out.partial").glob("*.safetensors")}
    assert finished
    monkeypatch.setattr(Checkpoint, "read", original)
    convert_checkpoint(source, tmp_path / "out", shard_bytes=4000)
    assert not (tmp_path / ".out.partial").exists()
    assert_same(open_checkpoint(tmp_path / "out"), tensors)
    written = {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in finished}
    assert written == finished, "finished files were kept"
    assert not [file.name for file in (tmp_path / "out").iterdir() if file.name.startswith(".")]


def test_what_was_left_by_another_conversion_is_not_used(make_directory: Make, tmp_path: Path) -> None:
    source = open_checkpoint(make_directory(pruned_tensors()))
    partial = tmp_path / ".out.partial"
    partial.mkdir()
    (partial / "model.safetensors").write_bytes(b"something else")
    (partial / ".resume.json").write_text('{"key": "another"}')
    convert_checkpoint(source, tmp_path / "out")
    assert_same(open_checkpoint(tmp_path / "out"), pruned_tensors())


def test_two_runs_do_not_share_a_directory(make_directory: Make, tmp_path: Path) -> None:
    import fcntl

    source = open_checkpoint(make_directory(pruned_tensors()))
    (tmp_path / ".out.partial").mkdir()
    with (tmp_path / ".out.partial" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="another process is writing it"):
            convert_checkpoint(source, tmp_path / "out")


def test_a_file_that_reads_back_differently_is_noticed(
    make_directory: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sparsert.checkpoint.safetensors_file import SafetensorsWriter

    source = open_checkpoint(make_directory(pruned_tensors()))
    close = SafetensorsWriter.close

    def flips_a_bit(self: SafetensorsWriter) -> None:
        close(self)
        content = bytearray(self._file.read_bytes())
        content[-3] ^= 1
        self._file.write_bytes(content)

    monkeypatch.setattr(SafetensorsWriter, "close", flips_a_bit)
    with pytest.raises(CheckpointError, match=r"reads back as another tensor.*check the disk|cannot be read back"):
        convert_checkpoint(source, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / ".out.partial").exists()


def test_what_is_refused(make_directory: Make, tmp_path: Path) -> None:
    dense = open_checkpoint(make_directory())
    with pytest.raises(InputError, match=r"none of its 32 linear weights is 2:4.*sparsert inspect"):
        convert_checkpoint(dense, tmp_path / "out")
    with pytest.raises(InputError, match="cannot convert to 'gguf'; choose one of sparsert, dense"):
        convert_checkpoint(dense, tmp_path / "out", target="gguf")
    tensors = pruned_tensors()
    tensors["model.norm.weight"][3] = float("inf")
    with pytest.raises(CheckpointError, match=r"1 of 24 values of 'model.norm.weight' are NaN or infinite"):
        convert_checkpoint(open_checkpoint(make_directory(tensors)), tmp_path / "out")
    quantized = tiny_config(quantization_config={"quant_method": "awq"})
    with pytest.raises(UnsupportedError, match=r"quantized \(method 'awq'\) and cannot be converted"):
        convert_checkpoint(open_checkpoint(make_directory(config=quantized)), tmp_path / "out")
    lying = tiny_config(sparsert={"pattern": "2:4"})
    with pytest.raises(SparsityError, match="groups keep more than 2 of 4 values"):
        convert_checkpoint(open_checkpoint(make_directory(config=lying)), tmp_path / "out")
    for version in (2, 0, "1", None):
        newer = tiny_config(
            quantization_config={"quant_method": "sparsert", "format": "sparse-24-bitmask", "version": version}
        )
        with pytest.raises(CheckpointError, match=r"this sparsert reads sparse-24-bitmask, version 1: update sparsert"):
            open_checkpoint(make_directory(config=newer))
    assert not (tmp_path / "out").exists()
