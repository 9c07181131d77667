"""``sparsert bench check``: has anything become slower than in the records committed for this GPU?

Absolute times move from machine to machine and from day to day, ratios to a baseline of the same run hardly
do. So what is compared is how many times faster than dense each row was, then and now: a quick set of layers is
measured again (or a record that was just made is given), and every ratio that fell by more than the tolerance is
listed. A row that seems slower is measured again before it is called so. What it gives up: a change that
makes dense slower too goes unseen, and only shapes and batches that are in a committed record are looked at.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsert.bench.cut_off import keeping
from sparsert.bench.options import dtype_name, remarks, resolve_dtype, say, settings_of
from sparsert.bench.records import machine_facts, machine_slug, read_record
from sparsert.bench.shapes import LinearShape, linear_shapes
from sparsert.errors import InputError

if TYPE_CHECKING:
    import torch

EXAMPLES = """\
examples:
  sparsert bench check                                     measure a quick set, compare with benchmarks/results/<gpu>
  sparsert bench check --record latency.json               compare a record that was made just now
  sparsert bench check --results DIR --tolerance 10

Exit code 3 when a ratio to dense fell by more than the tolerance, or a result is wrong or cannot be measured
any more; 0 otherwise.
"""

#: What is measured again, by device type: models, whose fused layers are taken, and rows of input.
_QUICK_MODEL = {"cuda": "llama-3.1-8b", "cpu": "tiny"}
_QUICK_BATCHES = {"cuda": (1, 16, 64, 1024), "cpu": (1, 8)}

#: A row that seems slower is measured again at most this often; its best ratio counts.
_SECOND_LOOKS = 2

#: Kinds whose rows hold a ratio to dense.
_KINDS = ("kernels", "latency", "throughput")

_REPEATS = 25

Key = tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Ratio:
    """How many times faster than dense one row is.

    Attributes:
        what: the row in words.
        value: dense's time over its own, both of the same run; None when it was not measured.
        correct: what its check said.
        source: file it was read from.
        reason: why it was not measured.
    """

    what: str
    value: float | None
    correct: bool | None
    source: str
    reason: str | None = None


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add what only this command takes."""
    parser.add_argument(
        "--results",
        metavar="DIR",
        default="benchmarks/results",
        help="folder with a folder of records for each GPU (default: benchmarks/results)",
    )
    parser.add_argument("--record", metavar="FILE", help="compare this record instead of measuring")
    parser.add_argument(
        "--tolerance",
        metavar="PERCENT",
        type=float,
        default=5.0,
        help="how much a ratio may fall before it counts as slower (default: 5)",
    )


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Compare, print what changed, and return a record of kind ``check``.

    Raises:
        InputError: there is nothing to compare with, or an option does not fit.
        UnsupportedError: the device is not there.
        CutOff: a signal ended the run; it has the record so far.
    """
    if not 0 <= arguments.tolerance < 100:
        raise InputError(f"--tolerance {arguments.tolerance:g}: give percent from 0 to below 100")
    if arguments.record is not None:
        return _compare_record(arguments)
    from sparsert.models import resolve_device

    device = resolve_device(arguments.device)
    dtype = resolve_dtype(arguments.dtype, device)
    committed = committed_ratios(arguments.results, machine_facts(device))
    return _compare_quick_set(arguments, committed, device, dtype)


def committed_ratios(results: str | Path, machine: dict[str, Any]) -> dict[Key, Ratio]:
    """Ratios of all records committed for a machine; of rows measured twice the newer counts.

    Raises:
        InputError: there are none, or one of them is damaged.
    """
    folder = Path(results).expanduser() / machine_slug(machine)
    files = sorted(folder.glob("*.json"))
    if not files:
        raise InputError(
            f"{folder}: no records of this machine to compare with; make one with "
            f"`sparsert bench kernels --output {folder / 'kernels.json'}`, or give --results DIR"
        )
    records = sorted(((read_record(file), file.name) for file in files), key=lambda pair: str(pair[0]["created"]))
    ratios: dict[Key, Ratio] = {}
    for record, name in records:
        ratios |= {
            key: ratio for key, ratio in ratios_of(record, name).items() if ratio.value and ratio.correct is not False
        }
    return ratios


def ratios_of(record: dict[str, Any], source: str) -> dict[Key, Ratio]:
    """The ratios to dense that a record holds for what is ours, by what was measured.

    Args:
        record: of kind ``kernels``, ``latency`` or ``throughput``; others hold none.
        source: its file name.
    """
    ratios: dict[Key, Ratio] = {}
    kind = record["kind"]
    for row in record["results"] if kind in _KINDS else ():
        if kind == "kernels":
            if not str(row["contender"]).startswith("ours"):
                continue
            key: Key = _kernel_key(row)
            size = f"{row['out_features']}x{row['in_features']}"
            what = f"{row['contender']} {size} {row['dtype']}, batch {row['batch']}"
            value = row["speedup"]
        else:
            if row["peer"] != "ours":
                continue
            names = ("model", "corner", "dtype", "batch", "input_len", "output_len")
            key = (kind, *(row.get(name) for name in names))
            lengths = f"{row['input_len']}/{row['output_len']} tokens"
            what = f"{kind} {row['model']} {row['corner']}, batch {row['batch']}, {lengths}"
            value = row.get("speedup_vs_dense")
        ratios[key] = Ratio(what, value, row.get("correct"), source, row.get("reason"))
    return ratios


def compare(committed: dict[Key, Ratio], now: dict[Key, Ratio], tolerance_percent: float) -> list[dict[str, Any]]:
    """Rows of a record of kind ``check``: every ratio that is in both, the worst change first.

    Args:
        committed: ratios of earlier records.
        now: ratios of this run; one without a value could not be measured, which counts as slower.
        tolerance_percent: how much a ratio may fall.
    """
    rows = []
    for key, ratio in now.items():
        before = committed.get(key)
        if before is None or before.value is None:
            continue
        change = None if ratio.value is None else ratio.value / before.value - 1
        rows.append(
            {
                "what": before.what,
                "before": before.value,
                "now": ratio.value,
                "change": change,
                "slower": change is None or change < -tolerance_percent / 100,
                "correct": ratio.correct,
                "reason": ratio.reason,
                "source": before.source,
            }
        )
    return sorted(rows, key=lambda row: (row["change"] is not None, row["change"] or 0.0))


def _compare_record(arguments: argparse.Namespace) -> dict[str, Any]:
    from sparsert.bench.records import new_record

    measured = read_record(arguments.record)
    committed = committed_ratios(arguments.results, measured["machine"])
    rows = compare(committed, ratios_of(measured, arguments.record), arguments.tolerance)
    if not rows:
        raise InputError(f"--record {arguments.record}: none of its rows is in a committed record of its machine")
    record = new_record("check", settings_of(arguments), device="cpu", roofs=measured["roofs"])
    record["machine"] = measured["machine"]
    record["results"] = rows
    _print(record, arguments.tolerance)
    return record


def _compare_quick_set(
    arguments: argparse.Namespace, committed: dict[Key, Ratio], device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    from sparsert.bench.kernels import roofs_sentence, start_record

    name = dtype_name(dtype)
    kernels = {key for key in committed if key[0] == "kernels" and key[-2] == name}
    shapes = linear_shapes(_QUICK_MODEL[device.type], "fused")
    wanted = {
        (shape, batch, contender)
        for shape in shapes
        for batch in _QUICK_BATCHES[device.type]
        for contender in ("ours", "ours-triton")
        if _key(shape, batch, name, contender) in kernels
    }
    if not wanted:
        raise InputError(
            f"--results {arguments.results}: no committed record holds layers of {_QUICK_MODEL[device.type]} in {name} "
            f"at batch {', '.join(map(str, _QUICK_BATCHES[device.type]))}, which is what this measures"
        )
    settings = settings_of(arguments) | {"device": str(device), "dtype": name}
    record = start_record("check", settings, device, dtype)
    print(roofs_sentence(record), flush=True)
    now: dict[Key, Ratio] = {}
    with keeping(record):
        for look in range(1 + _SECOND_LOOKS):
            again = _measure(record, wanted, device, dtype, arguments.seed + look)
            now |= {key: ratio for key, ratio in again.items() if key not in now or _better(ratio, now[key])}
            record["results"] = compare(committed, now, arguments.tolerance)
            slower = {row["what"] for row in record["results"] if row["slower"]}
            wanted = {entry for entry in wanted if committed[_key(entry[0], entry[1], name, entry[2])].what in slower}
            if not wanted:
                break
            if look < _SECOND_LOOKS:
                say(f"{len(wanted)} of {len(record['results'])} ratios seem lower; these are measured again")
    _print(record, arguments.tolerance)
    return record


def _better(ratio: Ratio, other: Ratio) -> bool:
    """A wrong result is never made good by a second look; of right ones the faster counts."""
    if other.correct is False or ratio.correct is False:
        return other.correct is not False
    return (ratio.value or 0.0) > (other.value or 0.0)


def _measure(
    record: dict[str, Any],
    wanted: Iterable[tuple[LinearShape, int, str]],
    device: torch.device,
    dtype: torch.dtype,
    seed: int,
) -> dict[Key, Ratio]:
    """Measure what is wanted, shape by shape, and return its ratios."""
    from sparsert.bench.kernels import measure_shapes

    # layers that want the same are measured by one process
    alike: dict[tuple[tuple[int, ...], tuple[str, ...]], list[LinearShape]] = {}
    entries = list(wanted)
    for shape in sorted({entry[0] for entry in entries}, key=lambda shape: (shape.out_features, shape.in_features)):
        batches = tuple(sorted({batch for other, batch, _ in entries if other == shape}))
        contenders = tuple(sorted({contender for other, _, contender in entries if other == shape}))
        alike.setdefault((batches, contenders), []).append(shape)
    scratch = record | {"kind": "kernels", "results": [], "skipped": []}
    for (batches, contenders), shapes in alike.items():
        for _ in measure_shapes(
            scratch, shapes, batches, ("dense", *contenders), device, dtype, seed=seed, repeats=_REPEATS
        ):
            pass
    keys = {_key(shape, batch, dtype_name(dtype), contender) for shape, batch, contender in entries}
    return {key: ratio for key, ratio in ratios_of(scratch, "this run").items() if key in keys}


def _key(shape: LinearShape, batch: int, dtype: str, contender: str) -> Key:
    return ("kernels", shape.out_features, shape.in_features, batch, dtype, contender)


def _kernel_key(row: dict[str, Any]) -> Key:
    return ("kernels", row["out_features"], row["in_features"], row["batch"], row["dtype"], row["contender"])


def _print(record: dict[str, Any], tolerance_percent: float) -> None:
    print(f"{'what, as times faster than dense in the same run':<64}{'before':>9}{'now':>9}{'change':>9}")
    for row in record["results"]:
        now = f"{'-':>9}{'-':>9}" if row["now"] is None else f"{row['now']:>8.2f}x{row['change']:>+9.1%}"
        remark = f"  {row['reason']}" if row["reason"] else "  slower" if row["slower"] else ""
        print(f"{row['what']:<64}{row['before']:>8.2f}x{now}{remark}")
    for line in remarks(record):
        print(line)
    slower = [row for row in record["results"] if row["slower"] or row["correct"] is False]
    sources = ", ".join(sorted({row["source"] for row in record["results"]}))
    count = len(record["results"])
    if slower:
        print(
            f"{len(slower)} of {count} ratios fell by more than {tolerance_percent:g} % or are wrong, against {sources}"
        )
    else:
        print(f"none of {count} ratios fell by more than {tolerance_percent:g} %, against {sources}")
