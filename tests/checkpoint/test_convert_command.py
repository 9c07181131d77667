"""`sparsert convert` and `sparsert prune --to`: what is printed, and what is refused."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_files import BLOCKS, tiny_tensors

from sparsert.checkpoint import open_checkpoint
from sparsert.cli import main
from sparsert.compress import magnitude_mask

Make = Callable[..., Path]


def pruned(make_directory: Make, *, dense: int = 0) -> Path:
    tensors = tiny_tensors()
    linears = [name for name in tensors if name.endswith("_proj.weight")]
    for name in linears[dense:]:
        tensors[name] = tensors[name] * magnitude_mask(tensors[name])
    return make_directory(tensors)


def test_there_and_back(make_directory: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = pruned(make_directory, dense=1)
    assert main(["convert", str(source), str(tmp_path / "packed")]) == 0
    output = capsys.readouterr()
    assert f"packed: sparsert, {4 * BLOCKS - 1} linear weights packed, 1 dense" in output.out
    assert "read back and compared" in output.out
    assert output.err == (
        "sparsert: note: not 2:4 and stored dense: 1, the first model.layers.0.self_attn.q_proj.weight\n"
    ), "no bar without a terminal"
    assert main(["convert", str(tmp_path / "packed"), str(tmp_path / "dense"), "--to", "dense", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["packed_linears"] == 0 and record["target"] == "dense" and record["output"].endswith("dense")
    first, last = open_checkpoint(source), open_checkpoint(tmp_path / "dense")
    assert all(torch.equal(first.read(name), last.read(name)) for name in first.names)


@pytest.mark.parametrize(
    ("target", "packed"), [("sparsert", 31), ("dense", 0), ("sparse-24-bitmask", 31), ("safetensors", 0)]
)
def test_every_target(
    make_directory: Make,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    target: str,
    packed: int,
) -> None:
    """Of the same pickle, with a bar where there is a terminal."""
    source = open_checkpoint(pruned(make_directory, dense=1))
    weights = {name: source.read(name).clone() for name in source.names}
    pickled = make_directory(weights, layout="bin")

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    assert main(["convert", str(pickled), str(tmp_path / "out"), "--to", target, "--json"]) == 0
    assert "writing: 100%" in terminal.getvalue()
    assert json.loads(capsys.readouterr().out)["packed_linears"] == packed
    copy = open_checkpoint(tmp_path / "out")
    assert copy.files == [tmp_path / "out" / "model.safetensors"] and copy.names == source.names
    assert sum(copy.storage(name) == "sparse-24-bitmask" for name in copy.names) == packed
    assert all(torch.equal(copy.read(name), weights[name]) for name in copy.names)


def test_refusals(make_directory: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = str(pruned(make_directory))
    assert main(["convert", source, source]) == 2
    assert "exists and is not an empty directory" in capsys.readouterr().err
    assert main(["convert", str(tmp_path / "absent"), str(tmp_path / "out")]) == 2
    assert "no such directory" in capsys.readouterr().err
    assert main(["convert", source, str(tmp_path / "out"), "--to", "gguf"]) == 2
    assert "invalid choice: 'gguf'" in capsys.readouterr().err
    assert main(["convert", str(make_directory()), str(tmp_path / "out")]) == 2
    assert "none of its 32 linear weights is 2:4" in capsys.readouterr().err


def test_prune_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tiny_llama import make_llama, save

    source = save(make_llama(num_hidden_layers=8), tmp_path / "base")
    options = ["prune", "--model", str(source), "--remove-blocks", "4", "--output"]
    assert main([*options, str(tmp_path / "packed"), "--to", "sparsert"]) == 0
    assert main([*options, str(tmp_path / "dense")]) == 0
    packed, dense = open_checkpoint(tmp_path / "packed"), open_checkpoint(tmp_path / "dense")
    assert packed.config["quantization_config"]["provenance"] == dense.config["sparsert"]
    assert packed.total_nbytes < dense.total_nbytes
    assert all(torch.equal(packed.read(name), dense.read(name)) for name in dense.names)
    capsys.readouterr()
