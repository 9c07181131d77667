"""Which transformer blocks to remove: from scores to an order and a :class:`LayerPlan`.

Three ways to choose ``count`` blocks:

- one-shot: score once, remove the lowest. What both papers end up with;
- iterative: remove ``step`` blocks, score what is left, go on. Costs a scoring a round and gains little there;
- contiguous: the run of ``count`` neighbours that is needed least, which keeps the seam in one place. By perplexity
  each run is left out and the loss taken; by influence what goes into a run is compared with what comes out of it;
  magnitude and Taylor add up the scores of the run.

The "+" rule guards the first four and the last two blocks (:func:`sparsert.schedule.guarded_blocks`): it is on unless
someone forces it off, since two of the criteria would remove exactly those.

Nothing is removed here: a plan is data, and the model is scored with blocks skipped. A low loss on calibration text
is a guide and no promise; for tasks, contiguous runs late in the model have done better than the loss says.

Source: Kim et al., "Shortened LLaMA" (arXiv 2402.02834), section 3; Sreenivas et al., "LLM Pruning and Distillation in
Practice" (arXiv 2408.11796), section 4.3, for contiguous runs.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import torch
import torch.nn.functional as functional
from torch import Tensor

from sparsert.compress.anatomy import Anatomy
from sparsert.compress.block_scores import CRITERIA, Progress, observing, perplexity_without, score_blocks
from sparsert.compress.score_windows import Remember, batches_of, check_windows, compute_always
from sparsert.errors import InputError
from sparsert.schedule import LayerPlan, guarded_blocks

MODES = ("one-shot", "iterative", "contiguous")


@dataclasses.dataclass(frozen=True)
class DepthSettings:
    """How blocks are chosen.

    Attributes:
        count: how many blocks to remove.
        criterion: one of :data:`sparsert.compress.block_scores.CRITERIA`.
        mode: one of :data:`MODES`.
        step: iterative: blocks removed between two scorings.
        force: also consider the guarded blocks (0-3 and the last two).

    Raises:
        InputError: a value that is not known or below 1.
    """

    count: int
    criterion: str = "perplexity"
    mode: str = "one-shot"
    step: int = 1
    force: bool = False

    def __post_init__(self) -> None:
        for name, value, known in (("criterion", self.criterion, CRITERIA), ("mode", self.mode, MODES)):
            if value not in known:
                raise InputError(f"{name} {value!r} is not known; choose one of {', '.join(known)}")
        for name, number in (("count", self.count), ("step", self.step)):
            if number < 1:
                raise InputError(f"{name} is {number}; it must be at least 1")


@dataclasses.dataclass(frozen=True)
class DepthChoice:
    """What was chosen, and why.

    Attributes:
        plan: the blocks that stay.
        order: blocks in the order in which they go; longer than the plan's removal where scores exist for more, so that
            the same order serves other counts. With a contiguous run exactly its blocks.
        rounds: scores of each round: block -> score; of a contiguous choice first block of the run -> score.
    """

    plan: LayerPlan
    order: tuple[int, ...]
    rounds: tuple[Mapping[int, float], ...]


def removal_order(scores: Mapping[int, float]) -> tuple[int, ...]:
    """Blocks by ascending score; of equal ones the later block first, which costs less.

    Example:
        >>> removal_order({0: 3.0, 1: 1.0, 2: 2.0, 3: 1.0})
        (3, 1, 2, 0)
    """
    return tuple(sorted(scores, key=lambda block: (scores[block], -block)))


def choose_blocks(
    anatomy: Anatomy,
    settings: DepthSettings,
    windows: Tensor | None = None,
    *,
    batch_size: int = 1,
    progress: Progress | None = None,
    remember: Remember = compute_always,
) -> DepthChoice:
    """Choose the blocks that a model needs least.

    Args:
        anatomy: of the model, which is not changed.
        settings: how many and how.
        windows: int64 ``[windows, length]`` of calibration text; only magnitude does without.
        batch_size: windows in one pass.
        progress: called with how many scorings are done of how many in this round.
        remember: asked for every perplexity.

    Returns:
        The choice.

    Raises:
        InputError: fewer candidates than asked for, or unusable text or scores.
    """
    candidates = _candidates(anatomy.num_blocks, settings)
    if settings.mode == "contiguous":
        return _choose_run(anatomy, settings, candidates, windows, batch_size, progress, remember)
    step = settings.step if settings.mode == "iterative" else settings.count
    removed: list[int] = []
    rounds: list[Mapping[int, float]] = []
    order: tuple[int, ...] = ()
    while len(removed) < settings.count:
        scores = score_blocks(
            anatomy,
            settings.criterion,
            windows,
            skipped=removed,
            batch_size=batch_size,
            progress=progress,
            remember=remember,
        )
        rounds.append(scores)
        order = removal_order(scores)
        free = [block for block in order if block in candidates]
        removed += free[: min(step, settings.count - len(removed))]
    left = tuple(block for block in order if block not in removed)
    # one-shot: the plain order, as the papers publish it; whoever reads it passes over guarded blocks
    whole = order if settings.mode == "one-shot" else (*removed, *left)
    return DepthChoice(LayerPlan.remove(anatomy.num_blocks, removed, force=settings.force), whole, tuple(rounds))


def _candidates(num_blocks: int, settings: DepthSettings) -> set[int]:
    guarded = frozenset() if settings.force else guarded_blocks(num_blocks)
    candidates = set(range(num_blocks)) - guarded
    most = min(len(candidates), num_blocks - 1)
    if settings.count > most:
        hint = " (0-3 and the last two are guarded unless forced)" if guarded else ""
        raise InputError(
            f"asked to remove {settings.count} of {num_blocks} blocks, but only {most} can go{hint}; ask for 1-{most}"
        )
    return candidates


def _choose_run(
    anatomy: Anatomy,
    settings: DepthSettings,
    candidates: set[int],
    windows: Tensor | None,
    batch_size: int,
    progress: Progress | None,
    remember: Remember,
) -> DepthChoice:
    """The run of neighbours that is needed least."""
    count = settings.count
    runs = [
        range(first, first + count)
        for first in range(anatomy.num_blocks - count + 1)
        if set(range(first, first + count)) <= candidates
    ]
    if settings.criterion in ("magnitude", "taylor"):
        scores = score_blocks(anatomy, settings.criterion, windows, batch_size=batch_size, progress=progress)
        by_first = {run[0]: math.fsum(scores[block] for block in run) for run in runs}
    else:
        if windows is None:
            raise InputError(f"criterion {settings.criterion} needs calibration text; give windows of it")
        check_windows(anatomy, windows)
        if settings.criterion == "influence":
            by_first = _run_influence(anatomy, runs, windows, batch_size)
        else:
            by_first = {}
            for done, run in enumerate(runs, start=1):
                by_first[run[0]] = perplexity_without(anatomy, run, windows, batch_size=batch_size, remember=remember)
                if progress is not None:
                    progress(done, len(runs))
    first = removal_order(by_first)[0]
    run = range(first, first + count)
    return DepthChoice(LayerPlan.remove(anatomy.num_blocks, run, force=settings.force), tuple(run), (by_first,))


def _run_influence(anatomy: Anatomy, runs: list[range], windows: Tensor, batch_size: int) -> dict[int, float]:
    """1 - mean cosine between what goes into a run and what comes out of it."""
    totals = dict.fromkeys((run[0] for run in runs), 0.0)
    with torch.no_grad():
        for batch in batches_of(windows, batch_size, anatomy.embedding.weight.device):
            entering: dict[int, Tensor] = {}

            def look(block: int, before: Tensor, after: Tensor, entering: dict[int, Tensor] = entering) -> None:
                entering[block] = before
                for run in runs:
                    if run[-1] == block:
                        states = (entering[run[0]].float(), after.float())
                        totals[run[0]] += float(functional.cosine_similarity(*states, dim=-1).sum(dtype=torch.float64))
                        del entering[run[0]]  # no later run begins there

            with observing(anatomy, range(anatomy.num_blocks), look):
                anatomy.hidden(batch)
    return {first: 1.0 - total / windows.numel() for first, total in totals.items()}
