"""Numbers that survive being killed, and are taken by the same job only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sparsert.errors import CheckpointError, InputError
from sparsert.jobs.measurements import Measurements

IDENTITY: dict[str, Any] = {"options": {"model": "m", "seed": 0, "output": "x"}, "text_fingerprint": "abc"}


class Killed(BaseException):
    """Stands for the end of the process."""


def _measure(
    output: Path, keys: str, *, kill_at: str = "", resume: bool = False, identity: Any = IDENTITY
) -> list[str]:
    """Measure a number a key; return the keys that were computed."""
    computed = []
    with Measurements(output, identity, resume=resume) as measurements:
        for key in keys:
            if key == kill_at:
                raise Killed

            def compute(key: str = key) -> float:
                computed.append(key)
                return ord(key) / 7

            assert measurements.remember(key, compute) == ord(key) / 7
            assert measurements.remember(key, compute) == ord(key) / 7
    return computed


def test_a_killed_job_measures_nothing_twice(tmp_path: Path) -> None:
    output = tmp_path / "out"
    with pytest.raises(Killed):
        _measure(output, "abcdef", kill_at="d")
    assert _measure(output, "abcdef", resume=True) == ["d", "e", "f"]
    assert not (tmp_path / "out.measured").exists()
    assert _measure(output, "ab") == ["a", "b"]


def test_half_a_line_is_measured_again(tmp_path: Path) -> None:
    output = tmp_path / "out"
    with pytest.raises(Killed):
        _measure(output, "abc", kill_at="c")
    values = tmp_path / "out.measured" / "values.jsonl"
    values.write_text(values.read_text()[:-9])
    assert _measure(output, "abc", resume=True) == ["b", "c"]


def test_other_jobs_are_told_apart(tmp_path: Path) -> None:
    output = tmp_path / "out"
    with pytest.raises(Killed):
        _measure(output, "abc", kill_at="c")
    with pytest.raises(InputError, match="holds a job that has not ended; go on with --resume"):
        _measure(output, "abc")
    other = {**IDENTITY, "options": {**IDENTITY["options"], "seed": 1}}
    with pytest.raises(InputError, match="holds another job, which differs in seed"):
        _measure(output, "abc", resume=True, identity=other)
    free = {**IDENTITY, "options": {**IDENTITY["options"], "output": "elsewhere", "resume": True}}
    assert _measure(output, "abc", resume=True, identity=free) == ["c"]


def test_two_processes_do_not_share_a_job(tmp_path: Path) -> None:
    with (
        Measurements(tmp_path / "out", IDENTITY, resume=False),
        pytest.raises(InputError, match="another process is at work on it"),
        Measurements(tmp_path / "out", IDENTITY, resume=True),
    ):
        pass


def test_damage_and_places_that_cannot_be_written(tmp_path: Path) -> None:
    output = tmp_path / "out"
    with pytest.raises(Killed):
        _measure(output, "abc", kill_at="c")
    (tmp_path / "out.measured" / "run.json").write_text("{")
    with pytest.raises(CheckpointError, match="is damaged"):
        _measure(output, "abc", resume=True)
    with pytest.raises(CheckpointError, match="cannot be written"):
        _measure(tmp_path / "missing" / "out", "a")


def test_a_full_disk_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "out"

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    with (
        pytest.raises(CheckpointError, match="No space left on device"),
        Measurements(output, IDENTITY, resume=False) as m,
    ):
        m.remember("a", lambda: 1.5)
        monkeypatch.setattr("sparsert.jobs.measurements.os.fsync", full)
        m.remember("b", lambda: 2.5)
    monkeypatch.undo()
    kept = (tmp_path / "out.measured" / "values.jsonl").read_text().splitlines()
    assert json.loads(kept[0]) == {"key": "a", "value": 1.5}
    with Measurements(output, IDENTITY, resume=True) as measurements:
        assert measurements.remember("a", lambda: 99.0) == 1.5
