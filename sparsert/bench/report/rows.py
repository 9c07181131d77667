"""Records grouped for the report: by GPU, then by kind, repeated measurements replaced by the newest.

A GPU is known by its name, so records of two machines with the same GPU stand together; what they
measured twice is shown as measured last, and every record keeps its line in the machine block.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from sparsert.bench.report.numbers import is_number, number

Row = dict[str, Any]

#: What tells two measurements of one kind apart; the newest of equal ones is shown.
_KEYS = {
    "kernels": ("model", "layer", "out_features", "in_features", "batch", "dtype", "contender"),
    "latency": ("peer", "corner", "model", "dtype", "batch", "input_len", "output_len"),
    "throughput": ("peer", "corner", "model", "dtype", "batch", "input_len", "output_len"),
}

#: Order of contenders and corners wherever several stand together.
_ORDER = (
    "dense",
    "ours",
    "2:4",
    "blocks removed",
    "2:4 + blocks removed",
    "ours-triton",
    "torch-sparse",
    "cusparselt",
    "cutlass",
    "hf",
    "hf-compile",
    "vllm",
    "gpt-fast",
)


@dataclass(frozen=True)
class Gpu:
    """All records of one GPU, oldest first."""

    name: str
    records: tuple[Row, ...]

    def of(self, kind: str) -> list[Row]:
        """The records of one kind, oldest first."""
        return [record for record in self.records if record.get("kind") == kind]

    def rows(self, kind: str) -> list[Row]:
        """The results of one kind, in the order measured, each measurement once."""
        rows: dict[tuple[Any, ...], Row] = {}
        for record in self.of(kind):
            for index, row in enumerate(record.get("results") or ()):
                keys = _KEYS.get(kind)
                key = tuple(map(str, map(row.get, keys))) if keys else (id(record), index)
                rows[key] = row
        return list(rows.values())

    def roof(self, name: str, kind: str) -> float | None:
        """A measured roof, of the newest record of this kind that has it."""
        roofs = [number(record.get("roofs") or {}, name) for record in self.of(kind)]
        return next((roof for roof in reversed(roofs) if roof), None)


def by_gpu(records: Iterable[Row]) -> list[Gpu]:
    """Records of each GPU, GPUs in the order given; those without one go under their processor."""
    found: dict[str, list[Row]] = {}
    for record in records:
        found.setdefault(device_name(record), []).append(record)
    return [
        Gpu(name, tuple(sorted(group, key=lambda record: str(record.get("created"))))) for name, group in found.items()
    ]


def device_name(record: Row) -> str:
    """The GPU of a record, or its processor where there was none."""
    machine = record.get("machine") or {}
    if machine.get("gpu"):
        return str(machine["gpu"])
    return f"CPU ({machine['cpu']})" if machine.get("cpu") else "CPU"


def distinct(rows: Iterable[Row], *names: str) -> list[tuple[Any, ...]]:
    """The combinations of values that occur, in order of first appearance."""
    return list(dict.fromkeys(tuple(row.get(name) for name in names) for row in rows))


def matching(rows: Iterable[Row], **values: Any) -> list[Row]:
    """The rows that hold these values."""
    return [row for row in rows if all(row.get(name) == value for name, value in values.items())]


def in_order(names: Iterable[str]) -> list[str]:
    """Contenders once each: dense, ours, then the peers as listed, then what is not known here."""
    wanted = list(dict.fromkeys(names))
    return sorted(wanted, key=lambda name: _ORDER.index(name) if name in _ORDER else len(_ORDER))


def contender(row: Row) -> str:
    """Who was measured, as one name: our engine by corner, peers by name and, unless dense, corner.

    >>> contender({"peer": "ours", "corner": "2:4"}), contender({"peer": "hf", "corner": "dense"})
    ('2:4', 'hf')
    """
    if row.get("contender"):
        return str(row["contender"])
    peer, corner = row.get("peer"), row.get("corner")
    if peer in ("ours", "dense", None):
        return str(corner or peer or "ours")
    if corner in (None, "dense") or peer == "torch-sparse":
        return str(peer)
    return f"{peer} ({corner})"


def full_name(row: Row) -> str:
    """As :func:`contender`, with our engine named where its corner alone would be shown."""
    name = contender(row)
    if row.get("contender") or row.get("peer") not in ("ours", "dense"):
        return name
    return "dense, our engine" if name == "dense" else f"ours, {name}"


def short_name(name: str) -> str:
    """A contender's name as it stands at the end of a line in a chart."""
    return name.replace("2:4 + blocks removed", "2:4 + removed").replace("blocks removed", "removed")


def batches(rows: Iterable[Row]) -> list[float]:
    """The batch sizes that occur, ascending."""
    return sorted({float(row["batch"]) for row in rows if is_number(row.get("batch")) and row["batch"] > 0})


def lengths(row: Row) -> str:
    """Prompt and output length as ``128 in, 512 out``, empty where not given."""
    if row.get("input_len") is None and row.get("output_len") is None:
        return ""
    return f"{row.get('input_len', '?')} in, {row.get('output_len', '?')} out"


def slug(*parts: Any) -> str:
    """A file name of the parts.

    >>> slug("speed-up", "Llama-2-7B", "NVIDIA H100 80GB")
    'speed-up-llama-2-7b-nvidia-h100-80gb'
    """
    words = (re.sub(r"[^a-z0-9]+", "-", str(part).lower()).strip("-") for part in parts)
    return "-".join(word for word in words if word)


def wrong(rows: Sequence[Row]) -> int:
    """How many rows gave a wrong result; their speed is in the tables only."""
    return sum(row.get("correct") is False for row in rows)
