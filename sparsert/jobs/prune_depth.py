"""``sparsert prune depth``: choose blocks, write the order, the plan and the shorter model.

The output is an ordinary checkpoint (:func:`sparsert.checkpoint.prune_checkpoint`) with three files beside the weights:

    block_order.csv    blocks in the order in which they go, for --remove-blocks FILE:N
    layer_plan.json    the plan, for LayerPlan.from_json
    depth_scores.json  criterion, scores of every round, text

With ``--plan-only`` it is a directory of these three, and the model stays whole: it can be run by the plan.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsert.errors import CheckpointError, InputError
from sparsert.jobs.calibration_job import CalibrationOptions, open_job
from sparsert.jobs.options import REQUIRED, option
from sparsert.jobs.prune_mask import base_name

if TYPE_CHECKING:
    from sparsert.compress.depth import DepthChoice

ORDER_FILE, PLAN_FILE, SCORES_FILE = "block_order.csv", "layer_plan.json", "depth_scores.json"


@dataclasses.dataclass(frozen=True)
class DepthOptions(CalibrationOptions):
    """What ``sparsert prune depth`` takes."""

    output: str = option(REQUIRED, "directory to create; must be new or empty", metavar="DIR")
    count: int = option(REQUIRED, "blocks to remove")
    text: tuple[str, ...] = option(
        (), "text files to calibrate on: .txt, .jsonl, .gz, .xz or .npy; magnitude needs none", metavar="FILE"
    )
    criterion: str = option(
        "perplexity",
        "how blocks are scored",
        choices=("magnitude", "taylor", "perplexity", "influence"),
    )
    mode: str = option(
        "one-shot",
        "score once, again after each removal, or look for one run of neighbours",
        choices=("one-shot", "iterative", "contiguous"),
    )
    step: int = option(1, "iterative: blocks removed between two scorings")
    force: bool = option(False, "allow blocks 0-3 and the last two, without which most models break")
    plan_only: bool = option(False, "write the order and the plan, not the shorter model")


@dataclasses.dataclass(frozen=True)
class DepthResult:
    """What was chosen and written.

    Attributes:
        output: the directory.
        choice: plan, order and scores.
        perplexity: of the calibration text before and after; None without text.
        total_bytes: of the written weights; 0 with ``plan_only``.
    """

    output: Path
    choice: DepthChoice
    perplexity: tuple[float, float] | None
    total_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """The same as plain JSON types."""
        return {
            "output": str(self.output),
            "removed_blocks": list(self.choice.plan.removed),
            "order": list(self.choice.order),
            "perplexity_before": self.perplexity[0] if self.perplexity else None,
            "perplexity_after": self.perplexity[1] if self.perplexity else None,
            "total_bytes": self.total_bytes,
        }

    def to_text(self) -> str:
        """One line."""
        written = f", {self.total_bytes / 1e6:.1f} MB" if self.total_bytes else ", order and plan only"
        change = ""
        if self.perplexity is not None:
            change = f", perplexity of the calibration text {self.perplexity[0]:.4g} -> {self.perplexity[1]:.4g}"
        return f"{self.output}: {self.choice.plan}{change}{written}"


def prune_depth(options: DepthOptions) -> DepthResult:
    """Run the job.

    Raises:
        SparsertError: what the options ask for cannot be done.
    """
    from sparsert.checkpoint import prune_checkpoint
    from sparsert.checkpoint.work import check_output, work_directory
    from sparsert.compress.block_scores import perplexity_without
    from sparsert.compress.depth import DepthSettings, choose_blocks
    from sparsert.jobs.measurements import Measurements
    from sparsert.jobs.progress import Progress

    output = Path(options.output).expanduser()
    check_output(output)
    settings = DepthSettings(options.count, options.criterion, options.mode, options.step, options.force)
    if not options.text and options.criterion != "magnitude":
        raise InputError(f"criterion {options.criterion} needs calibration text; give --text FILE, or use magnitude")
    job = open_job(options)
    anatomy, windows = job.anatomy, job.windows
    with Measurements(output, job.identity, resume=options.resume) as measurements:
        with Progress(_passes(options, anatomy.num_blocks), options.criterion, "pass") as progress:
            choice = choose_blocks(
                anatomy,
                settings,
                windows,
                batch_size=options.batch_size,
                progress=lambda done, of: progress.advance(),
                remember=measurements.remember,
            )
        perplexity = None
        if windows is not None:
            before, after = (
                perplexity_without(
                    anatomy, blocks, windows, batch_size=options.batch_size, remember=measurements.remember
                )
                for blocks in ((), choice.plan.removed)
            )
            perplexity = before, after
        total_bytes = 0
        try:
            if options.plan_only:
                with work_directory(output) as directory:
                    _write_choice(directory, options, choice, perplexity)
            else:
                total_bytes = prune_checkpoint(
                    job.checkpoint,
                    output,
                    method="none",
                    mask_maker=None,
                    base_model=base_name(options.model, job.checkpoint.directory),
                    plan=choice.plan,
                    progress=True,
                ).total_bytes
                _write_choice(output, options, choice, perplexity)
        except OSError as error:
            raise CheckpointError(
                f"{output}: cannot be written ({error.strerror or error}); check permissions and free space"
            ) from error
    return DepthResult(output, choice, perplexity, total_bytes)


def _write_choice(
    directory: Path, options: DepthOptions, choice: DepthChoice, perplexity: tuple[float, float] | None
) -> None:
    from sparsert.schedule import write_order_file

    write_order_file(directory / ORDER_FILE, choice.order)
    (directory / PLAN_FILE).write_text(choice.plan.to_json() + "\n")
    scores = {
        "criterion": options.criterion,
        "mode": options.mode,
        "windows": options.windows if options.text else 0,
        "window": options.window,
        "seed": options.seed,
        "perplexity": None if perplexity is None else {"before": perplexity[0], "after": perplexity[1]},
        "rounds": [{str(block): score for block, score in scores.items()} for scores in choice.rounds],
    }
    (directory / SCORES_FILE).write_text(json.dumps(scores, indent=2) + "\n")


def _passes(options: DepthOptions, num_blocks: int) -> int:
    """How often progress is reported, each round: once a block by perplexity, a gradient by Taylor, else a batch."""
    from sparsert.compress.block_scores import taylor_gradients

    rounds = -(-options.count // options.step) if options.mode == "iterative" else 1
    if options.criterion == "magnitude":
        return 0
    if options.criterion == "taylor":
        return rounds * taylor_gradients(options.windows, options.window)
    if options.criterion != "perplexity":
        return rounds * -(-options.windows // options.batch_size)
    if options.mode == "contiguous":
        # which runs are allowed depends on the guard; all of them is the most
        return num_blocks - options.count + 1 - (0 if options.force else 6)
    return sum(num_blocks - done * options.step for done in range(rounds))
