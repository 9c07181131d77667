"""``sparsert bench profile``: one decode step, split into parts, for the dense model and the pruned one.

It answers why a speed-up is what it is: 2:4 shortens the linear layers and nothing else, so what attention,
norms, the head and gaps take is what remains. On a GPU it also shows the longest time in which no kernel runs. How
times are taken stands in ``step_profile``.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
from typing import Any

import torch

from sparsert.bench.card import corner_name
from sparsert.bench.cut_off import keeping
from sparsert.bench.model_options import add_model_options, subject_of
from sparsert.bench.options import parse_counts, progress, remarks, resolve_dtype, settings_of, show
from sparsert.bench.peer_worker import reason_of
from sparsert.bench.subject import Subject, build_model
from sparsert.errors import InputError

EXAMPLES = """\
examples:
  sparsert bench profile --arch llama-3.1-8b --batch 1,16 --output profile.json
  sparsert bench profile --model DIR --remove-blocks 21-25,27 --context 2048 --top 10
"""

#: Above it a note says that the profiler changed the step's time.
_PROFILER_TOLERANCE = 0.03

#: Characters of a kernel's name that are shown; the record has all of it.
_NAME_WIDTH = 90


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add this command's own options."""
    add_model_options(parser)
    parser.add_argument("--no-dense", action="store_true", help="leave out the dense model")
    step = parser.add_argument_group("the step")
    step.add_argument("--batch", metavar="LIST", default="1", help="texts at once, each profiled (default: 1)")
    step.add_argument("--context", metavar="N", type=int, default=128, help="tokens before the step (default: 128)")
    step.add_argument("--steps", metavar="N", type=int, default=20, help="steps that are measured (default: 20)")
    step.add_argument(
        "--top", metavar="N", type=int, default=0, help="also list the N kernels that add most (default: 0)"
    )


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Profile, print the table and return the record.

    Raises:
        InputError, UnsupportedError, CheckpointError: options that do not fit.
        CutOff: a signal ended the run; it has the record so far.
    """
    from sparsert.bench.records import new_record
    from sparsert.bench.step_profile import SPARE_POSITIONS
    from sparsert.engine.runner import MAX_BATCH_SIZE
    from sparsert.models import resolve_device

    device = resolve_device(arguments.device)
    dtype = resolve_dtype(arguments.dtype, device)
    batches = parse_counts(arguments.batch, "--batch")
    if max(batches) > MAX_BATCH_SIZE:
        raise InputError(f"--batch {arguments.batch}: the engine runs up to {MAX_BATCH_SIZE} texts at once")
    subject, notes = subject_of(arguments, dtype)
    for option, value in (("--context", arguments.context), ("--steps", arguments.steps)):
        if value < 1:
            raise InputError(f"{option} {value}: give a whole number from 1")
    if arguments.top < 0:
        raise InputError(f"--top {arguments.top}: give a whole number from 0")
    most = subject.config.max_position_embeddings - arguments.steps - SPARE_POSITIONS
    if arguments.context > most:
        raise InputError(f"--context {arguments.context}: {subject.name} has room for {most} and the steps; give fewer")
    record = new_record(
        "profile",
        settings_of(arguments) | {"model": subject.name, "device": str(device), "dtype": subject.dtype},
        device=device,
    )
    record["notes"] += notes
    if device.type == "cpu":
        record["notes"].append("on a CPU under the profiler, which makes every operator slower: shares are rough")
    with keeping(record):
        for part in progress(_subjects(subject, with_dense=not arguments.no_dense), "profile"):
            try:
                _profile(record, part, device, batches, arguments)
            except torch.OutOfMemoryError as error:
                record["skipped"].append({"peer": _peer(part), "reason": f"{part.corner}: {reason_of(error)}"})
            gc.collect()  # runners and their graphs refer to each other
    for line in table_lines(record):
        show(line)
    return record


def _profile(
    record: dict[str, Any], subject: Subject, device: torch.device, batches: list[int], arguments: argparse.Namespace
) -> None:
    """Append the rows of one model."""
    from sparsert.bench.step_profile import profile_step

    model = build_model(subject, device)
    for batch in batches:
        found = profile_step(model, batch, arguments.context, steps=arguments.steps)
        ratio = found.profiled_us / found.step_us
        if abs(ratio - 1) > _PROFILER_TOLERANCE:
            record["notes"].append(
                f"{subject.corner}, batch {batch}: under the profiler the step took {ratio:.3f} of its time; the parts "
                "are its shares of the time without it"
            )
        top = found.operations[: arguments.top]
        record["results"] += [
            {
                "peer": _peer(subject),
                "corner": subject.corner,
                "model": subject.name,
                "dtype": subject.dtype,
                "batch": batch,
                "context": arguments.context,
                "part": name,
                "us": spent,
                "share": spent / found.step_us,
                "step_us": found.step_us,
                "profiled_us": found.profiled_us,
                "kernels": found.kernels,
                "largest_gap_us": found.largest_gap_us,
            }
            | ({"top": [dataclasses.asdict(operation) for operation in top if operation.part == name]} if top else {})
            for name, spent in found.parts_us.items()
        ]


def _peer(subject: Subject) -> str:
    return "dense" if subject.corner == corner_name(False, False) else "ours"


def _subjects(subject: Subject, *, with_dense: bool) -> list[Subject]:
    dense = subject.at_corner(sparse=False, removed=())
    subjects = [dense] if with_dense or subject.corner == dense.corner else []
    return subjects if subject.corner == dense.corner else [*subjects, subject]


def table_lines(record: dict[str, Any]) -> list[str]:
    """The table for people: a column for each model and batch, a line for each part; below it kernels and notes."""
    rows = record["results"]
    columns = list(dict.fromkeys((row["corner"], row["batch"]) for row in rows))
    parts = list(dict.fromkeys(row["part"] for row in rows))
    by_place = {(row["corner"], row["batch"], row["part"]): row for row in rows}
    if not rows:
        return remarks(record)
    lines = [f"{'us of a decode step':<26}" + "".join(f"{f'{c}, batch {b}':>32}" for c, b in columns)]
    for part in parts:
        cells = [by_place[(*column, part)] for column in columns]
        lines.append(f"{part:<26}" + "".join(f"{cell['us']:>24.1f}{cell['share']:>8.1%}" for cell in cells))
    steps = [by_place[(*column, parts[0])]["step_us"] for column in columns]
    lines.append(f"{'all':<26}" + "".join(f"{step:>24.1f}{1:>8.1%}" for step in steps))
    for corner, batch in columns:
        of_column = [by_place[corner, batch, part] for part in parts]
        lines += _kernel_lines(f"{corner}, batch {batch}", of_column)
    return lines + remarks(record)


def _kernel_lines(name: str, rows: list[dict[str, Any]]) -> list[str]:
    """What there is to say of the kernels of one profile: how many, the largest gap, and those that add most."""
    lines = []
    if rows[0].get("kernels") is not None:  # neither on a CPU nor in older records
        gap = rows[0]["largest_gap_us"]
        lines.append(f"{name}: {rows[0]['kernels']} kernels a step, largest gap between two {gap:.1f} us")
    top = sorted((entry for row in rows for entry in row.get("top", ())), key=lambda entry: -entry["us"])
    if top:
        lines.append(f"{f'adding most to {name}':<50}{'us':>10}{'count':>8}{'us each':>10}  name")
    for entry in top:
        # several kernels of one name, or on a CPU an operator that does not run in every step
        each = entry["us"] / max(1, entry["count"])
        shown = entry["name"].removeprefix("void ").replace("(anonymous namespace)::", "")[:_NAME_WIDTH]
        lines.append(f"{entry['part']:<50}{entry['us']:>10.1f}{entry['count']:>8}{each:>10.2f}  {shown}")
    return lines
