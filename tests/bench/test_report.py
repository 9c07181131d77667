"""The report: one page, nothing from outside, every number of the records, charts that a browser shows."""

from __future__ import annotations

import html.parser
import itertools
import json
import math
import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import report_samples as samples

from sparsert.bench.records import write_record
from sparsert.bench.report import charts, style
from sparsert.bench.report.headline import cards
from sparsert.bench.report.numbers import flatten, is_number
from sparsert.bench.report.page import build_page
from sparsert.bench.report.rows import by_gpu
from sparsert.bench.report.svg import draw
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


def _linear(colour: str) -> np.ndarray:
    """A colour as linear sRGB."""
    parts = np.array([int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)])
    return np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)


_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
_THEMES = [(style.LIGHT, style._LIGHT_PAGE), (style.DARK, style._DARK_PAGE)]


@pytest.mark.parametrize(("colours", "page"), _THEMES)
def test_every_colour_can_be_read(colours: tuple[str, ...], page: tuple[str, ...]) -> None:
    """WCAG 2.1 contrast of at least 4.5 to 1 on the page and on its cards."""
    _, behind, card, text, soft, _, good, bad = page
    for colour in (*colours, text, soft, good, bad):
        for ground in (behind, card):
            low, high = sorted(float(_XYZ[1] @ _linear(shade)) for shade in (colour, ground))
            assert (high + 0.05) / (low + 0.05) >= 4.5, (colour, ground)


@pytest.mark.parametrize("colours", [style.LIGHT, style.DARK])
def test_colours_stay_apart_without_red_green_or_blue_cones(colours: tuple[str, ...]) -> None:
    """Machado et al. 2009, severity 1, as CIE76 differences."""
    seen_by = (
        np.eye(3),
        np.array([[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]),
        np.array([[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]),
        np.array([[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]),
    )

    def lab(linear: np.ndarray) -> np.ndarray:
        xyz = _XYZ @ np.clip(linear, 0, 1) / np.array([0.9505, 1, 1.089])
        f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
        return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])

    for seen in seen_by:
        shades = [lab(seen @ _linear(colour)) for colour in colours]
        assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(shades, 2)) >= 18


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


def test_wrong_results_are_not_drawn_and_what_was_not_compared_is_hollow() -> None:
    rows = samples.kernels(models=("llama-2-7b",))["results"]
    ours = [row for row in rows if row["contender"] == "ours" and row["layer"] == "down"]
    ours[0]["correct"], ours[1]["correct"] = False, None
    plots = charts.layer_speedups(rows, charts.speedup_axis(rows, "speedup"), "gpu")
    down = next(plot for plot in plots if plot.title == "down")
    points = next(series for series in down.series if series.name == "ours").points
    assert len(points) == len(ours) - 1 and [point.checked for point in points] == [False] + [True] * (len(ours) - 2)
    assert "result not checked" in points[0].text and 'class="mark s1 open"' in draw(down)
    assert not any("speed-up" in series.name or series.name == "dense" for series in down.series)


def test_roofline_puts_a_smaller_weight_to_the_right_and_everything_under_the_roofs() -> None:
    rows = [row for row in samples.kernels()["results"] if row["model"] == "llama-3.1-8b" and row["batch"] == 1]
    plot = charts.roofline(rows, samples.READ_ROOF, samples.DENSE_RATE, "llama-3.1-8b", "gpu")
    assert plot is not None
    by_name = {series.name: series.points for series in plot.series}
    assert by_name["ours"][-1].x / by_name["dense"][-1].x == pytest.approx(16 / 9, rel=0.01)
    for points in by_name.values():
        assert all(point.y * 1e12 <= samples.READ_ROOF * point.x for point in points)
    (low, high), (ridge, rate) = plot.guides[0].points
    assert high * 1e12 == pytest.approx(samples.READ_ROOF * low) and ridge == samples.DENSE_RATE / samples.READ_ROOF
    assert rate == 760


def test_the_four_corners_stand_at_their_weights_above_the_floor() -> None:
    rows = samples.latency(models=("llama-2-7b",))["results"]
    small, large = charts.corner_planes(rows, samples.READ_ROOF, "gpu")
    assert "batch 1," in small.subtitle and "batch 16," in large.subtitle
    assert [series.name for series in small.series] == ["dense", "2:4", "removed", "2:4 + removed"]
    (x0, y0), (x1, y1) = small.guides[0].points
    assert (x0, y0) == (0, 0) and y1 / x1 == pytest.approx(1e12 / samples.READ_ROOF)  # ms for each GB
    for series in small.series:
        (point,) = series.points
        assert point.tail is not None and point.tail > point.x and point.y > point.x * y1 / x1


