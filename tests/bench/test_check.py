"""``bench check``: ratios to the same run's dense, what counts as slower, and what there must be to compare with."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sparsert.bench import check, kernels
from sparsert.bench.check import Ratio, committed_ratios, compare, ratios_of
from sparsert.bench.records import new_record, write_record
from sparsert.bench.shapes import LinearShape, linear_shapes
from sparsert.cli import main
from sparsert.errors import InputError

MACHINE = {"gpu": None}


def kernels_record(speedups: dict[tuple[int, int, int, str], float | None], **changes: Any) -> dict[str, Any]:
    """A record with one row for each (out, in, batch, contender)."""
    record = new_record("kernels", {}, device="cpu")
    for (rows, columns, batch, contender), speedup in speedups.items():
        record["results"].append(
            {
                "model": "tiny",
                "layer": "o",
                "out_features": rows,
                "in_features": columns,
                "batch": batch,
                "dtype": "float32",
                "contender": contender,
                "kernel": "cpu",
                "time_us": None,
                "gb_per_s": None,
                "tflop_per_s": None,
                "share_of_read": None,
                "share_of_rate": None,
                "speedup": speedup,
                "error": 0.0,
                "dense_error": 0.0,
                "correct": None if speedup is None else True,
                "reason": "no kernel" if speedup is None else None,
            }
        )
    return record | changes


def test_ratios_of_what_is_ours() -> None:
    record = kernels_record({(64, 64, 1, "dense"): None, (64, 64, 1, "ours"): 1.5, (64, 64, 1, "cusparselt"): 0.7})
    ratios = ratios_of(record, "a.json")
    assert list(ratios) == [("kernels", 64, 64, 1, "float32", "ours")]
    assert ratios["kernels", 64, 64, 1, "float32", "ours"].value == 1.5
    latency = new_record("latency", {}, device="cpu")
    row = {"corner": "2:4", "model": "tiny", "dtype": "float32", "batch": 1, "input_len": 8, "output_len": 4}
    latency["results"] = [
        row | {"peer": "ours", "speedup_vs_dense": 1.4, "correct": True},
        row | {"peer": "hf", "speedup_vs_dense": 0.2, "correct": None},
    ]
    (key,) = ratios_of(latency, "b.json")
    assert key == ("latency", "tiny", "2:4", "float32", 1, 8, 4)
    assert ratios_of(new_record("profile", {}, device="cpu"), "c.json") == {}


def test_what_counts_as_slower() -> None:
    def ratio(value: float | None, correct: bool | None = True) -> Ratio:
        return Ratio("it", value, correct, "a.json")

    before = {("a",): ratio(2.0), ("b",): ratio(2.0), ("c",): ratio(2.0), ("d",): ratio(2.0), ("e",): ratio(2.0)}
    now = {("a",): ratio(1.91), ("b",): ratio(1.89), ("c",): ratio(3.0), ("d",): ratio(None), ("new",): ratio(1.0)}
    rows = compare(before, now, 5)
    assert [row["now"] for row in rows] == [None, 1.89, 1.91, 3.0], "the worst first, only what is in both"
    assert [row["slower"] for row in rows] == [True, True, False, False]
    assert [row["slower"] for row in compare(before, now, 3)] == [True, True, True, False]
    assert rows[3]["change"] == pytest.approx(0.5)


def test_the_newest_of_the_committed_counts(tmp_path: Path) -> None:
    key = (64, 64, 1, "ours")
    write_record(kernels_record({key: 1.5}, created="2026-02-01T00:00:00+00:00"), tmp_path / "cpu" / "a.json")
    write_record(kernels_record({key: 1.2}, created="2026-01-01T00:00:00+00:00"), tmp_path / "cpu" / "b.json")
    (ratio,) = committed_ratios(tmp_path, MACHINE).values()
    assert ratio.value == 1.5 and ratio.source == "a.json"
    with pytest.raises(InputError, match="no records of this machine to compare with; make one with `sparsert bench"):
        committed_ratios(tmp_path, {"gpu": "NVIDIA H100"})
    (tmp_path / "cpu" / "c.json").write_text("{}")
    with pytest.raises(InputError, match=r"c\.json: this is not a sparsert benchmark record"):
        committed_ratios(tmp_path, MACHINE)


@pytest.fixture
def fake_measurement(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Replaces measuring by numbers: ``factor(shape, batch, look)`` of 1.0 is as before."""
    state: dict[str, Any] = {"looks": [], "factor": lambda shape, batch, look: 1.0}

    def measure_shapes(
        record: dict[str, Any], shapes: list[LinearShape], batches: Any, *_: Any, **options: Any
    ) -> Iterator[Any]:
        look = options["seed"]
        state["looks"].append((look, len(shapes) * len(batches)))
        for shape in shapes:
            for batch in batches:
                speedup = 2.0 * state["factor"](shape, batch, look)
                rows = kernels_record({(shape.out_features, shape.in_features, batch, "ours"): speedup})["results"]
                record["results"] += rows
                yield rows

    monkeypatch.setattr(kernels, "measure_shapes", measure_shapes)
    return state


