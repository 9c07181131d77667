"""Times of layers: measured, interpolated, estimated, and never silently one for another."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest

from sparsert.compress.latency_table import LatencyTable, Layer, block_layers
from sparsert.compress.width import Widths
from sparsert.errors import InputError

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"


def _row(rows: int, columns: int, us: float, contender: str = "dense", **changes: Any) -> dict[str, Any]:
    return {
        "out_features": rows,
        "in_features": columns,
        "batch": 1,
        "contender": contender,
        "correct": True,
        "time_us": {"median": us, "p20": us, "p80": us},
        **changes,
    }


def make_record(*rows: dict[str, Any]) -> dict[str, Any]:
    return {"kind": "kernels", "machine": {"gpu": "Test GPU"}, "results": list(rows)}


RECORD = make_record(
    _row(64, 64, 2.0),
    _row(256, 64, 4.0),
    _row(64, 256, 9.0),  # as many bytes as the one above: together sqrt(4 * 9) = 6
    _row(1024, 1024, 60.0),
    _row(64, 64, 1.0, "ours"),
    _row(1024, 1024, 20.0, "ours"),
    _row(512, 512, 99.0, "ours", correct=False),
    _row(512, 512, 0.0, "ours", time_us=None),
    _row(64, 64, 3.0, "ours-triton"),
    _row(64, 64, 5.0, batch=8),
)


def test_measured_shapes_are_taken_as_they_are() -> None:
    table = LatencyTable(RECORD)
    assert table.machine == "Test GPU"
    assert (table.layer(Layer("", 64, 256)).us, table.layer(Layer("", 64, 256)).source) == (9.0, "measured")
    assert table.layer(Layer("", 64, 64, sparse=True)).us == 1.0
    assert LatencyTable(RECORD, 8).layer(Layer("", 64, 64)).us == 5.0


def test_between_them_time_follows_bytes() -> None:
    table = LatencyTable(RECORD)
    same = table.layer(Layer("", 128, 128))
    assert same.us == pytest.approx(6.0) and same.source == "interpolated"
    between = table.layer(Layer("", 128, 64))  # halfway between 64 x 64 and 256 x 64, in the logarithm
    assert between.us == pytest.approx(math.sqrt(2.0 * 6.0)) and between.source == "interpolated"
    far = table.layer(Layer("", 512, 256))  # 8 times the one below, an eighth of the one above
    assert far.us == pytest.approx(math.sqrt(6.0 * 60.0)) and far.source == "estimated"


def test_outside_of_them_it_is_an_estimate_and_says_so() -> None:
    table = LatencyTable(RECORD)
    assert (table.layer(Layer("", 8, 8)).us, table.layer(Layer("", 8, 8)).source) == (2.0, "estimated")
    large = table.layer(Layer("", 4096, 1024))
    assert large.us == pytest.approx(240.0) and large.source == "estimated"
    total = table.total([Layer("small", 8, 8), Layer("q", 64, 64), Layer("head", 4096, 1024), Layer("small", 8, 8)])
    assert total.us == pytest.approx(2 + 2 + 240 + 2) and total.estimated == ("small", "head")


def test_the_committed_record_is_read() -> None:
    path = next(RESULTS.glob("*/kernels-*.json"))
    table = LatencyTable(json.loads(path.read_text()))
    smol = Widths(576, 1536, 9, 3, 64)
    dense, sparse = (table.total(block_layers(smol, sparse=flag)) for flag in (False, True))
    assert dense.estimated == sparse.estimated == ()
    assert 0 < sparse.us < dense.us < 100


def test_layers_of_a_block_are_joined_as_the_engine_does() -> None:
    layers = block_layers(Widths(32, 48, 4, 2, 8), gated=False, sparse=True)
    assert [(layer.name, layer.out_features, layer.in_features) for layer in layers] == [
        ("qkv", 64, 32),
        ("o", 32, 32),
        ("up", 48, 32),
        ("down", 32, 48),
    ]
    assert all(layer.sparse for layer in layers)
    assert Layer("", 64, 64).nbytes == 8192 and Layer("", 64, 64, sparse=True).nbytes == 8192 * 9 // 16


def test_tables_that_are_none() -> None:
    with pytest.raises(InputError, match="record is of `bench latency`"):
        LatencyTable({**RECORD, "kind": "latency"})
    with pytest.raises(InputError, match=r"no times at batch 2; it has 1, 8\. Measure it with .*--batch 2"):
        LatencyTable(RECORD, 2)
    broken = copy.deepcopy(RECORD)
    del broken["results"][0]["out_features"]
    with pytest.raises(InputError, match="table of layer times is damaged"):
        LatencyTable(broken)
    with pytest.raises(InputError, match="no packed 2:4 layers at batch 8, so q cannot be timed"):
        LatencyTable(RECORD, 8).layer(Layer("q", 64, 64, sparse=True))
