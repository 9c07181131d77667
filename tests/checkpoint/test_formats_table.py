"""docs/formats.md names for every reader its test and its sample; this holds the table to what there is."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]


def test_every_row_names_a_test_that_exists() -> None:
    text = (TESTS.parent / "docs" / "formats.md").read_text()
    table = [line for line in text.splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table[1:]]
    assert len(rows) >= 14 and all(len(row) == 5 and all(row) for row in rows)
    for name, *_, tests, sample in rows:
        named = re.findall(r"`([\w/]+\.py)`", tests)
        assert named, f"{name}: no test"
        assert all((TESTS / test).is_file() for test in named), f"{name}: {named}"
        assert sample in ("built", "0.9.4"), name
    for test in re.findall(r"`(\w+/test_\w+\.py)`", text):
        assert (TESTS / test).is_file(), test
