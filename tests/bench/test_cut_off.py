"""A signal in the middle of a run: what was measured is written, with a note, and the exit code names the signal."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from sparsert.bench import kernels
from sparsert.bench.cut_off import CutOff, keeping, signals_raise
from sparsert.bench.records import read_record
from sparsert.cli import main

TINY = [
    "bench",
    "kernels",
    "--device",
    "cpu",
    "--layers",
    "fused",
    "--batch",
    "1,2",
    "--repeats",
    "1",
    "--peers",
    "none",
]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_record_so_far_is_written(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines: list[str] = []
    real = kernels.table_line

    def table_line(*arguments: Any) -> str:
        lines.append(real(*arguments))
        if len(lines) == 3:
            os.kill(os.getpid(), number)
        return lines[-1]

    monkeypatch.setattr(kernels, "table_line", table_line)
    # a shell that starts the tests in the background has SIGINT ignored
    ignored = signal.signal(signal.SIGINT, signal.default_int_handler)
    before = signal.getsignal(signal.SIGTERM)
    path = tmp_path / "kernels.json"
    try:
        code = main([*TINY, "--output", str(path)])
    finally:
        signal.signal(signal.SIGINT, ignored)
    assert code == 128 + number
    record = read_record(path)
    assert len({(row["layer"], row["batch"]) for row in record["results"]}) == 3 < 4 * 2
    (note,) = [note for note in record["notes"] if "cut off" in note]
    assert number.name in note and f"after {len(record['results'])} rows" in note
    captured = capsys.readouterr()
    assert f"cut off by {number.name}" in captured.err and f"record: {path}" in captured.err
    assert signal.getsignal(signal.SIGTERM) is before


def test_an_error_is_not_taken_for_a_signal() -> None:
    record: dict[str, Any] = {"results": [], "notes": []}
    with pytest.raises(ValueError, match="it broke"), signals_raise(), keeping(record):
        raise ValueError("it broke")
    assert record["notes"] == []
    with pytest.raises(CutOff), keeping(record):
        raise KeyboardInterrupt
    assert len(record["notes"]) == 1
