"""A latency or throughput run: cards first, then every contender in turn, row by row, and one record.

The two differ in what is asked (one batch at a time, or many prompts at once) and in the number that a
speed-up is made of; everything else is here. The dense baseline runs first, so that every later row has its
speed-up as soon as it is measured. A speed-up stands only in a row whose logits, and whose baseline's, were
checked and found right. Whatever a contender could not do is a line of its own and an entry of the record, and the
others go on.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from sparsert.bench.cut_off import keeping
from sparsert.bench.generation_table import HEAD, row_line
from sparsert.bench.metrics import share_of_read
from sparsert.bench.model_options import add_model_options, check_corners, parse_settings, subject_of
from sparsert.bench.options import parse_counts, parse_names, remarks, resolve_dtype, settings_of, show
from sparsert.bench.peers import PEERS, Entry, Events, Start, generation_job, line_up, start_process, why_absent
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
    load.add_argument("--runs", metavar="N", type=int, default=runs, help=f"measured runs, at most (default: {runs})")
    load.add_argument("--warmup", metavar="N", type=int, default=1, help="runs before them (default: 1)")
    load.add_argument(
        "--time-limit",
        metavar="SECONDS",
        type=float,
        default=10.0,
        help="begin no further run of a setting that would end beyond it; one is always made (default: 10)",
    )
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
    """Measure all contenders, print cards and the table as it grows, and return the record.

    Args:
        kind: ``latency`` or ``throughput``.
        arguments: with the options of :func:`add_generation_options` and the common ones.
        prompts_of: prompts sent for a batch size.
        start: how a job is run; default in a fresh process.

    Raises:
        InputError, UnsupportedError, CheckpointError: options that do not fit.
        CutOff: a signal ended the run; it has the record so far.
    """
    from sparsert.bench.kernels import roofs_sentence, start_record
    from sparsert.models import resolve_device

    device = resolve_device(arguments.device)  # with its number, which another process needs
    dtype = resolve_dtype(arguments.dtype, device)
    peers = parse_names(arguments.peers, PEERS, "--peers")
    for option, value, least in (("--runs", arguments.runs, 1), ("--warmup", arguments.warmup, 0)):
        if value < least:
            raise InputError(f"{option} {value}: give a whole number from {least}")
    for option, seconds in (("--timeout", arguments.timeout), ("--time-limit", arguments.time_limit)):
        if not seconds > 0:
            raise InputError(f"{option} {seconds:g}: give seconds, more than 0")
    subject, notes = subject_of(arguments, dtype)
    check_corners(arguments.corners, subject)
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
    show(roofs_sentence(record))
    for line in remarks(record, "skipped"):
        show(line)
    for entry in entries:
        if entry.peer in ("ours", "dense"):
            card = entry.subject.card()
            record["settings"]["cards"].append(card.to_dict())
            show(card.to_text(record["roofs"]["read_bytes_per_s"]))

    show(HEAD)
    with keeping(record), _Progress(len(entries) * len(settings)) as progress:
        for entry in entries:
            progress.say(entry.label)
            contender = _Contender(record, entry, settings, progress)
            reason = why_absent(entry.peer, device.type)
            if reason is not None:
                contender.skip(reason)
                continue
            job = generation_job(
                entry,
                settings,
                device=str(device),
                warmup=arguments.warmup,
                runs=arguments.runs,
                time_limit_s=arguments.time_limit,
                seed=arguments.seed,
                check=not arguments.no_check,
            )
            contender.follow(start(job, arguments.timeout))
    for line in remarks(record, "fallbacks", "notes"):  # what was skipped stands where it happened
        show(line)
    return record


class _Contender:
    """What becomes of the events of one contender: rows, skipped entries and fallbacks of the record, and lines."""

    def __init__(self, record: dict[str, Any], entry: Entry, settings: Sequence[Setting], progress: _Progress) -> None:
        self._record, self._entry, self._progress = record, entry, progress
        self._settings = settings
        self._open = dict(enumerate(settings))
        self._facts: Row = {}
        self._started = self._last = time.perf_counter()

    def follow(self, events: Events) -> None:
        """Take events until they end."""
        with contextlib.closing(events):
            for told in events:
                event = dict(told)
                name = event.pop("event")
                if name == "loaded":
                    sentences = event.pop("fallbacks")
                    self._record["fallbacks"] += [f"{self._entry.label}: {sentence}" for sentence in sentences]
                    self._facts = event | {"start_s": time.perf_counter() - self._started}
                elif name == "row":
                    self._add_row(self._open.pop(event.pop("setting")), event)
                elif name == "skipped":
                    setting = self._open.pop(event.pop("setting"))
                    self.skip(f"{setting}: {event['reason']}", 1)
                elif name == "failed":
                    done = len(self._settings) - len(self._open)
                    when = f"after {done} of {len(self._settings)} settings: " if done else ""
                    self.skip(when + event["reason"])

    def skip(self, reason: str, settings: int | None = None) -> None:
        """Say and record that settings, by default all that are left, are not measured."""
        # ours may run in several corners
        who = f"{self._entry.label}, " if self._entry.peer == "ours" else ""
        self._record["skipped"].append({"peer": self._entry.peer, "reason": who + reason})
        show(remarks(self._record, "skipped")[-1])
        self._progress.step(len(self._open) if settings is None else settings)

    def _add_row(self, setting: Setting, measured: Row) -> None:
        subject, record = self._entry.subject, self._record
        kv_bytes_per_token = subject.card().kv_bytes_per_token
        tpot, share = measured["tpot_ms"], None
        if tpot is not None:
            read = record["roofs"]["read_bytes_per_s"]
            share = share_of_read(self._facts["read_bytes"], kv_bytes_per_token, setting, tpot["p50"], read)
        now = time.perf_counter()
        row = {
            "peer": self._entry.peer,
            "corner": subject.corner,
            "model": subject.name,
            "dtype": subject.dtype,
            **setting.to_json(),
            **measured,
            "share_of_read": share,
            **self._facts,
            # of the whole process in its first row, then of each further one: they add up
            "wall_s": now - self._last,
            "kv_bytes_per_token": kv_bytes_per_token,
        }
        self._last = now
        record["results"].append(row | {"speedup_vs_dense": _speedup(record, row)})
        if row["correct"] is False:
            record["notes"].append(
                f"{row['peer']}, {row['corner']}, batch {row['batch']}: wrong logits (error {row['error']:.2e}, "
                f"torch's {row['torch_error']:.2e}), so no speed-up is given"
            )
        show(row_line(record["results"][-1]))
        self._progress.step(1)


def _speedup(record: dict[str, Any], row: Row) -> float | None:
    """How many times better than the dense row of the same question; None unless both were found right."""
    key, more_is_better = _COMPARED[record["kind"]]

    def value(row: Row) -> float | None:
        found = row[key]
        if key == "tpot_ms" and row["output_len"] == 1:
            found = row["e2e_ms"]  # a single token has no time per further token
        return found["p50"] if isinstance(found, dict) else found

    asked = ("batch", "input_len", "output_len")
    for dense in record["results"]:
        if dense["peer"] == "dense" and all(dense[name] == row[name] for name in asked):
            own, others = value(row), value(dense)
            if row["correct"] is True and dense["correct"] is True and own and others:
                return own / others if more_is_better else others / own
    return None


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
        """Name what runs now."""
        self._bar.set_description(what)

    def step(self, settings: int) -> None:
        """Move on."""
        self._bar.update(settings)
