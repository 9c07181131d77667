"""From the rows of records to figures: which points, which axes, which reference lines.

A row whose result was wrong is never drawn, since its time means nothing; one whose result was not
compared is drawn hollow. Figures of one sort share their speed-up axis, so that layers, models and
GPUs can be compared by eye.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from sparsert.bench.report.figures import (
    Axis,
    Bar,
    Bars,
    Guide,
    Plot,
    Point,
    Segment,
    Series,
    decade_axis,
    doubling_axis,
    linear_axis,
    slots,
    time_axis,
)
from sparsert.bench.report.numbers import digits, microseconds, milliseconds, number, percent, positive, size, times
from sparsert.bench.report.rows import (
    Row,
    batches,
    contender,
    distinct,
    full_name,
    in_order,
    lengths,
    matching,
    short_name,
    slug,
)


def speedup_axis(rows: Iterable[Row], key: str) -> Axis:
    """One speed-up axis for all rows, from zero, always with dense (1) well inside."""
    found = [number(row, key) for row in rows if row.get("correct") is not False]
    return linear_axis("speed-up over dense", [1.2, *(value for value in found if value is not None)])


def layer_speedups(rows: Sequence[Row], axis: Axis, device: str) -> list[Plot]:
    """A plot for each layer of each model: speed-up over dense by batch, a line for each contender."""
    plots = []
    for model, layer, out_features, in_features, dtype in distinct(
        rows, "model", "layer", "out_features", "in_features", "dtype"
    ):
        of_layer = matching(
            rows, model=model, layer=layer, out_features=out_features, in_features=in_features, dtype=dtype
        )
        series = _by_batch(of_layer, "speedup", _layer_point)
        if not series:
            continue
        plots.append(
            Plot(
                slug("speed-up", model, layer, dtype, device),
                f"{layer}",
                f"{model}, {out_features} × {in_features}",
                doubling_axis("batch", batches(of_layer)),
                axis,
                series,
                (_dense_line(batches(of_layer)),),
            )
        )
    return plots


def model_speedups(rows: Sequence[Row], axis: Axis, device: str) -> list[Plot]:
    """A plot for each model and pair of lengths: speed-up over our dense engine by batch."""
    return _by_model(rows, "speed-up", "speedup_vs_dense", lambda of_model: axis, device, dense_line=True)


def step_times(rows: Sequence[Row], device: str) -> list[Plot]:
    """A plot for each model and pair of lengths: TPOT by batch, dense and peers included."""
    return _by_model(
        rows,
        "tpot",
        "tpot_ms.p50",
        lambda of_model: time_axis("ms per token (TPOT)", _numbers(of_model, "tpot_ms.p50")),
        device,
        dense_line=False,
    )


def roofline(rows: Sequence[Row], read: float, rate: float, model: Any, device: str) -> Plot | None:
    """Dense-equivalent TFLOP/s over FLOP per byte read, under the two roofs measured in the same run.

    A layer's FLOP count is that of the dense layer for everyone, so a 2:4 weight moves a point to
    the right: fewer bytes for the same work.
    """
    found: dict[str, list[Point]] = {}
    for row in rows:
        gigabytes, teraflops = positive(row, "gb_per_s"), positive(row, "tflop_per_s")
        if gigabytes is None or teraflops is None or row.get("correct") is False:
            continue
        intensity = teraflops * 1e12 / (gigabytes * 1e9)
        words = (
            f"{contender(row)}, {row.get('layer')}, batch {row.get('batch')}: {digits(intensity)} FLOP/byte, "
            f"{digits(teraflops)} TFLOP/s, {digits(gigabytes)} GB/s; {_check(row)}"
        )
        found.setdefault(contender(row), []).append(Point(intensity, teraflops, words, _counts_as_checked(row)))
    points = [point for group in found.values() for point in group]
    if not points:
        return None
    ridge = rate / read
    x = decade_axis("FLOP per byte read", [*(point.x for point in points), ridge])
    y = decade_axis("TFLOP/s", [*(point.y for point in points), rate / 1e12])
    # the slanted roof starts where it enters the plot, at the left or at the bottom
    start = max(x.low, y.low * 1e12 / read)
    guides = (
        Guide(f"read {digits(read / 1e12)} TB/s", ((start, start * read / 1e12), (ridge, rate / 1e12)), at=0.5),
        Guide(f"dense {digits(rate / 1e12)} TFLOP/s", ((ridge, rate / 1e12), (x.high, rate / 1e12)), at=0.0),
    )
    colours = slots(found)
    series = tuple(
        Series(name, colours[name], tuple(sorted(found[name], key=lambda point: point.x)), joined=False, named=False)
        for name in in_order(found)
    )
    return Plot(slug("roofline", model, device), "Roofline", f"{model}, all layers and batches", x, y, series, guides)


def corner_planes(rows: Sequence[Row], read: float | None, device: str) -> list[Plot]:
    """For each model the four corners: TPOT over weight bytes, a whisker to the peak memory.

    Drawn for the lengths with most corners measured, at the smallest and the largest batch.
    """
    own = [row for row in rows if row.get("peer") in ("ours", "dense") and positive(row, "weight_bytes")]
    own = [row for row in own if positive(row, "tpot_ms.p50") and row.get("correct") is not False]
    plots = []
    for model, dtype in distinct(own, "model", "dtype"):
        of_model = matching(own, model=model, dtype=dtype)
        pairs = distinct(of_model, "input_len", "output_len")
        by_pair = {pair: matching(of_model, input_len=pair[0], output_len=pair[1]) for pair in pairs}
        chosen = max(by_pair.values(), key=lambda group: len({contender(row) for row in group}))
        sizes = batches(chosen)
        for batch in sorted({sizes[0], sizes[-1]}) if sizes else ():
            plots.append(_plane(matching(chosen, batch=batch), model, batch, read, device))
    return plots


def _plane(rows: list[Row], model: Any, batch: float, read: float | None, device: str) -> Plot:
    names = in_order(contender(row) for row in rows)
    colours = slots(names)
    series = []
    for name in names:
        row = next(row for row in rows if contender(row) == name)
        weights, peak, tpot = number(row, "weight_bytes"), number(row, "peak_bytes"), number(row, "tpot_ms.p50")
        assert weights is not None and tpot is not None  # the caller kept only such rows
        memory = size(weights) + (f" weights, {size(peak)} peak" if peak else " weights")
        words = f"{full_name(row)}: {milliseconds(tpot)} per token, {memory}; {_check(row)}"
        tail = peak / 1e9 if peak and peak > weights else None
        point = Point(weights / 1e9, tpot, words, row.get("correct") is True or name == "dense", tail)
        series.append(Series(short_name(name), colours[name], (point,), joined=False))
    ends = [(point.tail or point.x) for group in series for point in group.points]
    x = linear_axis("GB: weights to peak", ends)
    y = linear_axis("ms per token (TPOT)", [point.y for group in series for point in group.points])
    guides: tuple[Guide, ...] = ()
    if read:
        slope = 1e9 / read * 1e3  # ms for each GB
        end = min(x.high, y.high / slope)
        guides = (Guide("weights read once", ((0.0, 0.0), (end, end * slope)), at=0.35),)
    subtitle = f"{model}, batch {batch:g}, {lengths(rows[0])}"
    return Plot(
        slug("plane", model, f"batch {batch:g}", device), "Latency and memory", subtitle, x, y, tuple(series), guides
    )


def step_parts(rows: Sequence[Row], settings: Row, device: str) -> Bars | None:
    """Time inside one decode step by part, a bar for each model, corner and batch that was profiled."""
    parts = list(dict.fromkeys(str(row.get("part")) for row in rows))
    colours = {name: index % 8 for index, name in zip((1, 5, 2, 3, 6, 0, 4, 7), parts, strict=False)}
    keys = ("model", "peer", "corner", "batch")
    bars = []
    for values in distinct(rows, *keys):
        group = matching(rows, **dict(zip(keys, values, strict=True)))
        spent = [(str(row.get("part")), number(row, "us") or 0.0, number(row, "share")) for row in group]
        total = sum(us for _, us, _ in spent)
        pieces = [
            Segment(name, colours.get(name, 7), us, percent(us / total if share is None else share))
            for name, us, share in spent
            if us > 0
        ]
        if pieces:
            bars.append(Bar(step_name(group[0], settings), microseconds(total), tuple(pieces)))
    if not bars:
        return None
    return Bars(
        slug("step", *(bar.name for bar in bars[:1]), device), "Inside a decode step", "time by part", tuple(bars)
    )


def step_name(row: Row, settings: Row) -> str:
    """What a profile's bar is of: model, corner and batch, from the row or else the settings."""
    facts = {name: row.get(name, settings.get(name)) for name in ("model", "arch", "corner", "peer", "batch")}
    words = [str(facts["model"] or facts["arch"] or "step"), str(facts["corner"] or facts["peer"] or "")]
    words.append(f"batch {facts['batch']}" if facts["batch"] is not None else "")
    return ", ".join(word for word in words if word)


