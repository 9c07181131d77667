"""Tables of the report: the numbers to compare first, then everything a record holds.

A short table stands beside each chart. Under it, folded away, one table holds every key of every
row, so that nothing of a record is lost on the way to the page.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from html import escape
from typing import Any

from sparsert.bench.report.numbers import (
    DASH,
    data,
    digits,
    flatten,
    is_number,
    lookup,
    number,
    percent,
    positive,
    size,
    times,
)
from sparsert.bench.report.rows import Row, contender, distinct, full_name, in_order, lengths, matching

#: A column: its heading, what it shows of a row as HTML, and whether it is text (left) or a number (right).
Column = tuple[str, Callable[[Row], str], bool]


def table(caption: str, columns: Sequence[Column], rows: Iterable[Row]) -> str:
    """A table in a box that scrolls by itself, reachable with the keyboard."""
    head = "".join(f'<th scope="col"{_css(text)}>{escape(name)}</th>' for name, _, text in columns)
    body = []
    for row in rows:
        first, *others = columns
        cells = [f'<th scope="row"{_css(first[2])}>{first[1](row)}</th>']
        cells += [f"<td{_css(text)}>{show(row)}</td>" for _, show, text in others]
        body.append(f"<tr>{''.join(cells)}</tr>")
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}"><table>'
        f"<caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    )


def every_number(rows: Sequence[Row], what: str) -> str:
    """All keys of all rows, folded away."""
    flat = [flatten(row) for row in rows]
    names = list(dict.fromkeys(name for row in flat for name in row))
    columns: list[Column] = [
        (name, _value_of(name), not any(is_number(row.get(name)) for row in flat)) for name in names
    ]
    count = f"{len(rows)} row{'' if len(rows) == 1 else 's'}"
    inner = table(f"{what}: {count} as recorded", columns, flat)
    return f"<details><summary>Every number of {escape(what)} ({count})</summary>{inner}</details>"


def kernel_table(rows: Sequence[Row], model: Any) -> str:
    """One line for each layer and batch: time of dense, then time, speed-up and check of each contender."""
    of_model = matching(rows, model=model)
    names = in_order(contender(row) for row in of_model if row.get("time_us") or row.get("correct") is False)
    columns: list[Column] = [
        ("layer", lambda group: data(group["layer"]), True),
        ("out × in", lambda group: f"{data(group['out_features'])} × {data(group['in_features'])}", True),
        ("batch", lambda group: data(group["batch"]), False),
    ]
    for name in names:
        columns.append((f"{name} µs", _of(name, _time), False))
        if name != "dense":
            columns.append(("speed-up", _of(name, lambda row: ratio_cell(row, "speedup")), False))
            columns.append(("correct", _of(name, correct_cell), True))
        columns.append(("of read", _of(name, lambda row: share_cell(row, "share_of_read")), False))
    groups = []
    keys = ("layer", "out_features", "in_features", "dtype", "batch")
    for values in distinct(of_model, *keys):
        facts = dict(zip(keys, values, strict=True))
        groups.append(facts | {"by": {contender(row): row for row in matching(of_model, **facts)}})
    return table(
        f"{model}: time of one linear, median (p20–p80), and share of the measured read bandwidth", columns, groups
    )


def batch_table(rows: Sequence[Row], model: Any) -> str:
    """One line for each batch: the geometric mean of the layers' speed-ups, their range, and how many were right."""
    timed = [row for row in rows if number(row, "speedup") and row.get("correct") is not False]
    names = in_order(contender(row) for row in timed)
    columns: list[Column] = [("batch", lambda line: data(line["batch"]), False)]
    for name in names:
        columns += [(name, _of(name, _mean_speedup), False), ("correct", _of(name, _right), True)]
    lines = [
        {"batch": batch, "by": {name: matching(group, contender=name) for name in {contender(row) for row in group}}}
        for (batch,) in distinct(timed, "batch")
        for group in [matching(rows, batch=batch)]
    ]
    caption = (
        f"{model}: speed-up over dense, geometric mean of the layers (least–most), and how many were checked and right"
    )
    return table(caption, columns, lines) if names else ""


