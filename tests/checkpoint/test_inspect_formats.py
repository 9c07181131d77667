"""`sparsert inspect` on every format: what it is, why weights run dense, and files that are no directories."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_files import BLOCKS, tiny_config, tiny_tensors

from sparsert.checkpoint import convert_checkpoint, inspect_checkpoint, open_checkpoint
from sparsert.checkpoint.describe import describe_file
from sparsert.cli import main
from sparsert.compress import magnitude_mask
from sparsert.errors import CheckpointError, InputError

Make = Callable[..., Path]
SAMPLES = Path(__file__).parent / "samples"


def weight(block: int, name: str) -> str:
    return f"model.layers.{block}.{name}.weight"


def test_reasons_for_running_dense(make_directory: Make) -> None:
    tensors = tiny_tensors()
    for name, tensor in tensors.items():
        if name.endswith("_proj.weight"):
            tensors[name] = tensor * magnitude_mask(tensor)
    tensors[weight(0, "mlp.up_proj")] = torch.randn(40, 24)
    transposed = torch.randn(40, 24)
    tensors[weight(1, "mlp.down_proj")] = (transposed * magnitude_mask(transposed)).t().contiguous()
    tensors[weight(2, "mlp.up_proj")] = torch.randn(40, 22)
    tensors[weight(3, "mlp.up_proj")] = tensors[weight(3, "mlp.up_proj")].double()
    nearly = torch.randn(80, 64)
    tensors[weight(4, "mlp.up_proj")] = nearly * magnitude_mask(nearly)
    tensors[weight(4, "mlp.up_proj")][7, 8:12] = 1
    half = tensors[weight(5, "mlp.up_proj")]
    half[:, :12] = 0
    half[:, 12:] = 1
    report = inspect_checkpoint(open_checkpoint(make_directory(tensors)))
    assert report.totals()["dense_linears"] == {
        weight(0, "mlp.up_proj"): "it was not pruned",
        weight(1, "mlp.down_proj"): "it is 2:4 along its outputs; it has to be along its inputs, so it was transposed "
        "when it was pruned",
        weight(2, "mlp.up_proj"): "its input width is no multiple of 4",
        weight(3, "mlp.up_proj"): "float64 is not packed, only bfloat16, float16 and float32",
        weight(4, "mlp.up_proj"): "it is 2:4 but for less than 1 % of its groups",
        weight(5, "mlp.up_proj"): "it was pruned, but not 2:4",
    }
    assert sum(tensor.runs_sparse for tensor in report.tensors) == 4 * BLOCKS - 6
    text = report.to_text()
    assert f"1 linear weights would run dense: it was not pruned (first {weight(0, 'mlp.up_proj')})" in text
    assert "2 more would run dense for other reasons; --json lists them" in text


def test_formats_are_named(make_directory: Make, tmp_path: Path) -> None:
    tensors = {
        name: t * magnitude_mask(t) if name.endswith("_proj.weight") else t for name, t in tiny_tensors().items()
    }
    dense = open_checkpoint(make_directory(tensors, layout="bin-sharded"))
    assert inspect_checkpoint(dense).format == "dense tensors; 2 pickle files"
    convert_checkpoint(dense, tmp_path / "ours")
    report = inspect_checkpoint(open_checkpoint(tmp_path / "ours"))
    assert report.format == "sparsert version 1 (sparse-24-bitmask): 32 packed weights; 1 safetensors file"
    assert "format: sparsert version 1" in report.to_text()
    packed = next(tensor for tensor in report.tensors if tensor.name == weight(0, "mlp.up_proj"))
    assert (packed.storage, packed.pattern, packed.nbytes) == ("sparse-24-bitmask", "2:4", 40 * 24 + 40 * 3 + 16)
    convert_checkpoint(dense, tmp_path / "theirs", target="sparse-24-bitmask")
    theirs = inspect_checkpoint(open_checkpoint(tmp_path / "theirs"))
    assert theirs.format == "32 weights as sparse-24-bitmask; 1 safetensors file"
    marlin = make_directory(load_file(SAMPLES / "marlin24-int4-group.safetensors"), tiny_config())
    assert inspect_checkpoint(open_checkpoint(marlin)).format == "1 weights as marlin-24; 1 safetensors file"
    quantized = make_directory(config=tiny_config(quantization_config={"quant_method": "gptq"}))
    report = inspect_checkpoint(open_checkpoint(quantized))
    assert report.format.endswith("; its weights are quantized (method 'gptq')")
    json.dumps(report.to_dict())


def test_files_that_are_no_directories(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    masks, order, weights, gguf = (tmp_path / name for name in ("m.npz", "order.csv", "model.safetensors", "m.gguf"))
    np.savez(masks, **{f"model.layers.{block}.mlp.up_proj.weight.mask": np.zeros(3, np.uint8) for block in (0, 4)})
    order.write_text("24,26,25\n")
    save_file({"x": torch.zeros(2)}, weights)
    gguf.write_bytes(b"GGUF\x03\0\0\0")
    assert describe_file(masks)["masks"] == describe_file(masks)["blocks"] == 2
    assert describe_file(order)["blocks"] == [24, 26, 25]
    assert describe_file(weights)["tensors"] == 1
    raw = tmp_path / "mask.pt"
    torch.save({"model.layers.0.mlp.up_proj.weight.mask": torch.ones(4, 4)}, raw)
    assert describe_file(raw)["summary"].startswith("raw masks for 1 weights in 1 blocks")
    assert main(["inspect", str(masks)]) == 0
    assert "masks in bits for 2 weights in 2 blocks" in capsys.readouterr().out
    assert main(["inspect", str(gguf), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kind"] == "gguf"
    other = tmp_path / "notes.txt"
    other.write_text("hello")
    with pytest.raises(CheckpointError, match=r"is no mask file \(\.npz, \.pt\), block order"):
        describe_file(other)
    order.write_text("1,2,x")
    with pytest.raises(InputError, match="'x' is no block number"):
        describe_file(order)
    order.write_text("1," * 60_000)
    with pytest.raises(InputError, match="has 120000 bytes; an order file is one short line"):
        describe_file(order)
    order.write_text("9" * 5000)
    with pytest.raises(InputError, match="is no block number"):
        describe_file(order)


def test_a_gguf_file_becomes_a_directory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def convert(gguf: Path, output: Path, *, progress: bool) -> None:
        (output / "config.json").write_text("{}")

    monkeypatch.setattr("sparsert.checkpoint.gguf_file.convert_gguf", convert)
    gguf = tmp_path / "m.gguf"
    gguf.write_bytes(b"GGUF")
    assert main(["convert", str(gguf), str(tmp_path / "out")]) == 2
    assert "a GGUF model is dense; convert it --to dense" in capsys.readouterr().err
    assert main(["convert", str(gguf), str(tmp_path / "out"), "--to", "dense"]) == 0
    assert (tmp_path / "out" / "config.json").is_file() and "out: dense, from" in capsys.readouterr().out
