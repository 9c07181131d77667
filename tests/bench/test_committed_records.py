"""The records that stand in the repository can be read, compared with and drawn."""

from __future__ import annotations

import importlib.util
import re
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
    assert not any(re.search("/[^0-9]", word) for word in record["command"]), "no paths of a machine; 2048/128 is none"
    speedup = {"kernels": "speedup", "latency": "speedup_vs_dense"}.get(record["kind"])
    if speedup is not None:
        assert ratios_of(record, path.name)
        assert all(row["correct"] for row in record["results"] if row[speedup] is not None)
    assert build_page([record]).figures


def test_readme_quotes_the_record() -> None:
    """README's table and its two claims are those of the record that it links to."""
    spec = importlib.util.spec_from_file_location("readme_table", RESULTS.parent / "readme_table.py")
    assert spec is not None and spec.loader is not None
    readme_table = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(readme_table)
    readme = (RESULTS.parents[1] / "README.md").read_text()
    quoted = [read_record(path) for path in RECORDS if path.name in readme]
    for latency in (record for record in quoted if record["kind"] == "latency"):
        first_tokens = readme_table.is_of_first_tokens(latency)
        lines = readme_table.first_token_lines if first_tokens else readme_table.decode_lines
        assert "\n".join(lines(latency)) in readme
        latency["results"][0]["correct"] = False
        with pytest.raises(SystemExit, match="holds no checked row"):
            lines(latency)
    (record,) = [record for record in quoted if record["kind"] == "kernels"]
    assert "\n".join(readme_table.table_lines(record)) in readme
    assert "\n".join(readme_table.table_lines(record, readme_table.PROMPT_TOKENS, readme_table.prompt_cell)) in readme
    rows = [row for row in record["results"] if row["contender"] == "ours" and row["model"] in readme_table.MODELS]
    for most in (8, 16):
        assert f"{min(row['speedup'] for row in rows if row['batch'] <= most):.2f}x up to batch {most}" in readme
    assert f"{min(row['speedup'] for row in rows):.2f}x overall" in readme
    for row in record["results"]:
        row["speedup"] = None
    with pytest.raises(SystemExit, match="4096x4096, batch 1: the record holds no checked speed-up"):
        readme_table.table_lines(record)