def model_table(rows: Sequence[Row], caption: str) -> str:
    """One line for each contender, lengths and batch: latencies, rates, memory, speed-up and check."""
    columns: list[Column] = [
        ("contender", lambda row: escape(full_name(row)), True),
        ("lengths", lambda row: escape(lengths(row)), True),
        ("batch", lambda row: data(row.get("batch")), False),
        ("TTFT ms", _digits("ttft_ms.p50"), False),
        ("TPOT ms", _digits("tpot_ms.p50"), False),
        ("p95", _digits("tpot_ms.p95"), False),
        ("ITL p99", _digits("itl_ms.p99"), False),
        ("output tok/s", _digits("output_tok_per_s", 4), False),
        ("of read", lambda row: share_cell(row, "share_of_read"), False),
        ("speed-up", lambda row: ratio_cell(row, "speedup_vs_dense"), False),
        ("correct", correct_cell, True),
        ("weights", _size("weight_bytes"), False),
        ("peak memory", _size("peak_bytes"), False),
        ("KV a token", _size("kv_bytes_per_token"), False),
        ("runs", lambda row: data(row.get("runs")), False),
        ("load s", _digits("load_s"), False),
        ("wall s", _digits("wall_s"), False),
    ]
    always = {"contender", "batch", "correct", "speed-up"}
    used = [
        column for column in columns if column[0] in always or any(column[1](row) not in ("", DASH) for row in rows)
    ]
    return table(caption, used, rows)


def profile_table(rows: Sequence[Row], name_of: Callable[[Row], str]) -> str:
    """Microseconds and share of each part of a decode step."""
    columns: list[Column] = [
        ("step", lambda row: escape(name_of(row)), True),
        ("part", lambda row: data(row.get("part")), True),
        ("µs", _digits("us"), False),
        ("share", lambda row: share_cell(row, "share"), False),
    ]
    return table("time of each part of one decode step", columns, rows)


def kernels_of_steps(rows: Sequence[Row], name_of: Callable[[Row], str]) -> str:
    """One sentence a step: how many kernels, and the longest time in which none of them ran; empty without."""
    said = []
    for row in rows:
        gap = number(row, "largest_gap_us")
        if is_number(row.get("kernels")) and gap is not None:  # not of a CPU, nor in older records
            said.append(
                f"{escape(name_of(row))}: {data(row['kernels'])} kernels a step, largest gap between two "
                f"{data(row['largest_gap_us'], digits(gap, 2))} µs."
            )
    return "".join(f'<p class="soft">{sentence}</p>' for sentence in dict.fromkeys(said))


def fit_table(rows: Sequence[Row]) -> str:
    """What fits into a memory: predicted from bytes, and what running it took."""
    text = ("corner", "model", "question")
    facts = [name for name in (*text, "batch", "input_len", "output_len") if any(name in row for row in rows)]
    columns: list[Column] = [(name.replace("_len", ""), _value_of(name), name in text) for name in facts]
    columns += [
        ("weights", _size("weight_bytes"), False),
        ("cache", _size("cache_bytes"), False),
        ("predicted", _size("predicted_bytes"), False),
        ("measured", _size("measured_bytes"), False),
        ("of memory", _size("memory_bytes"), False),
        ("verdict", _fit_verdict, True),
    ]
    return table("the largest that fits: bytes predicted, and measured by running it", columns, rows)


def check_table(rows: Sequence[Row]) -> str:
    """Ratios to dense then and now."""
    columns: list[Column] = [
        ("what", lambda row: data(row.get("what")), True),
        ("before", lambda row: ratio_or_text(row.get("before")), False),
        ("now", lambda row: ratio_or_text(row.get("now")), False),
        ("change", _change, False),
        ("slower", lambda row: _verdict(not row.get("slower"), "no", "yes"), True),
        ("correct", correct_cell, True),
        ("committed in", lambda row: data(row.get("source")), True),
    ]
    return table("ratios to dense of the same run, as recorded and now", columns, rows)


