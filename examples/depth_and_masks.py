"""2:4 and depth composed: masks learned after blocks were removed, against masks learned before.

    python examples/depth_and_masks.py --model DIR --text corpus.jsonl.xz --evaluate-text wikitext2-valid.txt --work RUN

A mask learned on all blocks knows nothing of their absence. Rows: dense; each kind of pruning alone; both, in either
order; and the better order distilled with its zeros kept. Bytes are those of the checkpoint with zeros; packed, block
weights take 9/16.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

from recipe import Recipe, parser

from sparsert.checkpoint import open_checkpoint, prune_checkpoint
from sparsert.jobs.learn_masks import LearnMasksOptions, learn_masks
from sparsert.jobs.prune_depth import DepthOptions, prune_depth
from sparsert.jobs.recovery_options import DistillOptions, distill
from sparsert.schedule import LayerPlan


def main(argv: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    """Run the recipe; returns the rows of its table."""
    options = parser((__doc__ or "").splitlines()[0])
    options.add_argument("--count", type=int, default=6, help="blocks to remove")
    options.add_argument("--mask-steps", type=int, default=1000, help="updates of mask learning")
    options.add_argument("--samples", type=int, default=128, help="windows that the masks' prior is made of")
    recipe = Recipe(options.parse_args(argv))
    recipe.stage("dense")
    recipe.stage("shorter", functools.partial(_shorten, recipe))
    recipe.stage("masked", functools.partial(_mask, recipe, recipe.arguments.model))
    recipe.stage("masked, then shorter", functools.partial(_shorten_masked, recipe))
    recipe.stage("shorter, then masked", functools.partial(_mask, recipe, str(recipe.place("shorter"))))
    recipe.stage("shorter, then masked, distilled", functools.partial(_distil, recipe))
    print(recipe.table())
    return recipe.rows


def _shorten(recipe: Recipe, output: Path) -> None:
    prune_depth(DepthOptions(**recipe.calibration(), output=str(output), count=recipe.arguments.count))


def _mask(recipe: Recipe, model: str, output: Path) -> None:
    # the learner's own learning rate and number format: its logits are not weights
    training = {key: value for key, value in recipe.training().items() if key not in ("learning_rate", "dtype")}
    arguments = recipe.arguments
    training |= {"steps": arguments.mask_steps, "warmup_steps": 0}
    learn_masks(LearnMasksOptions(**training, model=model, output=str(output), samples=arguments.samples))


def _shorten_masked(recipe: Recipe, output: Path) -> None:
    """The masked model without the blocks that the dense one could do without."""
    plan = LayerPlan.from_json((recipe.place("shorter") / "layer_plan.json").read_text())
    source = open_checkpoint(recipe.place("masked"))
    prune_checkpoint(source, output, method="none", mask_maker=None, base_model=recipe.arguments.model, plan=plan)


def _distil(recipe: Recipe, output: Path) -> None:
    model, teacher = str(recipe.place("shorter, then masked")), recipe.arguments.model
    distill(DistillOptions(**recipe.training(), model=model, teacher=teacher, output=str(output)))


if __name__ == "__main__":
    main()
