"""The table of a latency or throughput run, line by line, so that it can grow while the run goes on."""

from __future__ import annotations

from typing import Any

from sparsert.bench.card import amount

Row = dict[str, Any]

HEAD = (
    f"{'contender':<22}{'batch':>6}{'lengths':>11}{'runs':>5}{'TTFT ms':>10}{'TPOT ms':>9}{'p95':>9}{'ITL p99':>9}"
    f"{'tok/s':>10}{'of read':>8}{'peak':>9}{'weights':>10}{'wall s':>8}{'speed-up':>10}  check"
)


def row_line(row: Row) -> str:
    """One row; below :data:`HEAD`."""
    name = row["corner"] if row["peer"] in ("ours", "dense") else row["peer"]
    ttft, tpot, itl = (row[key] or {} for key in ("ttft_ms", "tpot_ms", "itl_ms"))
    share, speedup = row["share_of_read"], row["speedup_vs_dense"]
    return (
        f"{name:<22}{row['batch']:>6}{row['input_len']:>6}/{row['output_len']:<4}{row['runs']:>5}"
        f"{_cell(ttft.get('p50'), 10, 2)}{_cell(tpot.get('p50'), 9, 3)}{_cell(tpot.get('p95'), 9, 3)}"
        f"{_cell(itl.get('p99'), 9, 3)}{_cell(row['output_tok_per_s'], 10, 1)}"
        f"{'-' if share is None else format(share, '.0%'):>8}{_size(row['peak_bytes']):>9}"
        f"{_size(row['weight_bytes']):>10}{_cell(row['wall_s'], 8, 1)}"
        f"{'-' if speedup is None else format(speedup, '.2f') + 'x':>10}  {_verdict(row)}"
    )


def _cell(value: float | None, width: int, digits: int) -> str:
    return f"{'-':>{width}}" if value is None else f"{value:>{width}.{digits}f}"


def _size(count: int | None) -> str:
    return "-" if count is None else amount(count)


def _verdict(row: Row) -> str:
    if row["correct"] is None:
        return "not checked"
    return f"{'ok' if row['correct'] else 'WRONG'} ({row['error'] / row['torch_error']:.2f} x torch's error)"