def correct_cell(row: Row) -> str:
    """Whether the result was compared and right, with its error beside torch's where known."""
    correct, reason = row.get("correct"), row.get("reason")
    if correct is None:
        return escape(f"not checked: {reason}" if reason else "not checked")
    cell = _verdict(bool(correct), "correct", "wrong")
    error = number(row, "error")
    if error is None:
        return f"{cell} <small>{escape(str(reason))}</small>" if reason else cell
    beside = "".join(
        f", {whose} {data(row[key], digits(other, 2))}"
        for key, whose in (("dense_error", "dense"), ("torch_error", "torch"))
        if (other := number(row, key)) is not None
    )
    return f"{cell} <small>error {data(row['error'], digits(error, 2))}{beside}</small>"


def ratio_cell(row: Row, key: str) -> str:
    """A speed-up, struck out where the result was wrong."""
    value = number(row, key)
    if value is None:
        return DASH
    cell = data(row[key], times(value))
    return f"<s>{cell}</s>" if row.get("correct") is False else cell


def ratio_or_text(value: Any) -> str:
    """A ratio, or whatever else stands there."""
    return data(value, times(value)) if is_number(value) else data(value)


def share_cell(row: Row, key: str) -> str:
    """A share of one as percent."""
    value = number(row, key)
    return DASH if value is None else data(row[key], percent(value))


def checks(rows: Iterable[Row]) -> str:
    """How results were checked, each way once with those it applies to."""
    found: dict[str, list[str]] = {}
    for row in rows:
        if row.get("check"):
            found.setdefault(str(row["check"]), []).append(full_name(row))
    items = "".join(
        f"<li>{escape('; '.join(dict.fromkeys(names)))}: {escape(check)}</li>" for check, names in found.items()
    )
    return f'<p class="soft">How the results were checked:</p><ul class="plain soft">{items}</ul>' if items else ""


def _fit_verdict(row: Row) -> str:
    if row.get("fits") is False:
        return '<span class="no">✗ does not fit</span>'
    return "predicted, not run" if row.get("confirmed") is False else '<span class="ok">✓ ran</span>'


def _mean_speedup(rows: Sequence[Row]) -> str:
    gains = [gain for row in rows if row.get("correct") is not False and (gain := positive(row, "speedup"))]
    if not gains:
        return DASH
    mean = math.exp(sum(map(math.log, gains)) / len(gains))
    return f"{times(mean)} <small>({min(gains):.2f}–{max(gains):.2f})</small>"


def _right(rows: Sequence[Row]) -> str:
    right = sum(row.get("correct") is True for row in rows)
    text = f"{right} of {len(rows)}"
    return f'<span class="ok">✓ {text}</span>' if right == len(rows) else f'<span class="no">{text}</span>'


def _time(row: Row) -> str:
    low, middle, high = (number(row, f"time_us.{name}") for name in ("p20", "median", "p80"))
    if middle is None:
        reason = row.get("reason")
        return f'<span title="{escape(str(reason))}">{DASH}</span>' if reason else DASH
    times_us = row["time_us"]
    cell = data(times_us["median"], digits(middle))
    if low is not None and high is not None:
        cell += f" <small>({data(times_us['p20'], digits(low))}–{data(times_us['p80'], digits(high))})</small>"
    return cell


def _change(row: Row) -> str:
    value = number(row, "change")
    return data(row.get("change")) if value is None else data(row["change"], f"{value * 100:+.1f} %")


def _verdict(good: bool, yes: str, no: str) -> str:
    return f'<span class="ok">✓ {yes}</span>' if good else f'<span class="no">✗ {no}</span>'


def _of(name: str, show: Callable[[Any], str]) -> Callable[[Row], str]:
    """Show what a group holds of one contender, a dash where it has nothing."""
    return lambda group: show(group["by"][name]) if name in group["by"] else DASH


def _value_of(name: str) -> Callable[[Row], str]:
    return lambda row: data(row.get(name))


def _digits(path: str, count: int = 3) -> Callable[[Row], str]:
    def show(row: Row) -> str:
        value = number(row, path)
        return DASH if value is None else data(lookup(row, path), digits(value, count))

    return show


def _size(path: str) -> Callable[[Row], str]:
    def show(row: Row) -> str:
        value = number(row, path)
        return DASH if value is None else data(lookup(row, path), size(value))

    return show


def _css(text: bool) -> str:
    return ' class="text"' if text else ""