@pytest.fixture
def committed(tmp_path: Path) -> Path:
    ratios = {(s.out_features, s.in_features, b, "ours"): 2.0 for s in linear_shapes("tiny") for b in (1, 8, 16)}
    write_record(kernels_record(ratios), tmp_path / "cpu" / "kernels.json")
    return tmp_path


def run_check(committed: Path, *more: str) -> int:
    return main(["bench", "check", "--device", "cpu", "--results", str(committed), *more])


def test_nothing_slower(committed: Path, fake_measurement: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_check(committed, "--json") == 0
    lines = capsys.readouterr().out.splitlines()
    record = json.loads(lines[-1])
    assert record["kind"] == "check" and len(record["results"]) == 8, "four fused layers at two batches"
    assert lines[-2].startswith("none of 8 ratios fell by more than 5 %") and "kernels.json" in lines[-2]
    assert sum(count for _, count in fake_measurement["looks"]) == 8, "one look is enough"


def test_noise_gets_a_second_look(committed: Path, fake_measurement: dict[str, Any]) -> None:
    fake_measurement["factor"] = lambda shape, batch, look: 0.9 if look == 0 and batch == 8 else 1.0
    assert run_check(committed) == 0
    assert sum(count for look, count in fake_measurement["looks"] if look == 1) == 4, "only what seemed slower"


def test_slower_is_exit_code_3(
    committed: Path, fake_measurement: dict[str, Any], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    fake_measurement["factor"] = lambda shape, batch, look: 0.9 if shape.in_features == 128 else 1.0
    output = tmp_path / "check.json"
    assert run_check(committed, "--output", str(output)) == 3
    printed = capsys.readouterr().out
    assert "ours 64x128 float32, batch 1" in printed and "2.00x    1.80x   -10.0%  slower" in printed
    assert "2 of 8 ratios fell by more than 5 %" in printed
    assert {look for look, _ in fake_measurement["looks"]} == {0, 1, 2}
    assert sum(row["slower"] for row in json.loads(output.read_text())["results"]) == 2
    assert run_check(committed, "--tolerance", "11") == 0


def test_a_finished_record_can_be_compared(committed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ratios = {(64, 64, 1, "ours"): 1.0, (64, 64, 8, "ours"): None, (999, 64, 1, "ours"): 0.1}
    new = write_record(kernels_record(ratios), committed / "new.json")
    assert run_check(committed, "--record", str(new)) == 3
    printed = capsys.readouterr().out
    assert "no kernel" in printed and "-50.0%" in printed and "2 of 2 ratios" in printed
    unknown = write_record(kernels_record({(999, 64, 1, "ours"): 0.1}), committed / "unknown.json")
    assert run_check(committed, "--record", str(unknown)) == 2
    assert "none of its rows is in a committed record" in capsys.readouterr().err


def test_refusals(committed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_check(committed, "--tolerance", "100") == 2
    assert "give percent from 0 to below 100" in capsys.readouterr().err
    assert run_check(committed, "--dtype", "bfloat16") == 2
    assert "no committed record holds layers of tiny in bfloat16" in capsys.readouterr().err
    assert run_check(tmp_path / "empty") == 2
    assert "no records of this machine" in capsys.readouterr().err


def test_a_real_quick_set_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured for real on the CPU, where ratios are noise: with a tolerance of 99 % nothing is slower."""
    monkeypatch.setattr(check, "_REPEATS", 3)
    results = tmp_path / "cpu" / "kernels.json"
    measure = ["bench", "kernels", "--device", "cpu", "--batch", "1,8", "--peers", "none", "--repeats", "3"]
    assert main([*measure, "--output", str(results)]) == 0
    assert run_check(tmp_path, "--tolerance", "99") == 0
