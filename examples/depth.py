"""Depth: 30 -> 24 blocks of SmolLM2-135M by four criteria, with and without recovery.

    python examples/depth.py --model DIR --text corpus.jsonl.xz --evaluate-text wikitext2-valid.txt --work RUN

Each criterion chooses blocks with the "+" rule (0-3 and the last two stay), the shorter model is measured as it is
and after distillation. Taylor scores blocks once, as published, and again after each removal. The model chosen by
perplexity is also finetuned on the same tokens without a teacher, distilled with hidden states beside the logits, and
recovered by LoRA. The last lines say how much of the lost log-perplexity comes back.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recipe import Recipe, parser

from sparsert.jobs.prune_depth import DepthOptions, prune_depth
from sparsert.jobs.recovery_options import DistillOptions, FinetuneOptions, distill, finetune

#: Name of a row -> criterion and mode.
CHOICES = {
    "magnitude": ("magnitude", "one-shot"),
    "taylor": ("taylor", "one-shot"),
    "taylor, iterative": ("taylor", "iterative"),
    "perplexity": ("perplexity", "one-shot"),
    "influence": ("influence", "one-shot"),
}


def main(argv: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    """Run the recipe; returns the rows of its table."""
    options = parser((__doc__ or "").splitlines()[0])
    options.add_argument("--count", type=int, default=6, help="blocks to remove")
    recipe = Recipe(options.parse_args(argv))
    recipe.stage("dense")
    for name in CHOICES:
        recipe.stage(name, functools.partial(_shorten, recipe, name))
        recipe.stage(f"{name}, distilled", functools.partial(_distil, recipe, name, {}))
    recipe.stage(
        "perplexity, distilled with states", functools.partial(_distil, recipe, "perplexity", {"states": True})
    )
    recipe.stage("perplexity, finetuned", functools.partial(_finetune, recipe, {}))
    recipe.stage("perplexity, LoRA", functools.partial(_finetune, recipe, {"train": "lora", "rank": 16, "alpha": 32.0}))
    print(recipe.table())
    loss = {name: math.log(row["perplexity"]) for name, row in recipe.rows.items()}
    for recovered in ("distilled", "finetuned"):
        lost = loss["perplexity"] - loss["dense"]
        back = (loss["perplexity"] - loss[f"perplexity, {recovered}"]) / lost
        print(f"perplexity, {recovered}: {back:.0%} of the lost log-perplexity is back")
    return recipe.rows


def _shorten(recipe: Recipe, name: str, output: Path) -> None:
    criterion, mode = CHOICES[name]
    options = {**recipe.calibration(), "count": recipe.arguments.count, "criterion": criterion, "mode": mode}
    prune_depth(DepthOptions(**options, output=str(output)))


def _distil(recipe: Recipe, name: str, changes: dict[str, Any], output: Path) -> None:
    model, teacher = str(recipe.place(name)), recipe.arguments.model
    distill(DistillOptions(**recipe.training() | changes, model=model, teacher=teacher, output=str(output)))


def _finetune(recipe: Recipe, changes: dict[str, Any], output: Path) -> None:
    finetune(FinetuneOptions(**recipe.training() | changes, model=str(recipe.place("perplexity")), output=str(output)))


if __name__ == "__main__":
    main()
