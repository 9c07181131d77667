"""``sparsert prune width``: trim a model to sizes that are given, or that a search finds for a budget.

With sizes (``--hidden``, ``--intermediate``, ``--heads``, ``--kv-heads``): importance is measured, the model is cut
and written. With a budget (``--parameters``, ``--bytes`` or ``--us``): candidates are found, ordered by the
importance they retain, and the first ``--top`` of them trimmed and measured on windows of the text that importance
was not measured on; with ``--search-steps`` each is distilled for that many updates first, since the loss right after
a cut says little about the loss after recovery. The best is written, untrained: recovery is ``sparsert distill``'s
matter.

``width_scores.json`` beside the weights says what was tried and what came out.
"""

from __future__ import annotations

import dataclasses
import json
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsert.errors import CheckpointError, InputError
from sparsert.jobs.calibration_job import CalibrationJob, open_job
from sparsert.jobs.prune_mask import base_name
from sparsert.jobs.width_options import WidthOptions

if TYPE_CHECKING:
    from sparsert.compress.architecture_search import Budget
    from sparsert.compress.width import Widths
    from sparsert.jobs.width_search import Tried

SCORES_FILE = "width_scores.json"


@dataclasses.dataclass(frozen=True)
class WidthResult:
    """What was chosen and written.

    Attributes:
        output: the directory.
        widths: of the result.
        blocks: that the result has.
        losses: of held-out windows before and after, in nats a token.
        parameters: of the result, norms and biases left out.
        tried: candidates of a search, best first.
        estimated: layers whose times are estimates, with ``us``.
        total_bytes: of the written weights.
    """

    output: Path
    widths: Widths
    blocks: int
    losses: tuple[float, float]
    parameters: int
    tried: tuple[Tried, ...]
    estimated: tuple[str, ...]
    total_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """The same as plain JSON types."""
        return {**dataclasses.asdict(self), "output": str(self.output)}

    def to_text(self) -> str:
        """The result, and the candidates of a search below it."""
        before, after = (math.exp(loss) for loss in self.losses)
        lines = [
            f"{self.output}: {self.widths}, {self.blocks} blocks, {self.parameters / 1e6:,.1f} M parameters, "
            f"perplexity of held-out text {before:.4g} -> {after:.4g} before recovery, {self.total_bytes / 1e6:.1f} MB"
        ]
        for one in self.tried:
            lines.append(
                f"  loss {one.loss:7.4f}  importance {one.retained:6.1%}  cost {one.cost:14,.0f}  "
                f"{one.shape.blocks} blocks, {one.shape.widths}"
            )
        if self.estimated:
            lines.append(f"  no measured layer is near: times of {', '.join(self.estimated)} are estimates")
        return "\n".join(lines)


