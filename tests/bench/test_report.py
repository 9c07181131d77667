"""The report: one page, nothing from outside, every number of the records, charts that a browser shows."""

from __future__ import annotations

import html.parser
import json
import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
import report_samples as samples

from sparsert.bench.records import write_record
from sparsert.bench.report.numbers import flatten, is_number
from sparsert.bench.report.page import build_page
from sparsert.cli import main

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class _Reader(html.parser.HTMLParser):
    """Collects tags, attributes that refer to something, and the exact numbers of the page."""

    _VOID = frozenset({"meta", "link", "br", "hr", "img", "input"})

    def __init__(self) -> None:
        super().__init__()
        self.references: list[str] = []
        self.numbers: set[float] = set()
        self.tags: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in self._VOID:
            self.open.append(tag)
        for name, value in attributes:
            if name in ("src", "href", "action", "data", "poster", "srcset"):
                self.references.append(value or "")
            if tag == "data" and name == "value":
                self.numbers.add(float(value or "nan"))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()


def _read(page: str) -> _Reader:
    reader = _Reader()
    reader.feed(page)
    assert not reader.open
    return reader


def _svgs(page: str) -> list[str]:
    return re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)


def test_nothing_comes_from_outside() -> None:
    page = build_page(samples.everything()).html
    reader = _read(page)
    assert all(reference.startswith("#") for reference in reader.references)
    assert not {"script", "link", "img", "iframe", "object"} & set(reader.tags)
    assert "url(" not in page and "@import" not in page
    assert 'name="viewport"' in page and "prefers-color-scheme:dark" in page


def test_every_number_of_the_records_is_there() -> None:
    records = samples.everything()
    numbers = _read(build_page(records).html).numbers
    checked = 0
    for record in records:
        for row in record["results"]:
            for path, value in flatten(row).items():
                if is_number(value):
                    assert float(value) in numbers, (record["kind"], path, value)
                    checked += 1
    assert checked > 5000


def test_charts_are_valid_and_say_what_they_show() -> None:
    page = build_page(samples.everything())
    drawings = _svgs(page.html)
    assert len(drawings) >= len(page.figures) > 10
    for drawing in drawings:
        root = ElementTree.fromstring(drawing)
        assert (root.get("role") == "img" and root.get("aria-label")) or root.get("aria-hidden") == "true"
        left, top, width, height = map(float, str(root.get("viewBox")).split())
        assert (left, top) == (0, 0) and width > 0 and height > 0
        assert "nan" not in drawing.lower() and "inf" not in re.sub(r"[a-z]*info[a-z]*", "", drawing.lower())


def test_each_kind_makes_a_page_of_its_own() -> None:
    for record in samples.everything():
        page = build_page([record])
        assert _read(page.html).tags.count("h1") == 1, record["kind"]
    assert not build_page([samples.check()]).figures


def test_gpus_stand_side_by_side() -> None:
    both = [samples.kernels(), samples.kernels(machine=samples.record("kernels", gpu="NVIDIA H200")["machine"])]
    page = build_page(both).html
    assert "NVIDIA H100 80GB HBM3" in page and "NVIDIA H200" in page


def test_skipped_peers_fallbacks_and_wrong_results_are_said() -> None:
    record = samples.kernels(models=("llama-2-7b",))
    wrong = next(row for row in record["results"] if row["contender"] == "ours")
    wrong |= {"correct": False, "speedup": None, "reason": "wrong: error 3.0e-01; not timed"}
    page = build_page([record, samples.latency()]).html
    for sentence in (
        "cuSPARSELt needs batches of 16 at least",
        "lm_head: dense, its rows are no multiple of 64",
        "its CUTLASS backend refuses compute capability 9.0",
        "wrong: error 3.0e-01; not timed",
    ):
        assert sentence in page


def test_text_of_records_is_escaped() -> None:
    record = samples.profile(notes=["<script>alert(1)</script>"])
    assert "script" not in _read(build_page([record]).html).tags


def test_cards_in_the_settings_read_as_sentences() -> None:
    cards = [{"model": "tiny", "corner": "2:4", "weight_bytes": 893184}]
    page = build_page([samples.latency(models=("llama-2-7b",), settings={"arch": "tiny", "cards": cards})]).html
    assert "model tiny, corner 2:4, weight_bytes 893184" in page and "{'model'" not in page


def test_empty_rows_do_not_break_it() -> None:
    record = samples.kernels(models=("llama-2-7b",))
    for row in record["results"]:
        row |= {"time_us": None, "gb_per_s": None, "tflop_per_s": None, "speedup": None, "reason": "no memory"}
    page = build_page([record])
    assert not any(figure.slug.startswith("speed") for figure in page.figures)
    assert "no memory" in page.html


def _written(tmp_path: Path, records: list[dict[str, Any]]) -> list[str]:
    paths = []
    for index, record in enumerate(records):
        path = tmp_path / f"{index}-{record['kind']}.json"
        write_record(record, path)
        paths.append(str(path))
    return paths


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = _written(tmp_path, [samples.kernels(), samples.latency(), samples.profile()])
    output = tmp_path / "deep" / "report.html"
    assert main(["bench", "report", *paths, "-o", str(output), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["records"] == 3 and facts["charts"] > 5 and output.read_text().startswith("<!DOCTYPE html>")


def test_command_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = _written(tmp_path, [samples.record("kernels")])
    (tmp_path / "bad.json").write_text("{")
    for arguments, message in (
        ([*paths], "none of the records holds a result"),
        ([str(tmp_path / "bad.json")], "bad.json"),
        ([str(tmp_path / "none.json")], "none.json"),
        ([*paths, "-o", str(tmp_path)], "is a directory"),
    ):
        assert main(["bench", "report", *arguments]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1 and "Traceback" not in error


def test_pngs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = _written(tmp_path, [samples.latency(models=("llama-2-7b",)), samples.profile()])
    arguments = ["bench", "report", *paths, "-o", str(tmp_path / "r.html"), "--png", str(tmp_path / "png")]
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        assert main(arguments) == 2
        assert "matplotlib" in capsys.readouterr().err
        return
    assert main(arguments) == 0
    pngs = list((tmp_path / "png").glob("*.png"))
    assert pngs and all(png.read_bytes().startswith(b"\x89PNG") for png in pngs)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_a_browser_shows_the_charts(tmp_path: Path) -> None:
    page = build_page(samples.everything())
    path = tmp_path / "report.html"
    path.write_text(page.html)
    common = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    common += ["--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}"]
    shown = subprocess.run(
        [str(CHROMIUM), *common, "--dump-dom", path.as_uri()], capture_output=True, text=True, timeout=120, check=True
    ).stdout
    assert len(_svgs(shown)) == len(_svgs(page.html))
    for figure in page.figures:
        assert figure.title in shown