def test_cards_sum_up_and_warn() -> None:
    record = samples.kernels()
    (gpu,) = by_gpu([record, samples.latency()])
    found = {card.about: card for card in cards(gpu)}
    gains = [row["speedup"] for row in record["results"] if row["contender"] == "ours" and row["batch"] == 1]
    card = found["Linear layers over dense, batch 1"]
    assert card.figure == f"{math.prod(gains) ** (1 / len(gains)):.2f}×" and card.good
    assert card.words[1].startswith("28672 × 4096: "), "the largest layer, not the best"
    assert found["Largest batch at which no layer is slower"].figure == "64"
    assert "fastest peer: vllm, 6.54 ms a token" in found["llama-3.1-8b, 2:4"].words

    next(row for row in record["results"] if row["contender"] == "ours")["correct"] = False
    (gpu,) = by_gpu([record])
    (only,) = cards(gpu)
    assert only.figure == "1 wrong" and only.good is False


def test_a_speedup_that_was_not_checked_gets_no_card() -> None:
    record = samples.kernels()
    for row in record["results"]:
        row["correct"] = None
    (gpu,) = by_gpu([record])
    assert not cards(gpu)


def test_of_a_row_measured_twice_the_newer_is_shown() -> None:
    older = samples.kernels(created="2026-01-01T00:00:00+00:00")
    newer = samples.kernels(created="2026-02-01T00:00:00+00:00")
    for row in newer["results"]:
        row["kernel"] = "newer"
    for records in ([older, newer], [newer, older]):
        (gpu,) = by_gpu(records)
        assert len(gpu.rows("kernels")) == len(older["results"])
        assert all(row["kernel"] == "newer" for row in gpu.rows("kernels"))


def test_what_was_only_predicted_is_hollow() -> None:
    batch, output = charts.largest_that_fit(samples.fit()["results"], "gpu")
    assert (batch.title, output.title) == ("Largest batch, texts", "Longest output, tokens")
    assert [piece.checked for piece in batch.bars[0].segments] == [True, True, True, False]
    assert [piece.text for piece in batch.bars[0].segments] == ["210", "380", "410", "576"]
    assert draw(batch).count(" open") == 1


def test_a_step_says_its_kernels_and_largest_gap_once() -> None:
    text = re.sub(r"<[^>]+>", "", build_page([samples.profile()]).html)
    assert text.count("llama-3.1-8b, 2:4, batch 1: 165 kernels a step, largest gap between two 1.2 µs.") == 1
    assert text.count("largest gap between two") == 2
    older = samples.profile()
    for row in older["results"]:
        del row["kernels"], row["largest_gap_us"], row["profiled_us"]
    assert "largest gap between two" not in build_page([older]).html


def test_figures_have_names_of_their_own() -> None:
    page = build_page([samples.profile(), samples.profile(), samples.profile(), samples.fit()])
    slugs = [figure.slug for figure in page.figures]
    assert len(slugs) == 5 and len(set(slugs)) == 5
    assert all(f'id="{slug}"' in page.html for slug in slugs)


def test_missing_kinds_are_said_with_the_command_that_measures_them() -> None:
    page = build_page([samples.profile()]).html
    assert "Not in this report" in page and "sparsert bench kernels --output FILE" in page
    assert "sparsert bench profile --output FILE" not in page
    bare = build_page([samples.kernels(roofs={"read_bytes_per_s": 3.07e12, "dense_flop_per_s": None})]).html
    assert "No roofline: the record lacks the dense rate." in bare


def _dom(path: Path, folder: Path) -> str:
    """The page as Chromium holds it once it is loaded."""
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
    options += [
        "--disable-background-networking",
        "--disable-component-update",
        f"--user-data-dir={folder / 'profile'}",
    ]
    command = [str(CHROMIUM), *options, "--dump-dom", path.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_nothing_sticks_out_on_a_phone(tmp_path: Path) -> None:
    h200 = samples.kernels(machine=samples.record("kernels", gpu="NVIDIA H200")["machine"])
    page = build_page([*samples.everything(), h200]).html
    # a window cannot be as narrow as a phone, the page in it can
    measure = "<script>document.title = 'wide ' + document.body.scrollWidth</script></body>"
    path = tmp_path / "phone.html"
    path.write_text(page.replace("<body>", '<body style="width:375px">').replace("</body>", measure))
    assert "<title>wide 375</title>" in _dom(path, tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_a_browser_shows_the_charts(tmp_path: Path) -> None:
    page = build_page(samples.everything())
    path = tmp_path / "report.html"
    path.write_text(page.html)
    shown = _dom(path, tmp_path)
    assert len(_svgs(shown)) == len(_svgs(page.html))
    for figure in page.figures:
        assert figure.title in shown
