"""A latency or throughput run: cards first, then every contender in turn, then one table and one record.

The two differ in what is asked (one batch at a time, or many prompts at once) and in the number that a
speed-up is made of; everything else is here. A speed-up stands only in a row whose logits, and whose
baseline's, were checked and found right. Whatever a contender could not do is a line of its own and an
entry of the record, and the others go on.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

from sparsert.bench.card import amount
from sparsert.bench.metrics import share_of_read
from sparsert.bench.model_options import add_model_options, parse_settings, subject_of
from sparsert.bench.options import parse_counts, parse_names, resolve_dtype, settings_of
from sparsert.bench.peers import PEERS, Entry, Start, generation_job, line_up, start_process
from sparsert.bench.workload import LENGTH_PRESETS, Setting
from sparsert.errors import InputError

Row = dict[str, Any]

_DEFAULT_BATCHES = {"cuda": "1,4,16", "cpu": "1,2"}
_DEFAULT_LENGTHS = {"cuda": "128/128", "cpu": "16/16"}

#: What a speed-up compares: key of the row, and whether more is better.
_COMPARED: dict[str, tuple[str, bool]] = {"latency": ("tpot_ms", False), "throughput": ("output_tok_per_s", True)}


def add_generation_options(parser: argparse.ArgumentParser, *, runs: int) -> None:
    """Add the options that latency and throughput share.

    Args:
        runs: default of ``--runs``.
    """
    add_model_options(parser)
    parser.add_argument(
        "--corners", action="store_true", help="all four: dense, 2:4, blocks removed, both (needs --remove-blocks)"
    )
    parser.add_argument(
        "--peers",
        metavar="NAMES",
        default="dense",
        help=f"whom to compare with, each in a process of its own: {', '.join(PEERS)}, all or none (default: dense)",
    )
    load = parser.add_argument_group("what to ask")
    load.add_argument("--batch", metavar="LIST", help="texts at once, e.g. 1,4,16 (default: 1,4,16; on a CPU 1,2)")
    load.add_argument(
        "--lengths",
        metavar="P/N,...",
        help=f"prompt and output tokens, e.g. 128/512, or {', '.join(LENGTH_PRESETS)} for those of the papers "
        "(default: 128/128; on a CPU 16/16)",
    )
    load.add_argument("--runs", metavar="N", type=int, default=runs, help=f"measured runs (default: {runs})")
    load.add_argument("--warmup", metavar="N", type=int, default=1, help="runs before them (default: 1)")
    load.add_argument(
        "--no-check", action="store_true", help="leave out the check of the logits, and with it every speed-up"
    )
    load.add_argument(
        "--timeout",
        metavar="SECONDS",
        type=float,
        default=600.0,
        help="end a contender that says nothing for so long (default: 600)",
    )


def run_generation(
    kind: str,
    arguments: argparse.Namespace,
    *,
    prompts_of: Callable[[int], int] = lambda batch: batch,
    start: Start = start_process,
) -> dict[str, Any]:
    """Measure all contenders, print cards and table, and return the record.

    Args:
        kind: ``latency`` or ``throughput``.
        arguments: with the options of :func:`add_generation_options` and the common ones.
        prompts_of: prompts sent for a batch size.
        start: how a job is run; default in a fresh process.

    Raises:
        InputError, UnsupportedError, CheckpointError: options that do not fit.
    """
    from sparsert.bench.foreign_contenders import why_absent
    from sparsert.bench.kernels import roofs_sentence, start_record
    from sparsert.models import resolve_device

    device = resolve_device(arguments.device)  # with its number, which another process needs
    dtype = resolve_dtype(arguments.dtype, device)
    peers = parse_names(arguments.peers, PEERS, "--peers")
    for option, value, least in (("--runs", arguments.runs, 1), ("--warmup", arguments.warmup, 0)):
        if value < least:
            raise InputError(f"{option} {value}: give a whole number from {least}")
    if not arguments.timeout > 0:
        raise InputError(f"--timeout {arguments.timeout:g}: give seconds, more than 0")
    subject, notes = subject_of(arguments, dtype)
    if arguments.corners and (not subject.removed or not subject.sparse):
        raise InputError("--corners compares dense, 2:4, blocks removed and both; give --remove-blocks N, and no dense")
    batches = parse_counts(arguments.batch or _DEFAULT_BATCHES[device.type], "--batch")
    lengths = arguments.lengths or _DEFAULT_LENGTHS[device.type]
    settings = parse_settings(lengths, batches, subject, {batch: prompts_of(batch) for batch in batches})
    entries, left_out = line_up(subject, peers, corners=arguments.corners)

    record = start_record(
        kind,
        settings_of(arguments)
        | {
            "model": subject.name,  # a path of this machine means nothing to the next reader
            "peers": peers,
            "batch": batches,
            "lengths": lengths,
            "removed": list(subject.removed),
            "device": str(device),
            "dtype": subject.dtype,
            "cards": [],
        },
        device,
        dtype,
    )
    record["notes"] += notes
    record["skipped"] += left_out
    print(roofs_sentence(record), flush=True)
    for entry in entries:
        if entry.peer in ("ours", "dense"):
            card = entry.subject.card()
            record["settings"]["cards"].append(card.to_dict())
            print(card.to_text(record["roofs"]["read_bytes_per_s"]), flush=True)

    with _Progress(len(entries) * len(settings)) as progress:
        for entry in entries:
            progress.say(entry.label)
            reason = why_absent(entry.peer, device)
            if reason is not None:
                record["skipped"].append({"peer": entry.peer, "reason": reason})
                progress.step(len(settings))
                continue
            job = generation_job(
                entry,
                settings,
                device=str(device),
                warmup=arguments.warmup,
                runs=arguments.runs,
                seed=arguments.seed,
                check=not arguments.no_check,
            )
            _collect(record, entry, settings, start(job, arguments.timeout), progress.step)
    _add_speedups(record, *_COMPARED[kind])
    for line in table_lines(record):
        print(line)
    return record


def _collect(
    record: dict[str, Any], entry: Entry, settings: Sequence[Setting], events: Any, step: Callable[[int], None]
) -> None:
    """Turn the events of one contender into rows, skipped entries and fallbacks of the record."""
    facts: dict[str, Any] = {}
    who = f"{entry.label}, " if entry.peer == "ours" else ""  # ours may run in several corners
    open_settings = dict(enumerate(settings))
    for told in events:
        event = dict(told)
        name = event.pop("event")
        if name == "loaded":
            record["fallbacks"] += [f"{entry.label}: {sentence}" for sentence in event.pop("fallbacks")]
            facts = event
        elif name == "row":
            step(1)
            setting = open_settings.pop(event.pop("setting"))
            record["results"].append(_row(record, entry, setting, facts, event))
        elif name == "skipped":
            step(1)
            setting = open_settings.pop(event.pop("setting"))
            record["skipped"].append({"peer": entry.peer, "reason": f"{who}{setting}: {event['reason']}"})
        elif name == "failed":
            done = len(settings) - len(open_settings)
            when = f"after {done} of {len(settings)} settings: " if done else ""
            record["skipped"].append({"peer": entry.peer, "reason": f"{who}{when}{event['reason']}"})
    step(len(open_settings))


def _row(record: dict[str, Any], entry: Entry, setting: Setting, facts: Row, measured: Row) -> Row:
    subject = entry.subject
    kv_bytes_per_token = subject.card().kv_bytes_per_token
    tpot = measured["tpot_ms"]
    read = record["roofs"]["read_bytes_per_s"]
    share = None
    if tpot is not None:
        share = share_of_read(facts["read_bytes"], kv_bytes_per_token, setting, tpot["p50"], read)
    return {
        "peer": entry.peer,
        "corner": subject.corner,
        "model": subject.name,
        "dtype": subject.dtype,
        **setting.to_json(),
        **measured,
        "share_of_read": share,
        **facts,
        "kv_bytes_per_token": kv_bytes_per_token,
        "speedup_vs_dense": None,
    }


def _add_speedups(record: dict[str, Any], key: str, more_is_better: bool) -> None:
    """Fill ``speedup_vs_dense`` where both rows were found right, and note which were found wrong."""
    rows = record["results"]

    def asked(row: Row) -> tuple[int, ...]:
        return row["batch"], row["input_len"], row["output_len"]

    def value(row: Row) -> float | None:
        found = row[key]
        if key == "tpot_ms" and row["output_len"] == 1:
            found = row["e2e_ms"]  # a single token has no time per further token
        return found["p50"] if isinstance(found, dict) else found

    baselines = {asked(row): row for row in rows if row["peer"] == "dense"}
    for row in rows:
        if row["correct"] is False:
            record["notes"].append(
                f"{row['peer']}, {row['corner']}, batch {row['batch']}: wrong logits (error {row['error']:.2e}, "
                f"torch's {row['torch_error']:.2e}), so no speed-up is given"
            )
        dense = baselines.get(asked(row))
        if dense is None or dense is row or not (row["correct"] is True and dense["correct"] is True):
            continue
        own, others = value(row), value(dense)
        if own and others:
            row["speedup_vs_dense"] = own / others if more_is_better else others / own


_HEAD = (
    f"{'contender':<22}{'batch':>6}{'lengths':>11}{'TTFT ms':>10}{'TPOT ms':>9}{'p95':>9}{'ITL p99':>9}{'tok/s':>10}"
    f"{'of read':>8}{'peak':>9}{'weights':>10}{'load s':>8}{'speed-up':>10}  check"
)


def table_lines(record: dict[str, Any]) -> list[str]:
    """The table for people, and below it what was skipped, what fell back, and notes."""
    lines = [_HEAD]
    for row in record["results"]:
        name = row["corner"] if row["peer"] in ("ours", "dense") else row["peer"]
        ttft, tpot, itl = (row[key] or {} for key in ("ttft_ms", "tpot_ms", "itl_ms"))
        share = row["share_of_read"]
        speedup = row["speedup_vs_dense"]
        lines.append(
            f"{name:<22}{row['batch']:>6}{row['input_len']:>6}/{row['output_len']:<4}"
            f"{_cell(ttft.get('p50'), 10, 2)}{_cell(tpot.get('p50'), 9, 3)}{_cell(tpot.get('p95'), 9, 3)}"
            f"{_cell(itl.get('p99'), 9, 3)}{_cell(row['output_tok_per_s'], 10, 1)}"
            f"{'-' if share is None else format(share, '.0%'):>8}{_size(row['peak_bytes']):>9}"
            f"{_size(row['weight_bytes']):>10}{_cell(row['load_s'], 8, 1)}"
            f"{'-' if speedup is None else format(speedup, '.2f') + 'x':>10}  {_verdict(row)}"
        )
    lines += [f"skipped: {entry['peer']}: {entry['reason']}" for entry in record["skipped"]]
    lines += [f"fallback: {sentence}" for sentence in record["fallbacks"]]
    lines += [f"note: {sentence}" for sentence in record["notes"]]
    return lines


def _cell(value: float | None, width: int, digits: int) -> str:
    return f"{'-':>{width}}" if value is None else f"{value:>{width}.{digits}f}"


def _size(count: int | None) -> str:
    return "-" if count is None else amount(count)


def _verdict(row: Row) -> str:
    if row["correct"] is None:
        return "not checked"
    return f"{'ok' if row['correct'] else 'WRONG'} ({row['error'] / row['torch_error']:.2f} x torch's error)"


class _Progress:
    """A bar over settings on standard error, named after the contender that runs; silent without a terminal."""

    def __init__(self, total: int) -> None:
        from tqdm.auto import tqdm

        self._bar = tqdm(total=total, disable=not sys.stderr.isatty(), leave=False, file=sys.stderr)

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def say(self, what: str) -> None:
        self._bar.set_description(what)

    def step(self, count: int = 1) -> None:
        self._bar.update(count)
