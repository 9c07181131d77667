"""The records that stand in the repository can be read, compared with and drawn."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparsert.bench.check import ratios_of
from sparsert.bench.records import machine_slug, read_record
from sparsert.bench.report.page import build_page

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
RECORDS = sorted(RESULTS.glob("*/*.json"))


def test_there_are_records() -> None:
    assert RECORDS


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.name)
def test_record(path: Path) -> None:
    record = read_record(path)
    assert machine_slug(record["machine"]) == path.parent.name
    assert ratios_of(record, path.name)
    assert all(row["correct"] for row in record["results"] if row["speedup"] is not None)
    assert build_page([record]).figures


def test_readme_quotes_the_record() -> None:
    """The bold ratios of README's table are those of the record that it links to."""
    readme = (RESULTS.parents[1] / "README.md").read_text()
    (path,) = [path for path in RECORDS if path.name in readme]
    rows = [row for row in read_record(path)["results"] if row["contender"] == "ours"]
    assert f"{min(row['speedup'] for row in rows if row['batch'] <= 16):.2f}x up to batch 16" in readme
    assert min(row["speedup"] for row in rows) >= 1
    for row in rows:
        if row["batch"] in (1, 4, 8, 16, 32, 64):
            assert f"**{row['speedup']:.2f}x** {row['time_us']['median']:.1f} us" in readme
