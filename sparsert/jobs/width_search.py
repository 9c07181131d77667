"""The search behind ``sparsert prune width``: candidates of a model are trimmed, measured and compared."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sparsert.errors import InputError, UnsupportedError
from sparsert.jobs.calibration_job import CalibrationJob
from sparsert.jobs.width_options import WidthOptions

if TYPE_CHECKING:
    from torch import nn

    from sparsert.compress.anatomy import Anatomy
    from sparsert.compress.architecture_search import Budget, ModelShape
    from sparsert.compress.width import Widths
    from sparsert.compress.width_scores import WidthScores
    from sparsert.jobs.measurements import Measurements


@dataclasses.dataclass(frozen=True)
class Tried:
    """A candidate that was measured.

    Attributes:
        shape: its sizes.
        cost: in the unit of the budget.
        retained: share of importance, see :func:`sparsert.compress.width.retained_importance`.
        loss: of held-out windows, in nats a token.
    """

    shape: ModelShape
    cost: float
    retained: float
    loss: float


def shape_of(anatomy: Anatomy, widths: Widths) -> ModelShape:
    """A whole model with other widths."""
    from sparsert.compress.architecture_search import ModelShape

    block: Any = anatomy.blocks[0]
    gated = hasattr(block.mlp, "gate_proj") or hasattr(block.mlp, "gate_up_proj")
    return ModelShape(widths, anatomy.num_blocks, anatomy.embedding.num_embeddings, anatomy.tied, gated)


def find_shapes(anatomy: Anatomy, options: WidthOptions, budget: Budget) -> list[ModelShape]:
    """Architectures within a budget that transformers has and that keep the guarded blocks.

    Raises:
        InputError: there is none.
    """
    from sparsert.compress.architecture_search import SearchLimits, find_candidates
    from sparsert.compress.trim import trimmed_config
    from sparsert.compress.width import widths_of
    from sparsert.schedule import guarded_blocks

    possible: dict[tuple[int, int, int], bool] = {}

    def accept(widths: Widths) -> bool:
        # what transformers accepts follows from hidden size and heads; to ask it takes a millisecond
        key = widths.hidden, widths.heads, widths.kv_heads
        if key not in possible:
            try:
                trimmed_config(anatomy.config, widths)
                possible[key] = True
            except UnsupportedError:
                possible[key] = False
        return possible[key]

    limits = SearchLimits(options.most_width, options.most_depth, options.multiple)
    found = find_candidates(shape_of(anatomy, widths_of(anatomy)), budget, limits, accept=accept)
    fewest = len(guarded_blocks(anatomy.num_blocks))
    kept = [shape for shape in found if shape.blocks in (anatomy.num_blocks, *range(fewest, anatomy.num_blocks))]
    if not kept:
        raise InputError("every architecture within the budget lacks blocks that are guarded; allow more width to go")
    return kept


class WidthSearch:
    """Candidates of a model: made, measured, compared.

    Args:
        options: of the job.
        job: the model and its text.
        scores: importance of its units.
        measurements: remember the losses of candidates.
    """

    def __init__(
        self, options: WidthOptions, job: CalibrationJob, scores: WidthScores, measurements: Measurements
    ) -> None:
        from sparsert.compress.block_scores import score_blocks
        from sparsert.compress.depth import removal_order
        from sparsert.compress.width import widths_of
        from sparsert.schedule import guarded_blocks

        self._options, self._job, self._scores, self._measurements = options, job, scores, measurements
        self._whole = widths_of(job.anatomy)
        self._order: list[int] = []
        if options.most_depth:
            influence = score_blocks(job.anatomy, "influence", job.windows, batch_size=options.batch_size)
            guarded = guarded_blocks(job.anatomy.num_blocks)
            self._order = [block for block in removal_order(influence) if block not in guarded]

    def removed(self, shape: ModelShape) -> tuple[int, ...]:
        """Blocks that a shape lacks: the least influential ones that are not guarded."""
        return tuple(sorted(self._order[: self._job.anatomy.num_blocks - shape.blocks]))

    def trimmed(self, shape: ModelShape) -> nn.Module:
        """The model of a shape's widths, with all blocks."""
        from sparsert.compress.trim import trim_model
        from sparsert.compress.width import select_units

        return trim_model(self._job.anatomy, shape.widths, select_units(self._scores, self._whole, shape.widths))

    def loss(self, shape: ModelShape, *, steps: int) -> float:
        """Of held-out windows, after so many updates of distillation."""
        key = f"loss of {shape.widths}, {shape.blocks} blocks, after {steps} steps"
        return self._measurements.remember(key, lambda: self._loss(shape, steps))

    def run(self, shapes: Sequence[ModelShape], budget: Budget) -> tuple[Tried, ...]:
        """Measure those of some shapes that retain most importance; best first."""
        from sparsert.compress.width import retained_importance, select_units
        from sparsert.jobs.progress import Progress

        options, num_blocks = self._options, self._job.anatomy.num_blocks
        retained = {
            shape: retained_importance(self._scores, select_units(self._scores, self._whole, shape.widths))
            * shape.blocks
            / num_blocks
            for shape in shapes
        }
        chosen = sorted(shapes, key=lambda shape: -retained[shape])[: options.top]
        tried = []
        with Progress(len(chosen), "candidates", "model") as progress:
            for shape in chosen:
                tried.append(
                    Tried(shape, budget.cost(shape), retained[shape], self.loss(shape, steps=options.search_steps))
                )
                progress.advance({"loss": tried[-1].loss})
        return tuple(sorted(tried, key=lambda one: one.loss))

    def _loss(self, shape: ModelShape, steps: int) -> float:
        from sparsert.compress.anatomy import anatomy_of
        from sparsert.compress.score_windows import mean_loss
        from sparsert.compress.skipping import skipping

        job, options = self._job, self._options
        measured_on = job.windows if job.held_out is None else job.held_out
        assert measured_on is not None
        candidate = anatomy_of(self.trimmed(shape))
        with skipping(candidate, self.removed(shape)):
            if steps:
                self._distil(candidate, steps)
            return mean_loss(candidate, measured_on, batch_size=options.batch_size)

    def _distil(self, candidate: Anatomy, steps: int) -> None:
        from sparsert.compress.distillation import Distillation, DistillationSettings
        from sparsert.compress.parallel import Processes
        from sparsert.compress.training import Trainer, TrainingOptions

        job, options = self._job, self._options
        assert job.text is not None
        candidate.model.requires_grad_(True).train()
        Trainer(
            candidate.model.parameters(),
            Distillation(candidate, job.anatomy, DistillationSettings()),
            job.text,
            TrainingOptions(
                steps=steps,
                batch_size=options.batch_size,
                learning_rate=options.search_learning_rate,
                warmup_steps=steps // 10,
                weight_decay=0.0,
                seed=options.seed,
            ),
            processes=Processes(job.anatomy.embedding.weight.device),
        ).train()
        candidate.model.requires_grad_(False).eval()
