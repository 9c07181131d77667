"""``sparsert bench kernels``: one linear layer at a time, ours against what a user would run instead.

Real layer shapes, random 2:4 weights rotated past L2, everything in one process on one GPU: cuBLAS on the
dense weight, ``torch.sparse`` as it is, cuSPARSELt and CUTLASS with the best of their kernels that give right results.
The roofs that shares are quoted of (a plain read, a large dense product) are measured first. Every number stands beside
its check against float64; what is wrong is not timed. What it gives up: a layer alone says nothing of the step around
it; that is ``bench latency``'s and ``bench profile``'s matter.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Generator, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from sparsert.bench.architectures import ARCHITECTURES
from sparsert.bench.cut_off import keeping
from sparsert.bench.options import (
    dtype_name,
    parse_counts,
    parse_names,
    remarks,
    resolve_dtype,
    settings_of,
    show,
)
from sparsert.bench.shapes import LAYER_KINDS, LinearShape, linear_shapes
from sparsert.errors import InputError

if TYPE_CHECKING:
    import torch

EXAMPLES = """\
examples:
  sparsert bench kernels --output record.json              every layer of Llama-2-7B and Llama-3.1-8B, every peer
  sparsert bench kernels --shapes smollm2-135m --batch 1,8,64 --peers none
  sparsert bench kernels --shapes tiny --device cpu
  SPARSERT_CUTLASS=libcutlass_sparse.so sparsert bench kernels --batch 1024,4096 --peers cutlass

CUTLASS takes part where the variable SPARSERT_CUTLASS names its kernels, compiled from benchmarks/cutlass_sparse.cu.

