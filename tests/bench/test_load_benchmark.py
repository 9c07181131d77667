"""The scripts that write a random checkpoint and measure how it loads."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from sparsert.checkpoint import open_checkpoint
from sparsert.checkpoint.stored import BITMASK_24

SCRIPTS = Path(__file__).resolve().parents[2] / "benchmarks"


def run_script(name: str, *arguments: str) -> str:
    finished = subprocess.run(
        [sys.executable, str(SCRIPTS / name), *arguments], capture_output=True, text=True, check=False, timeout=120
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


@pytest.mark.parametrize("form", ["sparsert", "masks"])
def test_a_random_checkpoint_is_measured(tmp_path: Path, form: str) -> None:
    directory = tmp_path / "made"
    run_script("random_checkpoint.py", "tiny", str(directory), "--form", form)
    checkpoint = open_checkpoint(directory)
    packed = [name for name in checkpoint.names if checkpoint.storage(name) == BITMASK_24]
    assert bool(packed) == (form == "sparsert")
    masks = ["--masks", str(directory / "masks.npz")] if form == "masks" else []
    output = run_script("load_checkpoint.py", str(directory), "--device", "cpu", "--repeats", "2", *masks)
    record = json.loads(output.splitlines()[-1])
    assert record["checkpoint_bytes"] == checkpoint.total_nbytes and record["page_cache"] == "warm"
    assert record["tensors_compared"] == len(checkpoint.names) + len(packed)
    rows = {row["contender"]: row for row in record["results"]}
    assert {"stream", "load_model"} <= set(rows) and "load_file" not in rows
    for row in rows.values():
        assert row["gb_per_s"] == pytest.approx(checkpoint.total_nbytes / row["seconds"] / 1e9)