def largest_that_fit(rows: Sequence[Row], device: str) -> list[Bars]:
    """For each question and memory a figure: how much fits, a bar for each corner, hollow where only predicted."""
    figures = []
    for model, question, memory in distinct(rows, "model", "question", "memory_bytes"):
        asked = matching(rows, model=model, question=question, memory_bytes=memory)
        longest = question == "longest output"
        wanted = "output_len" if longest else "batch"
        keys = ("input_len", "batch" if longest else "output_len")
        groups = []
        for values in distinct(asked, *keys):
            group = matching(asked, **dict(zip(keys, values, strict=True)))
            colours = slots(str(row.get("corner")) for row in group)
            pieces = tuple(
                Segment(name, colours[name], value, f"{value:,.0f}", checked=row.get("confirmed") is not False)
                for row in group
                for name, value in [(str(row.get("corner")), number(row, wanted))]
                if value is not None
            )
            if pieces:
                name = (
                    f"batch {group[0].get('batch')}, {group[0].get('input_len')} in" if longest else lengths(group[0])
                )
                groups.append(Bar(name, "", pieces))
        if groups:
            title = f"{str(question or 'largest batch').capitalize()}, {'tokens' if longest else 'texts'}"
            subtitle = ", ".join(str(part) for part in (model, f"in {size(memory)}" if memory else None) if part)
            figures.append(Bars(slug("fit", question, model, device), title, subtitle, tuple(groups), stacked=False))
    return figures