def prune_width(options: WidthOptions) -> WidthResult:
    """Run the job.

    Raises:
        SparsertError: what the options ask for cannot be done.
    """
    from sparsert.checkpoint.work import check_output
    from sparsert.compress.score_windows import mean_loss
    from sparsert.compress.trim import check_unmasked, trimmed_config
    from sparsert.compress.width import rounded_widths, widths_of
    from sparsert.compress.width_scores import score_widths
    from sparsert.jobs.measurements import Measurements
    from sparsert.jobs.progress import Progress
    from sparsert.jobs.width_search import WidthSearch, find_shapes, shape_of

    output = Path(options.output).expanduser()
    check_output(output)
    budget = _budget(options)
    job = open_job(options)
    anatomy = job.anatomy
    assert job.windows is not None  # the text is required
    whole = widths_of(anatomy)
    sizes = {name: getattr(options, name) for name in ("hidden", "intermediate", "heads", "kv_heads")}
    target = rounded_widths(whole, **sizes, multiple=options.multiple)
    check_unmasked(anatomy)
    trimmed_config(anatomy.config, target)  # refuses sizes that no model of this family has
    shapes = None if budget is None else find_shapes(anatomy, options, budget)
    measured_on = job.windows if job.held_out is None else job.held_out
    with Measurements(output, job.identity, resume=options.resume) as measurements:
        before = measurements.remember("loss", lambda: mean_loss(anatomy, measured_on, batch_size=options.batch_size))
        with Progress(-(-options.windows // options.batch_size), "importance", "pass") as progress:
            scores = score_widths(
                anatomy,
                job.windows,
                over_windows=options.over_windows,
                over_positions=options.over_positions,
                batch_size=options.batch_size,
                progress=lambda done, of: progress.advance(),
            )
        search = WidthSearch(options, job, scores, measurements)
        shape = shape_of(anatomy, target)
        tried: tuple[Tried, ...] = ()
        if budget is not None and shapes is not None:
            tried = search.run(shapes, budget)
            shape = tried[0].shape
            after = tried[0].loss
        else:
            after = search.loss(shape, steps=0)
        estimated = (
            ()
            if budget is None or budget.table is None
            else budget.table.total(shape.layers(sparse=options.packed)).estimated
        )
        result = WidthResult(output, shape.widths, shape.blocks, (before, after), shape.parameters, tried, estimated, 0)
        total_bytes = _write(options, job, search.trimmed(shape), search.removed(shape), result)
    return dataclasses.replace(result, total_bytes=total_bytes)


def _budget(options: WidthOptions) -> Budget | None:
    given = {
        kind: getattr(options, kind) for kind in ("parameters", "bytes", "us") if getattr(options, kind) is not None
    }
    sizes = [name for name in ("hidden", "intermediate", "heads", "kv_heads") if getattr(options, name) is not None]
    if len(given) + bool(sizes) != 1:
        raise InputError(
            "say how narrow: sizes (--hidden, --intermediate, --heads, --kv-heads) or one budget (--parameters, "
            "--bytes or --us)"
        )
    if not given:
        return None
    from sparsert.compress.architecture_search import Budget
    from sparsert.jobs.layer_times import read_layer_times

    [(kind, value)] = given.items()
    if kind != "us":
        return Budget(kind, value, options.packed)
    if options.layer_times is None:
        raise InputError("--us needs measured times; give --layer-times with a record of `sparsert bench kernels`")
    return Budget(kind, value, options.packed, read_layer_times(options.layer_times, options.batch))


def _write(options: WidthOptions, job: CalibrationJob, model: Any, removed: Sequence[int], result: WidthResult) -> int:
    from sparsert import __version__
    from sparsert.checkpoint import open_checkpoint, prune_checkpoint
    from sparsert.jobs.write_models import write_new
    from sparsert.schedule import LayerPlan

    base = base_name(options.model, job.checkpoint.directory)
    record = {
        "version": __version__,
        "method": "width",
        "pattern": None,
        "base_model": base,
        "widths": dataclasses.asdict(result.widths),
    }
    scores = {
        "widths": dataclasses.asdict(result.widths),
        "blocks": result.blocks,
        "removed_blocks": list(removed),
        "loss_before": result.losses[0],
        "loss_after": result.losses[1],
        "tried": [dataclasses.asdict(one) for one in result.tried],
        "times_estimated": list(result.estimated),
    }
    output = result.output
    try:
        if not removed:
            total_bytes = write_new(model, job.checkpoint, output, record=record)
        else:
            with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.absolute().parent) as directory:
                whole = Path(directory) / "model"
                write_new(model, job.checkpoint, whole, record=record)
                plan = LayerPlan.remove(job.anatomy.num_blocks, removed)
                total_bytes = prune_checkpoint(
                    open_checkpoint(whole), output, method="none", mask_maker=None, base_model=base, plan=plan
                ).total_bytes
        (output / SCORES_FILE).write_text(json.dumps(scores, indent=2) + "\n")
    except OSError as error:
        raise CheckpointError(
            f"{output}: cannot be written ({error.strerror or error}); check permissions and free space"
        ) from error
    return total_bytes