Columns: median microseconds of dense (cuBLAS) and ours; ours as GB/s of packed weight, as share of the read
bandwidth and of the dense rate measured at the start, error against float64 as a multiple of dense's (2 is
allowed, what is worse is not timed), and how many times faster than dense each contender is.
"""

#: Names of ``--peers``; dense always runs, since everything is relative to it.
_PEERS = ("dense", "torch-sparse", "cusparselt", "cutlass")
_BACKENDS = ("auto", "triton")

_DEFAULT_SHAPES = {"cuda": "llama-2-7b,llama-3.1-8b", "cpu": "tiny"}
_DEFAULT_BATCHES = {"cuda": "1,2,4,8,16,32,64,256,1024,4096", "cpu": "1,8,16"}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add what only this command takes."""
    what = parser.add_argument_group("what to measure")
    what.add_argument(
        "--shapes",
        metavar="MODELS",
        help=f"of {', '.join(ARCHITECTURES)}, separated by commas, or all (default: {_DEFAULT_SHAPES['cuda']})",
    )
    what.add_argument(
        "--layers",
        choices=LAYER_KINDS,
        default="all",
        help="layers as the engine fuses them, separate ones, or all (default: all)",
    )
    what.add_argument("--batch", metavar="LIST", help=f"rows of input (default: {_DEFAULT_BATCHES['cuda']})")
    what.add_argument(
        "--peers",
        metavar="LIST",
        default="all",
        help=f"of {', '.join(_PEERS)}, or all, or none; dense runs always (default: all)",
    )
    what.add_argument(
        "--backends",
        metavar="LIST",
        default="all",
        help="ours: auto, which is what users get, and triton, or all (default: all)",
    )
    what.add_argument("--repeats", metavar="N", type=int, default=15, help="runs a median is taken of (default: 15)")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure, print the table as it grows, and return the record.

    Raises:
        InputError: an option does not fit.
        UnsupportedError: the device is not there.
        CutOff: a signal ended the run; it has the record so far.
    """
    from sparsert.models import resolve_device

    device = resolve_device(arguments.device)
    dtype = resolve_dtype(arguments.dtype, device)
    models = parse_names(arguments.shapes or _DEFAULT_SHAPES[device.type], ARCHITECTURES, "--shapes")
    batches = parse_counts(arguments.batch or _DEFAULT_BATCHES[device.type], "--batch")
    peers = parse_names(arguments.peers, _PEERS, "--peers")
    backends = parse_names(arguments.backends, _BACKENDS, "--backends")
    if arguments.repeats < 1:
        raise InputError(f"--repeats {arguments.repeats}: give a number from 1")
    if not models:
        raise InputError("--shapes none: there is nothing to measure; name at least one model")
    names = {"auto": "ours", "triton": "ours-triton"}
    contenders = ["dense", *(names[backend] for backend in backends), *(peer for peer in peers if peer != "dense")]
    shapes = [shape for model in models for shape in linear_shapes(model, arguments.layers)]
    settings = settings_of(arguments) | {
        "shapes": models,
        "batch": batches,
        "contenders": contenders,
        "device": str(device),
        "dtype": dtype_name(dtype),
    }
    record = start_record("kernels", settings, device, dtype)
    show(roofs_sentence(record))
    show(table_head(contenders))
    groups = measure_shapes(
        record, shapes, batches, contenders, device, dtype, seed=arguments.seed, repeats=arguments.repeats
    )
    with keeping(record), contextlib.closing(groups):
        for rows in groups:
            show(table_line(rows, contenders))
    for line in closing_lines(record):
        show(line)
    return record


def start_record(kind: str, settings: dict[str, Any], device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """A new record with the roofs measured now."""
    from sparsert.bench.records import new_record
    from sparsert.bench.timing import measure_roofs

    record = new_record(kind, settings, device=device, roofs=measure_roofs(device, dtype))
    if record["roofs"]["read_bytes_per_s"] is None:
        record["notes"].append("the read bandwidth was not measured: triton, which its kernel needs, is not installed")
    return record


def measure_shapes(
    record: dict[str, Any],
    shapes: Sequence[LinearShape],
    batches: Sequence[int],
    contenders: Sequence[str],
    device: torch.device,
    dtype: torch.dtype,
    *,
    seed: int,
    repeats: int,
) -> Generator[list[dict[str, Any]], None, None]:
    """Measure layers and put their rows into a record.

    Layers of equal shape are measured once and get a row each. Contenders that could not run at all come
    into ``record["skipped"]``, kernels that were passed over because they are missing into ``fallbacks``.

    Yields:
        The rows of one layer and batch, one a contender, as they are appended to ``record["results"]``.
    """
    from tqdm.auto import tqdm

    from sparsert.bench.isolation import measure_layers
    from sparsert.bench.layers import LayerTask

    by_shape: dict[tuple[int, int], list[LinearShape]] = {}
    for shape in shapes:
        by_shape.setdefault((shape.out_features, shape.in_features), []).append(shape)
    tasks = [
        LayerTask(*size, tuple(batches), tuple(contenders), str(device), dtype_name(dtype), seed, repeats)
        for size in by_shape
    ]
    labels = list(by_shape.values())
    with tqdm(total=len(tasks) * len(batches), desc="layers", disable=not sys.stderr.isatty(), leave=False) as bar:
        for index, rows in measure_layers(tasks, isolated=device.type == "cuda"):
            _note_fallbacks(record, rows, device, dtype)
            for shape in labels[index]:
                full = [_labelled(row, shape, record["roofs"]) for row in rows]
                record["results"] += full
                yield full
            bar.update()
    _note_skipped(record, contenders)


def _labelled(row: dict[str, Any], shape: LinearShape, roofs: dict[str, float | None]) -> dict[str, Any]:
    """A row with its model and layer in front and its shares of the roofs."""

    def share(value: float | None, unit: float, roof: float | None) -> float | None:
        return None if value is None or roof is None else value * unit / roof

    return {
        "model": shape.model,
        "layer": shape.layer,
        **row,
        "share_of_read": share(row["gb_per_s"], 1e9, roofs["read_bytes_per_s"]),
        "share_of_rate": share(row["tflop_per_s"], 1e12, roofs["dense_flop_per_s"]),
    }


def _note_fallbacks(
    record: dict[str, Any], rows: Iterable[dict[str, Any]], device: torch.device, dtype: torch.dtype
) -> None:
    from sparsert import ops

    for row in rows:
        if row["contender"] != "ours" or row["time_us"] is None:
            continue
        choice = ops.explain(row["out_features"], row["in_features"], row["batch"], device=device, dtype=dtype)
        for kernel, why in choice.rejected:
            sentence = f"{kernel} was passed over for {choice.kernel}: {why}"
            if why.startswith("unavailable") and sentence not in record["fallbacks"]:
                record["fallbacks"].append(sentence)


def _note_skipped(record: dict[str, Any], contenders: Iterable[str]) -> None:
    for contender in contenders:
        rows = [row for row in record["results"] if row["contender"] == contender]
        if rows and all(row["time_us"] is None for row in rows):
            for reason in dict.fromkeys(row["reason"] for row in rows):
                record["skipped"].append({"peer": contender, "reason": reason})


def roofs_sentence(record: dict[str, Any]) -> str:
    """The first line of the output: where, and the two roofs."""
    machine, roofs = record["machine"], record["roofs"]
    read, rate = roofs["read_bytes_per_s"], roofs["dense_flop_per_s"]
    bandwidth = "not measured" if read is None else f"{read / 1e12:.3g} TB/s"
    product = f"dense {record['settings']['dtype']} product {rate / 1e12:.3g} TFLOP/s"
    return f"{machine['gpu'] or machine['cpu']}: plain read {bandwidth}, {product}"


def table_head(contenders: Sequence[str]) -> str:
    """Heads of the columns of :func:`table_line`."""
    others = "".join(f"{name:>13}" for name in contenders if name != "dense")
    return (
        f"{'layer':<40}{'batch':>6}{'dense us':>10}{'ours us':>10}{'GB/s':>7}{'of read':>8}{'of rate':>8}{'error':>7}"
        f"{others}"
    )


def table_line(rows: Sequence[dict[str, Any]], contenders: Sequence[str]) -> str:
    """One layer at one batch: times of dense and ours, then how many times faster each contender is."""
    by_name = {row["contender"]: row for row in rows}
    dense, ours = by_name["dense"], by_name.get("ours", {})
    label = f"{dense['model']} {dense['layer']} {dense['out_features']}x{dense['in_features']}"
    error = None if ours.get("error") is None else ours["error"] / dense["dense_error"]
    cells = [
        f"{label:<40}{dense['batch']:>6}",
        _cell(_median(dense), "10.2f"),
        _cell(_median(ours), "10.2f"),
        _cell(ours.get("gb_per_s"), "7.0f"),
        _cell(ours.get("share_of_read"), "8.0%"),
        _cell(ours.get("share_of_rate"), "8.0%"),
        _cell(error, "7.2f"),
    ]
    for name in contenders:
        if name != "dense":
            cells.append(_speedup_cell(by_name[name]))
    return "".join(cells)


def _median(row: dict[str, Any]) -> float | None:
    return row["time_us"]["median"] if row.get("time_us") else None


def _cell(value: float | None, form: str) -> str:
    width = int(form.split(".")[0])
    return f"{'-':>{width}}" if value is None else f"{value:{form}}"


def _speedup_cell(row: dict[str, Any]) -> str:
    if row["correct"] is False:
        return f"{'wrong':>13}"
    return f"{'-':>13}" if row["speedup"] is None else f"{row['speedup']:>12.2f}x"


def closing_lines(record: dict[str, Any]) -> list[str]:
    """What follows the table: the least speed-ups, who was skipped and why, fallbacks, notes."""
    lines = []
    ours = [row for row in record["results"] if row["contender"] == "ours" and row["speedup"] is not None]
    small = [row["speedup"] for row in ours if row["batch"] <= 16]
    if small:
        lines.append(
            f"ours, every result checked: at least {min(small):.2f}x dense up to batch 16, "
            f"at least {min(row['speedup'] for row in ours):.2f}x overall"
        )
    for row in record["results"]:
        if row["correct"] is False:
            layer = f"{row['out_features']}x{row['in_features']}, batch {row['batch']}"
            lines.append(f"wrong: {row['contender']} on {layer}: {row['reason']}")
    return lines + remarks(record)
