"""``sparsert bench``: its commands, what they print and write, and what they refuse."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsert.bench import contenders, kernels, layers
from sparsert.bench.contenders import Dense
from sparsert.bench.options import check_outputs, parse_counts, parse_names, resolve_dtype
from sparsert.bench.records import read_record
from sparsert.cli import main
from sparsert.cli_bench import MEASUREMENTS
from sparsert.errors import InputError

TINY = [
    "bench",
    "kernels",
    "--device",
    "cpu",
    "--shapes",
    "tiny",
    "--layers",
    "fused",
    "--batch",
    "1,9",
    "--repeats",
    "3",
]


def test_help_lists_every_measurement_and_loads_none() -> None:
    code = "import sys; from sparsert.cli import main; main(['bench', '--help']); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"
    assert all(name in done.stdout for name in MEASUREMENTS)


@pytest.mark.parametrize("name", MEASUREMENTS)
def test_every_measurement_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", name, "--help"]) == 0
    printed = capsys.readouterr().out
    assert f"usage: sparsert bench {name}" in printed and "examples:" in printed
    if MEASUREMENTS[name].measures:
        for option in ("--device", "--dtype", "--seed", "--output", "--csv", "--json"):
            assert option in printed


def test_kernels_prints_a_table_and_writes_a_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record_path, csv_path = tmp_path / "kernels.json", tmp_path / "kernels.csv"
    assert main([*TINY, "--output", str(record_path), "--csv", str(csv_path), "--json"]) == 0
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert "plain read" in lines[0] and "TFLOP/s" in lines[0]
    assert lines[1].split()[:2] == ["layer", "batch"]
    layers_printed = [line for line in lines if line.startswith("tiny ")]
    assert len(layers_printed) == 4 * 2 and all("x" in line.split()[-5] for line in layers_printed)
    assert any(line.startswith("ours, every result checked: at least ") for line in lines)
    assert any(line.startswith("skipped: cusparselt: torch.sparse runs 2:4 weights on CUDA only") for line in lines)
    record = read_record(record_path)
    assert json.loads(lines[-1]) == record
    assert record["kind"] == "kernels" and len(record["results"]) == 4 * 2 * len(contenders.CONTENDERS)
    assert record["settings"]["contenders"] == list(contenders.CONTENDERS) and record["settings"]["batch"] == [1, 9]
    assert {entry["peer"] for entry in record["skipped"]} == {"ours-triton", "torch-sparse", "cusparselt", "cutlass"}
    ours = [row for row in record["results"] if row["contender"] == "ours"]
    assert all(row["correct"] and row["share_of_read"] > 0 and row["share_of_rate"] > 0 for row in ours)
    with csv_path.open(newline="") as file:
        assert [row["layer"] for row in csv.DictReader(file)] == [row["layer"] for row in record["results"]]
    assert f"record: {record_path}" in captured.err and f"table: {csv_path}" in captured.err


def test_peers_and_backends_can_be_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TINY, "--peers", "none", "--backends", "auto", "--batch", "2", "--json"]) == 0
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {row["contender"] for row in record["results"]} == {"dense", "ours"} and record["skipped"] == []


def test_layers_of_one_shape_are_measured_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TINY, "--layers", "all", "--batch", "1", "--peers", "none", "--json"]) == 0
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    ours = {row["layer"]: row for row in record["results"] if row["contender"] == "ours"}
    assert ours["gate, up"]["time_us"] == ours["qkv fused"]["time_us"], "both are 128 x 64"


def test_wrong_results_are_shown_as_wrong(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    class Wrong(Dense):
        def bind(self, x: torch.Tensor, is_correct: Any) -> contenders.Bound:
            bound = super().bind(x, is_correct)
            return contenders.Bound("wrong", bound.weights, lambda weight: bound.call(weight) + 1)

    monkeypatch.setattr(layers, "MAKERS", layers.MAKERS | {"torch-sparse": Wrong})
    assert main([*TINY, "--batch", "1", "--peers", "torch-sparse", "--backends", "auto"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(line.split()[-1] == "wrong" for line in lines if line.startswith("tiny "))
    assert any(line.startswith("wrong: torch-sparse on 64x64, batch 1: wrong: error") for line in lines)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--shapes", "gpt-4"], "--shapes gpt-4: gpt-4 is not known; choose of llama-2-7b, "),
        (["--shapes", "none"], "there is nothing to measure"),
        (["--batch", "0"], "--batch 0: give whole numbers from 1"),
        (["--batch", "1,x"], "--batch 1,x: give whole numbers"),
        (["--peers", "tensorrt"], "--peers tensorrt: tensorrt is not known; choose of dense, torch-sparse, cusparselt"),
        (["--backends", "magic"], "--backends magic: magic is not known"),
        (["--repeats", "0"], "--repeats 0: give a number from 1"),
        (["--device", "tpu0"], "device 'tpu0' is no device name; give cpu, cuda or cuda:N"),
        (["--device", "meta"], "device meta cannot be used; supported: cpu, cuda"),
        (["--output", "/dev/null/x/record.json"], "is no folder that can be written to"),
        (["--batches", "1"], "unrecognized arguments: --batches 1"),
    ],
)
def test_refusals(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TINY, *options]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1, "one sentence"
    assert not captured.out


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without a GPU")
def test_a_missing_gpu_is_one_clear_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "kernels", "--device", "cuda"]) == 2
    assert "device cuda: torch finds no CUDA GPU here" in capsys.readouterr().err


def test_output_is_checked_before_anything_is_measured(tmp_path: Path) -> None:
    class Options:
        output, csv = str(tmp_path), None

    with pytest.raises(InputError, match="this is a folder; give a file"):
        check_outputs(Options())  # type: ignore[arg-type]


def test_option_helpers() -> None:
    assert parse_names("all", ("a", "b"), "--x") == ["a", "b"] and parse_names("b,a,b", ("a", "b"), "--x") == ["b", "a"]
    with pytest.raises(InputError, match="--x ,: nothing is named; choose of a"):
        parse_names(",", ("a",), "--x")
    assert parse_counts("16, 1,16", "--batch") == [16, 1]
    cpu = torch.device("cpu")
    assert resolve_dtype(None, cpu) == torch.float32
    assert resolve_dtype(None, torch.device("cuda")) == torch.bfloat16
    with pytest.raises(InputError, match="--dtype int8: choose one of bfloat16, float16, float32"):
        resolve_dtype("int8", cpu)


def test_missing_kernels_are_recorded_as_fallbacks(monkeypatch: pytest.MonkeyPatch) -> None:
    from sparsert import ops

    def explain(*arguments: Any, **options: Any) -> ops.Choice:
        return ops.Choice("unpack", "unpacked", (("cpu", "unavailable: not built"), ("triton", "runs on cuda")))

    monkeypatch.setattr(ops, "explain", explain)
    record: dict[str, Any] = {"fallbacks": []}
    row = {"contender": "ours", "time_us": {"median": 1.0}, "out_features": 4, "in_features": 4, "batch": 1}
    kernels._note_fallbacks(record, [row, row], torch.device("cpu"), torch.float32)
    assert record["fallbacks"] == ["cpu was passed over for unpack: unavailable: not built"]


@pytest.mark.gpu
def test_kernels_on_a_gpu_against_every_peer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "kernels.json"
    options = ["--shapes", "smollm2-135m", "--layers", "fused", "--batch", "1,128", "--repeats", "3"]
    assert main(["bench", "kernels", *options, "--output", str(path)]) == 0
    record = read_record(path)
    assert record["machine"]["gpu"] and record["machine"]["driver"] and record["machine"]["clocks"]
    for row in record["results"]:
        assert row["speedup"] is None or row["correct"]
        assert (row["time_us"] is None) == (row["reason"] is not None)
        if row["contender"] in ("dense", "ours"):
            assert row["correct"] and row["time_us"]["median"] > 0
    assert "of read" in capsys.readouterr().out
