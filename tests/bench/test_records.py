"""The record format: what is written is read back, and what is damaged is refused by name."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sparsert.bench import records
from sparsert.bench.records import (
    MACHINE_KEYS,
    ROW_KEYS,
    machine_facts,
    machine_slug,
    new_record,
    read_record,
    source_commit,
    validate_record,
    write_csv,
    write_record,
)
from sparsert.errors import InputError


def kernel_row(**changes: Any) -> dict[str, Any]:
    row = dict.fromkeys(ROW_KEYS["kernels"]) | {
        "model": "tiny",
        "layer": "q, o",
        "out_features": 64,
        "in_features": 64,
        "batch": 1,
        "dtype": "float32",
        "contender": "ours",
        "time_us": {"p20": 1.0, "median": 2.0, "p80": 3.0},
        "speedup": 1.5,
        "correct": True,
    }
    return row | changes


def test_a_record_comes_back_as_it_was_written(tmp_path: Path) -> None:
    record = new_record("kernels", {"batch": [1, 2]}, device="cpu")
    record["results"] = [kernel_row(), kernel_row(contender="cusparselt", time_us=None, reason="no GPU")]
    record["skipped"].append({"peer": "cusparselt", "reason": "no GPU"})
    path = write_record(record, tmp_path / "new" / "folder" / "record.json")
    assert read_record(path) == record
    assert set(record["machine"]) == set(MACHINE_KEYS)
    assert record["machine"]["gpu"] is None and record["machine"]["torch"]
    assert record["schema"] == 1 and record["created"].endswith("+00:00")


def test_numbers_that_are_not_finite_become_null(tmp_path: Path) -> None:
    record = new_record("kernels", {}, device="cpu", roofs={"read_bytes_per_s": 1e9, "dense_flop_per_s": float("inf")})
    record["results"] = [kernel_row(error=float("nan"), extra=(1, Path("x")))]
    path = write_record(record, tmp_path / "record.json")
    assert "NaN" not in path.read_text() and "Infinity" not in path.read_text()
    again = read_record(path)
    assert again["results"][0]["error"] is None and again["results"][0]["extra"] == [1, "x"]
    assert again["roofs"] == {"read_bytes_per_s": 1e9, "dense_flop_per_s": None}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda r: r.pop("schema"), "not a sparsert benchmark record"),
        (lambda r: r.update(schema=99), "schema 99, this version reads 1; measure again"),
        (lambda r: r.pop("machine"), "key 'machine' is missing"),
        (lambda r: r.update(results={}), "'results' holds a dict"),
        (lambda r: r.update(kind="speed"), "kind 'speed' is unknown; known are kernels, latency"),
        (lambda r: r["machine"].pop("commit"), "'machine' lacks commit"),
        (lambda r: r["roofs"].pop("dense_flop_per_s"), "'roofs' lacks dense_flop_per_s"),
        (lambda r: r["results"].append({"model": "tiny"}), r"results\[1\] of kind kernels lacks layer, out_features"),
        (lambda r: r["results"].append(3), r"results\[1\] is a int"),
        (lambda r: r["skipped"].append({"peer": "hf"}), r"skipped\[0\] must be an object"),
    ],
)
def test_damage_is_named(tmp_path: Path, damage: Any, message: str) -> None:
    record = new_record("kernels", {}, device="cpu")
    record["results"] = [kernel_row()]
    validate_record(record)
    damage(record)
    path = tmp_path / "damaged.json"
    path.write_text(json.dumps(record))
    with pytest.raises(InputError, match=message) as caught:
        read_record(path)
    assert str(path) in str(caught.value)


def test_files_that_are_no_records(tmp_path: Path) -> None:
    (tmp_path / "text.json").write_text("{")
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(InputError, match="this is not JSON"):
        read_record(tmp_path / "text.json")
    with pytest.raises(InputError, match="not a sparsert benchmark record"):
        read_record(tmp_path / "list.json")
    with pytest.raises(InputError, match="cannot be read"):
        read_record(tmp_path / "absent.json")
    record = new_record("kernels", {}, device="cpu")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        write_record(record, tmp_path / "file" / "record.json")
    with pytest.raises(InputError, match="cannot be written"):
        write_csv(record, tmp_path)
    with pytest.raises(InputError, match="record kind 'speed': choose one of kernels"):
        new_record("speed", {})


def test_csv_has_a_line_a_row_and_a_column_a_part(tmp_path: Path) -> None:
    record = new_record("kernels", {}, device="cpu")
    record["results"] = [kernel_row(search={"tried": 3}), kernel_row(time_us=None, reason='says "no", twice', tags=[1])]
    with write_csv(record, tmp_path / "rows.csv").open(newline="") as file:
        first, second = csv.DictReader(file)
    assert first["time_us.median"] == "2.0" and first["search.tried"] == "3" and first["gpu"] == ""
    assert second["time_us.median"] == "" and second["reason"] == 'says "no", twice' and second["tags"] == "[1]"
    assert "time_us" not in first and first["kind"] == "kernels" and first["created"] == record["created"]


def test_csv_of_a_run_without_rows(tmp_path: Path) -> None:
    path = write_csv(new_record("fit", {}, device="cpu"), tmp_path / "rows.csv")
    assert path.read_text() == "created,kind,gpu,commit\n"


def test_commit_comes_from_the_tree_or_from_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SPARSERT_COMMIT", "abc123")
    assert machine_facts("cpu")["commit"] == "abc123"
    monkeypatch.delenv("SPARSERT_COMMIT")
    monkeypatch.setattr(records, "__file__", str(tmp_path / "site" / "sparsert" / "bench" / "records.py"))
    repository = tmp_path / "somebody-elses"
    repository.mkdir()
    subprocess.run(["git", "init", "-q", str(repository)], check=True)
    monkeypatch.chdir(repository)
    assert source_commit() is None, "a repository that is not ours says nothing about our code"


def test_driver_facts_are_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        uuid = "1234"

    asked: list[tuple[str, ...]] = []

    def answer(*command: str) -> str:
        asked.append(command)
        return "575.57, 1980, 2619, 1980, 2619, 700.00, [N/A]"

    monkeypatch.setattr(records, "_tool", answer)
    facts = records._driver_facts(Properties(), 0)
    assert asked[0][:3] == ("nvidia-smi", "-i", "GPU-1234")
    assert facts["driver"] == "575.57" and facts["temperature"] is None
    assert facts["clocks"] == {"sm": 1980, "memory": 2619, "sm_max": 1980, "memory_max": 2619, "power_limit_w": 700}
    monkeypatch.setattr(records, "_tool", lambda *command: None)
    assert records._driver_facts(Properties(), 0) == {}


def test_slug() -> None:
    assert machine_slug({"gpu": "NVIDIA H200"}) == "nvidia-h200"
    assert machine_slug({"gpu": None}) == "cpu"


def test_reading_needs_no_torch(tmp_path: Path) -> None:
    path = write_record(new_record("kernels", {}, device="cpu"), tmp_path / "record.json")
    code = (
        "import sys; from sparsert.bench.records import read_record; import sparsert.bench.options; "
        f"read_record({str(path)!r}); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
