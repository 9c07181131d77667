"""Under what circumstances the numbers of a report were made: machine, runs, and what did not run.

A fact that is the same in all records of a GPU stands once; one that differs shows each value.
"""

from __future__ import annotations

from collections import Counter
from html import escape
from typing import Any

from sparsert.bench.report.numbers import DASH, data, digits, flatten, number, size
from sparsert.bench.report.rows import Gpu, Row, contender
from sparsert.bench.report.tables import Column, table

_NAMES = {
    "gpu": "GPU",
    "compute_capability": "compute capability",
    "memory_bytes": "memory",
    "clocks.sm": "clock, MHz",
    "clocks.memory": "memory clock, MHz",
    "clocks.sm_max": "highest clock, MHz",
    "clocks.memory_max": "highest memory clock, MHz",
    "clocks.power_limit_w": "power limit, W",
    "temperature": "temperature, °C",
    "python": "Python",
    "torch": "PyTorch",
    "cuda": "CUDA",
    "triton": "Triton",
    "cpu": "CPU",
}


def machine_block(gpu: Gpu) -> str:
    """Facts of the machine, the runs, and lists of what was skipped, fell back, or is worth a note."""
    lists = [
        ("Not measured", _skipped(gpu)),
        ("Fallbacks", _sentences(gpu, "fallbacks")),
        ("Notes", _sentences(gpu, "notes")),
    ]
    out = [_facts(gpu), _runs(gpu)]
    for title, items in lists:
        if items:
            entries = "".join(f"<li>{escape(item)}</li>" for item in items)
            out.append(f'<h4>{title}</h4><ul class="plain">{entries}</ul>')
        else:
            out.append(f'<h4>{title}</h4><p class="soft">None.</p>')
    return "".join(out)


def _facts(gpu: Gpu) -> str:
    values: dict[str, list[str]] = {}
    for record in gpu.records:
        for name, value in flatten(record.get("machine") or {}).items():
            if value is None:
                continue
            text = size(value) if name.endswith("_bytes") and isinstance(value, (int, float)) else None
            values.setdefault(name, []).append(data(value, text))
    rows: list[Row] = [
        {"name": _NAMES.get(name, name), "value": "; ".join(dict.fromkeys(found))} for name, found in values.items()
    ]
    columns: list[Column] = [("fact", lambda row: escape(row["name"]), True), ("value", lambda row: row["value"], True)]
    return f'<div class="facts">{table(f"{gpu.name}: the machine", columns, rows)}</div>'


def _runs(gpu: Gpu) -> str:
    columns: list[Column] = [
        ("kind", lambda record: data(record.get("kind")), True),
        ("when", lambda record: data(record.get("created")), True),
        ("read roof", lambda record: _roof(record, "read_bytes_per_s", 1e12, "TB/s"), False),
        ("dense rate", lambda record: _roof(record, "dense_flop_per_s", 1e12, "TFLOP/s"), False),
        ("rows", lambda record: str(len(record.get("results") or ())), False),
        ("command", lambda record: f"<code>{escape(' '.join(map(str, record.get('command') or ())))}</code>", True),
        ("settings", _settings, True),
    ]
    return "<h4>Runs</h4>" + table("one line for each record", columns, gpu.records)


def _settings(record: Row) -> str:
    lines = []
    for name, value in flatten(record.get("settings") or {}).items():
        entries = value if isinstance(value, list) and any(isinstance(entry, dict) for entry in value) else None
        if entries is not None:  # such as the cards of the models: a line each
            lines += [f"<code>{escape(name)}</code> {escape(_sentence(entry))}" for entry in entries]
        elif value is not None:
            lines.append(f"<code>{escape(name)}</code> {data(value)}")
    return "<br>".join(lines) or DASH


def _roof(record: Row, name: str, scale: float, unit: str) -> str:
    roofs = record.get("roofs") or {}
    value = number(roofs, name)
    return DASH if value is None else data(roofs[name], f"{digits(value / scale)} {unit}")


def _skipped(gpu: Gpu) -> list[str]:
    """Peers that were skipped whole, then rows that hold a reason instead of a time."""
    out = []
    for record in gpu.records:
        out += [
            f"{record.get('kind')}: {entry.get('peer')}: {entry.get('reason')}" for entry in record.get("skipped") or ()
        ]
        reasons = Counter(
            (contender(row), str(row["reason"])) for row in record.get("results") or () if row.get("reason")
        )
        out += [f"{record.get('kind')}: {name}, {_rows(count)}: {reason}" for (name, reason), count in reasons.items()]
    return list(dict.fromkeys(out))


def _rows(count: int) -> str:
    return "1 row" if count == 1 else f"{count} rows"


def _sentences(gpu: Gpu, key: str) -> list[str]:
    return list(
        dict.fromkeys(
            f"{record.get('kind')}: {_sentence(entry)}" for record in gpu.records for entry in record.get(key) or ()
        )
    )


def _sentence(entry: Any) -> str:
    return entry if isinstance(entry, str) else ", ".join(f"{name} {value}" for name, value in dict(entry).items())
