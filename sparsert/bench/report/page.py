"""The report as one HTML page: sections, their charts with tables beside them, and what is missing.

The page fetches nothing and runs no script: charts are inline SVG, the theme follows the reader's
system, wide tables scroll in their own box. Records of several GPUs stand side by side in every
section where the screen is wide enough, below each other where it is not. A section whose kind of
record was not given is left out, and a sentence at the end says how to get it.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import Any

from sparsert.bench.report import charts, tables
from sparsert.bench.report.figures import Axis, Bars, Figure, Plot, Segment
from sparsert.bench.report.headline import cards
from sparsert.bench.report.machine import machine_block
from sparsert.bench.report.rows import Gpu, Row, by_gpu, distinct, matching, wrong
from sparsert.bench.report.style import stylesheet
from sparsert.bench.report.svg import draw, swatch

#: By kind of record: what is missing without it.
_MISSING = {
    "kernels": "the speed-up of the layers by batch, and the roofline",
    "latency": "the speed-up of whole models, and the latency-memory plane of the four corners",
    "profile": "the time inside a decode step by part",
    "fit": "what fits into a given memory",
}


@dataclass(frozen=True)
class Page:
    """A finished report: the document, and its figures for whoever wants them in another format."""

    html: str
    figures: tuple[Figure, ...]


class _Writer:
    """Collects the figures while the sections are written."""

    def __init__(self) -> None:
        self.figures: list[Figure] = []

    def figure(self, figure: Figure) -> str:
        taken = {known.slug for known in self.figures}
        if figure.slug in taken:  # e.g. two profiles of one model; a slug is an anchor and a file name
            free = next(count for count in itertools.count(2) if f"{figure.slug}-{count}" not in taken)
            figure = replace(figure, slug=f"{figure.slug}-{free}")
        self.figures.append(figure)
        legend = _legend(figure)
        return (
            f'<figure id="{figure.slug}"><figcaption>{escape(figure.title)}<span>{escape(figure.subtitle)}</span>'
            f"</figcaption>{legend}{draw(figure)}</figure>"
        )

    def grid(self, figures: Sequence[Figure], css: str = "charts") -> str:
        return f'<div class="{css}">{"".join(map(self.figure, figures))}</div>' if figures else ""

    def beside(self, figure: Figure | None, table: str, missing: str) -> str:
        if figure is None:
            return f'<p class="soft">{escape(missing)}</p>{table}' if missing else table
        return f'<div class="beside">{self.figure(figure)}{table}</div>'


def build_page(records: Sequence[Row]) -> Page:
    """The report of one or more records.

    Args:
        records: as :func:`sparsert.bench.records.read_record` returns them, of any kinds and GPUs.

    Returns:
        The page and its figures.
    """
    gpus = by_gpu(records)
    writer = _Writer()
    parts = [
        _section("linears", "Linear layers", _LINEARS, gpus, ("kernels",), _linears(writer, gpus)),
        _section("models", "Whole models", _MODELS, gpus, ("latency", "throughput"), _models(writer, gpus)),
        _section("step", "Inside a decode step", _STEP, gpus, ("profile",), _step(writer)),
        _section("fit", "What fits", _FIT, gpus, ("fit",), _fit(writer)),
        _section("check", "Against committed records", _CHECK, gpus, ("check",), lambda gpu: _check(gpu)),
    ]
    sections = [part for part in parts if part is not None]
    links = [(identifier, title) for identifier, title, _ in sections] + [("machine", "Machine and runs")]
    navigation = "".join(f'<a href="#{identifier}">{escape(title)}</a>' for identifier, title in links)
    names = " and ".join(gpu.name for gpu in gpus)
    days = sorted({str(record.get("created"))[:10] for record in records})
    commits = sorted({str(commit) for record in records if (commit := (record.get("machine") or {}).get("commit"))})
    count = f"{len(records)} record{'' if len(records) == 1 else 's'}"
    facts = [count, " to ".join(dict.fromkeys((days[0], days[-1]))), *(f"commit {commit}" for commit in commits)]
    body = "".join(text for _, _, text in sections)
    return Page(
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>sparsert on {escape(names)}</title><style>{stylesheet()}</style></head><body>"
        f'<div class="wrap"><header><h1>sparsert on {escape(names)}</h1>'
        f'<p class="soft">{escape(" · ".join(facts))}</p><nav aria-label="Sections">{navigation}</nav></header><main>'
        f"{_headlines(gpus)}{body}"
        f'<section class="part" id="machine"><h2>Machine and runs</h2>{_columns(gpus, machine_block)}</section>'
        f"{_left_out(records)}</main><footer>{_FOOTER}</footer></div></body></html>\n",
        tuple(writer.figures),
    )


_LINEARS = (
    "Time of one linear layer with its weight read from memory (never from cache), against the dense layer in the same "
    "run. Above the dashed line is faster than dense. Hollow markers: the result was not compared; wrong results are "
    "not drawn."
)
_MODELS = (
    "Decode of whole models. Speed-up and time per output token (TPOT, median) by batch; then the four corners dense, "
    "2:4, blocks removed, and both: from the marker, which stands at the weights, a whisker runs to the peak memory. "
    "No marker can be below the dashed line, the time to read the weights once at the measured bandwidth."
)
_STEP = "Where the time of one decode step goes; bars of one chart share their scale."
_FIT = (
    "The largest batch and the longest output that fit into a given memory. Filled bars were run within that memory, "
    "hollow ones are predicted from bytes."
)
_CHECK = "Each ratio to dense of the same run, as committed and as measured now."
_FOOTER = (
    "Speed-ups are ratios to dense of the same run on the same machine; absolute times move from machine to machine. "
    "Sizes are decimal (1 GB is 10<sup>9</sup> bytes). Every rounded number has all its digits in the page's source."
)


def _section(
    identifier: str, title: str, intro: str, gpus: Sequence[Gpu], kinds: Sequence[str], body: Callable[[Gpu], str]
) -> tuple[str, str, str] | None:
    having = [gpu for gpu in gpus if any(gpu.of(kind) for kind in kinds)]
    if not having:
        return None
    text = f'<section class="part" id="{identifier}"><h2>{escape(title)}</h2><p class="soft">{escape(intro)}</p>'
    return identifier, title, f"{text}{_columns(having, body, named=len(gpus) > 1)}</section>"


def _columns(gpus: Sequence[Gpu], body: Callable[[Gpu], str], *, named: bool | None = None) -> str:
    """The same content for each GPU, side by side."""
    named = len(gpus) > 1 if named is None else named
    inner = "".join(
        f'<div class="gpu">{f"<h3>{escape(gpu.name)}</h3>" if named else ""}{body(gpu)}</div>' for gpu in gpus
    )
    return f'<div class="gpus{" one" if len(gpus) == 1 else ""}">{inner}</div>'


def _headlines(gpus: Sequence[Gpu]) -> str:
    def body(gpu: Gpu) -> str:
        found = []
        for card in cards(gpu):
            mark = {True: '<span class="ok">✓ checked</span>', False: '<span class="no">✗ look here</span>'}
            note = mark[card.good] if card.good is not None else ""
            words = "".join(f"<small>{escape(line)}</small>" for line in card.words)
            found.append(
                f'<div class="card"><span>{escape(card.about)}</span><b>{escape(card.figure)}</b>{words}'
                f"<small>{note}</small></div>"
            )
        return f'<div class="cards">{"".join(found)}</div>' if found else ""

    text = _columns(gpus, body)
    return text if "card" in text else ""


def _linears(writer: _Writer, gpus: Sequence[Gpu]) -> Callable[[Gpu], str]:
    axis = charts.speedup_axis([row for gpu in gpus for row in gpu.rows("kernels")], "speedup")

    def body(gpu: Gpu) -> str:
        rows = gpu.rows("kernels")
        read, rate = gpu.roof("read_bytes_per_s", "kernels"), gpu.roof("dense_flop_per_s", "kernels")
        out = [_wrong_note(rows)]
        for (model,) in distinct(rows, "model"):
            of_model = matching(rows, model=model)
            plot = charts.roofline(of_model, read, rate, model, gpu.name) if read and rate else None
            lacking = [name for name, roof in (("the read bandwidth", read), ("the dense rate", rate)) if not roof]
            missing = f"No roofline: the record lacks {' and '.join(lacking) or 'GB/s and TFLOP/s of its layers'}."
            out.append(f"<h4>{escape(str(model))}</h4>")
            out.append(writer.grid(charts.layer_speedups(of_model, axis, gpu.name)))
            out.append(writer.beside(plot, tables.batch_table(of_model, model), missing))
            out.append(tables.kernel_table(of_model, model))
        out.append(tables.every_number(rows, "the linear layers"))
        return "".join(out)

    return body


def _models(writer: _Writer, gpus: Sequence[Gpu]) -> Callable[[Gpu], str]:
    everything = [row for gpu in gpus for kind in ("latency", "throughput") for row in gpu.rows(kind)]
    axis = charts.speedup_axis(everything, "speedup_vs_dense")

    def body(gpu: Gpu) -> str:
        latency, throughput = gpu.rows("latency"), gpu.rows("throughput")
        read = gpu.roof("read_bytes_per_s", "latency") or gpu.roof("read_bytes_per_s", "kernels")
        out = [_wrong_note([*latency, *throughput])]
        for (model,) in distinct([*latency, *throughput], "model"):
            of_model = matching(latency, model=model)
            out.append(f"<h4>{escape(str(model))}</h4>")
            if of_model:
                out.append(writer.grid(_model_figures(of_model, axis, read, gpu.name), "charts two"))
                out.append(tables.model_table(of_model, f"{model}: latency, median of the runs"))
            of_model = matching(throughput, model=model)
            if of_model:
                out.append(writer.grid(charts.model_speedups(of_model, axis, f"throughput {gpu.name}")))
                out.append(tables.model_table(of_model, f"{model}: throughput"))
            out.append(tables.checks([*matching(latency, model=model), *of_model]))
        out += [
            tables.every_number(rows, name) for rows, name in ((latency, "latency"), (throughput, "throughput")) if rows
        ]
        return "".join(out)

    return body


def _model_figures(rows: Sequence[Row], axis: Axis, read: float | None, device: str) -> list[Plot]:
    return [
        *charts.model_speedups(rows, axis, device),
        *charts.step_times(rows, device),
        *charts.corner_planes(rows, read, device),
    ]


def _step(writer: _Writer) -> Callable[[Gpu], str]:
    def body(gpu: Gpu) -> str:
        out = []
        for record in gpu.of("profile"):
            rows, settings = record.get("results") or [], record.get("settings") or {}
            bars = charts.step_parts(rows, settings, gpu.name)
            name_of = functools.partial(charts.step_name, settings=settings)
            table = tables.profile_table(rows, name_of)
            out.append(writer.beside(bars, table, "No chart: the record holds no times."))
            out.append(tables.kernels_of_steps(rows, name_of))
            out.append(tables.every_number(rows, "the decode step"))
        return "".join(out)

    return body


def _fit(writer: _Writer) -> Callable[[Gpu], str]:
    def body(gpu: Gpu) -> str:
        rows = gpu.rows("fit")
        figures = charts.largest_that_fit(rows, gpu.name)
        return writer.grid(figures) + tables.fit_table(rows) + tables.every_number(rows, "what fits")

    return body


def _check(gpu: Gpu) -> str:
    rows = gpu.rows("check")
    return tables.check_table(rows) + tables.every_number(rows, "the check")


def _wrong_note(rows: Sequence[Row]) -> str:
    count = wrong(rows)
    if not count:
        return ""
    results = "1 result was" if count == 1 else f"{count} results were"
    return f'<p><span class="no">✗ {results} wrong</span>: not drawn, struck out in the tables.</p>'


def _legend(figure: Figure) -> str:
    """Names and colours where the figure has no room to write them at its lines."""
    if isinstance(figure, Plot):
        entries = [(series.name, series.slot) for series in figure.series if not series.named]
        marker = True
    else:
        entries, marker = _pieces(figure), False
    items = "".join(f"<li>{swatch(slot, marker=marker)}{escape(name)}</li>" for name, slot in entries)
    return f'<ul class="legend">{items}</ul>' if items else ""


def _pieces(bars: Bars) -> list[tuple[str, int]]:
    pieces: list[Segment] = [segment for bar in bars.bars for segment in bar.segments]
    return list(dict.fromkeys((piece.name, piece.slot) for piece in pieces)) if bars.stacked else []


def _left_out(records: Sequence[Row]) -> str:
    """Which charts the records could not give, and the command that would."""
    kinds: set[Any] = {record.get("kind") for record in records}
    missing = [kind for kind in _MISSING if kind not in kinds]
    if not missing:
        return ""
    items = "".join(
        f"<li>{escape(_MISSING[kind])}: needs a record of <code>sparsert bench {kind} --output FILE</code></li>"
        for kind in missing
    )
    return f'<section class="part" id="missing"><h2>Not in this report</h2><ul class="plain">{items}</ul></section>'