def _by_model(rows: Sequence[Row], name: str, key: str, axis_of: Any, device: str, *, dense_line: bool) -> list[Plot]:
    plots = []
    for model, dtype, input_len, output_len in distinct(rows, "model", "dtype", "input_len", "output_len"):
        group = matching(rows, model=model, dtype=dtype, input_len=input_len, output_len=output_len)
        series = _by_batch(group, key, _model_point)
        if not series:
            continue
        found = batches(group)
        plots.append(
            Plot(
                slug(name, model, dtype, input_len, output_len, device),
                "Speed-up" if dense_line else "Time per token",
                ", ".join(filter(None, (str(model), lengths(group[0])))),
                doubling_axis("batch", found),
                axis_of(group),
                series,
                (_dense_line(found),) if dense_line else (),
            )
        )
    return plots


def _by_batch(rows: Sequence[Row], key: str, words: Any) -> tuple[Series, ...]:
    """A series for each contender over the batch sizes, without wrong results."""
    rows = [row for row in rows if row.get("correct") is not False and positive(row, "batch")]
    rows = [row for row in rows if number(row, key) is not None and not (key.startswith("speedup") and _is_dense(row))]
    names = in_order(contender(row) for row in rows)
    colours = slots(names)
    return tuple(
        Series(
            short_name(name),
            colours[name],
            tuple(
                Point(float(row["batch"]), float(number(row, key) or 0), words(row), _counts_as_checked(row))
                for row in sorted(rows, key=lambda row: float(row["batch"]))
                if contender(row) == name
            ),
        )
        for name in names
    )


def _dense_line(found: Sequence[float]) -> Guide:
    axis = doubling_axis("batch", found)
    return Guide("dense", ((axis.low, 1.0), (axis.high, 1.0)))


def _layer_point(row: Row) -> str:
    time, ratio = number(row, "time_us.median"), number(row, "speedup")
    spent = "" if time is None else f"{microseconds(time)}, "
    gained = "" if ratio is None else f"{times(ratio)} dense; "
    return f"{contender(row)}, batch {row.get('batch')}: {spent}{gained}{_check(row)}"


def _model_point(row: Row) -> str:
    tpot, ratio = number(row, "tpot_ms.p50"), number(row, "speedup_vs_dense")
    spent = "" if tpot is None else f"{milliseconds(tpot)} per token, "
    gained = "" if ratio is None else f"{times(ratio)} dense; "
    return f"{full_name(row)}, batch {row.get('batch')}: {spent}{gained}{_check(row)}"


def _check(row: Row) -> str:
    """Whether the result of a row was right, in words for a point."""
    if _is_dense(row):
        return "the baseline"
    return {True: "result checked", False: "wrong result"}.get(row.get("correct"), "result not checked")  # type: ignore[arg-type]


def _is_dense(row: Row) -> bool:
    return contender(row) == "dense"


def _counts_as_checked(row: Row) -> bool:
    return row.get("correct") is True or _is_dense(row)


def _numbers(rows: Iterable[Row], key: str) -> list[float]:
    found = (number(row, key) for row in rows if row.get("correct") is not False)
    return [value for value in found if value is not None]
