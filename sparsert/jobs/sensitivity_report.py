"""``sparsert report``: what removing each block and masking each layer would cost and save, before anything is changed.

Printed as a table, a line a block: loss without the block, what that saves, and the loss with a 2:4 mask on each of
its layers alone. Below stand plans for a budget, each with the sum it was chosen by and the loss that was measured of
it as a whole. ``--output`` writes everything as JSON, ``--png`` draws it.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsert.errors import CheckpointError, InputError
from sparsert.jobs.calibration_job import CalibrationOptions, open_job
from sparsert.jobs.options import REQUIRED, option

if TYPE_CHECKING:
    from torch import Tensor

    from sparsert.compress.anatomy import Anatomy
    from sparsert.compress.sensitivity import Change, Sensitivity, Suggestion
    from sparsert.jobs.measurements import Measurements


@dataclasses.dataclass(frozen=True)
class ReportOptions(CalibrationOptions):
    """What ``sparsert report`` takes."""

    output: str = option(REQUIRED, "JSON file to write", metavar="FILE")
    method: str = option("wanda", "how the masks that are tried are made", choices=("magnitude", "wanda"))
    windows: int = option(16, "windows of the text whose loss is measured")
    layer_times: str | None = option(
        None, "record of `sparsert bench kernels`, for microseconds (default: bytes only)", metavar="FILE"
    )
    batch: int = option(1, "texts decoded at a time, for --layer-times")
    save: float = option(0.2, "suggest plans that save this share of the bytes of the blocks' linear layers")
    save_us: float | None = option(None, "suggest plans that save this share of their microseconds instead")
    force: bool = option(False, "also suggest to remove blocks 0-3 and the last two")
    png: str | None = option(None, "draw the changes into this PNG file (needs matplotlib)", metavar="FILE")


@dataclasses.dataclass(frozen=True)
class Plan:
    """A suggestion that was measured.

    Attributes:
        suggestion: what to remove and mask.
        loss: of the text under it as a whole, in nats a token; None where it could not be made.
        reason: why it could not.
    """

    kind: str
    suggestion: Suggestion | None
    loss: float | None
    reason: str | None = None


@dataclasses.dataclass(frozen=True)
class ReportResult:
    """What was measured.

    Attributes:
        output: the JSON file.
        method: how masks were made.
        sensitivity: every change.
        plans: suggestions, by blocks, masks and both.
        unit: ``bytes`` or ``us``: what the plans save.
        wanted: how much they were to save.
    """

    output: Path
    method: str
    sensitivity: Sensitivity
    plans: tuple[Plan, ...]
    unit: str
    wanted: float

    def to_dict(self) -> dict[str, Any]:
        """The same as plain JSON types."""
        return {
            "output": str(self.output),
            "method": self.method,
            "unit": self.unit,
            "wanted": self.wanted,
            **dataclasses.asdict(self.sensitivity),
            "plans": [_plan_record(plan) for plan in self.plans],
        }

    def to_text(self) -> str:
        """The table and the plans."""
        return "\n".join([*_table(self.sensitivity, self.method), "", *_plan_lines(self)])


def report(options: ReportOptions) -> ReportResult:
    """Run the job.

    Raises:
        SparsertError: what the options ask for cannot be done.
    """
    from sparsert.compress.sensitivity import Sensitivity, make_masks, measure_changes
    from sparsert.jobs.layer_times import read_layer_times
    from sparsert.jobs.measurements import Measurements
    from sparsert.jobs.progress import Progress

    output = Path(options.output).expanduser()
    if output.is_dir() or not output.absolute().parent.is_dir():
        raise InputError(f"--output {output}: must be a file in a directory that exists")
    if options.png is not None and importlib.util.find_spec("matplotlib") is None:
        raise InputError("--png draws with matplotlib, which is not installed; run `pip install matplotlib`")
    for name in ("save", "save_us"):
        share = getattr(options, name)
        if share is not None and not 0 < share < 1:
            raise InputError(f"--{name.replace('_', '-')} {share}: give a share above 0 and below 1")
    if options.save_us is not None and options.layer_times is None:
        raise InputError("--save-us needs measured times; give --layer-times with a record of `sparsert bench kernels`")
    table = None if options.layer_times is None else read_layer_times(options.layer_times, options.batch)
    job = open_job(options)
    assert job.windows is not None  # the text is required
    # masks see other windows than those whose loss is measured, where the text has enough
    masks = make_masks(
        job.anatomy,
        options.method,
        job.windows if job.held_out is None else job.held_out,
        batch_size=options.batch_size,
    )
    with Measurements(output, job.identity, resume=options.resume) as measurements:
        sensitivity = None
        with Progress(job.anatomy.num_blocks + len(masks), "changes", "change") as progress:
            for measured in measure_changes(
                job.anatomy,
                job.windows,
                masks,
                table=table,
                batch_size=options.batch_size,
                remember=measurements.remember,
            ):
                if isinstance(measured, Sensitivity):
                    sensitivity = measured
                else:
                    progress.advance({"loss": measured.loss_increase})
        assert sensitivity is not None
        unit, whole, share = "bytes", float(sensitivity.nbytes), options.save
        if options.save_us is not None:
            assert sensitivity.us is not None
            unit, whole, share = "us", sensitivity.us, options.save_us
        plans = _plans(options, job.anatomy, job.windows, masks, sensitivity, measurements, unit, whole * share)
        result = ReportResult(output, options.method, sensitivity, plans, unit, whole * share)
        try:
            output.write_text(json.dumps(result.to_dict(), indent=2) + "\n")
            if options.png is not None:
                from sparsert.jobs.sensitivity_plot import draw

                draw(sensitivity, Path(options.png).expanduser())
        except OSError as error:
            raise CheckpointError(
                f"{error.filename or output}: cannot be written ({error.strerror or error}); check permissions "
                f"and free space, and go on with --resume"
            ) from error
    return result


def _plans(
    options: ReportOptions,
    anatomy: Anatomy,
    windows: Tensor,
    masks: dict[str, Tensor],
    sensitivity: Sensitivity,
    measurements: Measurements,
    unit: str,
    save: float,
) -> tuple[Plan, ...]:
    from sparsert.compress.sensitivity import KINDS, measure_plan, suggest_plan

    plans = []
    for kind in KINDS:
        try:
            suggestion = suggest_plan(sensitivity, kind, save=save, unit=unit, force=options.force)
        except InputError as error:
            plans.append(Plan(kind, None, None, str(error)))
            continue

        def measure(suggestion: Suggestion = suggestion) -> float:
            return measure_plan(anatomy, suggestion, windows, masks, batch_size=options.batch_size)

        # another share saved is another plan
        key = f"loss of plan {suggestion.plan} with {len(suggestion.masked)} masks of {kind} for {save:.0f} {unit}"
        plans.append(Plan(kind, suggestion, measurements.remember(key, measure)))
    if all(plan.suggestion is None for plan in plans):
        raise InputError(str(plans[-1].reason))
    return tuple(plans)


def _plan_record(plan: Plan) -> dict[str, Any]:
    if plan.suggestion is None:
        return {"kind": plan.kind, "reason": plan.reason}
    suggestion = plan.suggestion
    return {
        "kind": plan.kind,
        "removed_blocks": list(suggestion.plan.removed),
        "masked": list(suggestion.masked),
        "saved": suggestion.saved,
        "expected_increase": suggestion.expected_increase,
        "loss": plan.loss,
    }


def _table(sensitivity: Sensitivity, method: str) -> list[str]:
    """A line a block; masks of its layers in columns of their own."""
    kinds = list(dict.fromkeys(_kind(change) for change in sensitivity.changes if change.linear))
    masks = {(change.block, _kind(change)): change for change in sensitivity.changes if change.linear}
    times = sensitivity.us is not None
    head = f"{'block':>5}  {'removed':>9}  {'MB':>7}" + (f"  {'us':>8}" if times else "")
    head += "".join(f"  {kind.removesuffix('_proj'):>8}" for kind in kinds)
    lines = [
        f"loss {sensitivity.loss:.4f} (perplexity {math.exp(sensitivity.loss):.2f}); increase without each block, and "
        f"with a 2:4 {method} mask on each layer alone",
        head,
    ]
    estimated = False
    for change in sensitivity.changes:
        if change.linear:
            continue
        line = f"{change.block:>5}  {change.loss_increase:>+9.4f}  {change.saved_bytes / 1e6:>7.2f}"
        if change.saved_us is not None:
            estimated = estimated or change.estimated
            line += f"  {change.saved_us:>7.1f}{'~' if change.estimated else ' '}"
        for kind in kinds:
            mask = masks.get((change.block, kind))
            line += f"  {mask.loss_increase:>+8.4f}" if mask is not None else f"  {'':>8}"
        lines.append(line)
    if estimated:
        lines.append("~ no measured layer is near: this time is an estimate")
    if sensitivity.already_masked:
        lines.append(
            f"{len(sensitivity.already_masked)} layers are 2:4 already and were not masked again, the first "
            f"{sensitivity.already_masked[0]}"
        )
    return lines


def _plan_lines(result: ReportResult) -> list[str]:
    unit = "MB" if result.unit == "bytes" else "us"
    scale = 1e-6 if result.unit == "bytes" else 1.0
    lines = [f"plans that save {result.wanted * scale:.2f} {unit}, before any recovery:"]
    for plan in result.plans:
        if plan.suggestion is None or plan.loss is None:
            lines.append(f"  {plan.kind:>6}: {plan.reason}")
            continue
        suggestion, increase = plan.suggestion, plan.loss - result.sensitivity.loss
        lines.append(
            f"  {plan.kind:>6}: saves {suggestion.saved * scale:.2f} {unit}, loss {increase:+.4f} "
            f"measured ({suggestion.expected_increase:+.4f} as a sum), perplexity {math.exp(plan.loss):.2f}; "
            f"{suggestion.plan}, {len(suggestion.masked)} layers 2:4"
        )
    return lines


def _kind(change: Change) -> str:
    return change.name.rpartition(".")[2]
