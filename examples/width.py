"""Width: SmolLM2-135M trimmed to three quarters of its parameters and distilled, against training from scratch.

    python examples/width.py --model DIR --text corpus.jsonl.xz --evaluate-text wikitext2-valid.txt --work RUN

The model is trimmed by activation importance (two of three key/value heads, two thirds of the neurons), measured as
it is, after distillation and after finetuning. Beside it stands the same architecture with random weights, trained on
the same tokens both ways: what pruning hands down is the difference.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import torch
from recipe import Recipe, parser

from sparsert.jobs.models import load_model, open_dense
from sparsert.jobs.prune_width import prune_width
from sparsert.jobs.recovery_options import DistillOptions, FinetuneOptions, distill, finetune
from sparsert.jobs.width_options import WidthOptions
from sparsert.jobs.write_models import write_new


def main(argv: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    """Run the recipe; returns the rows of its table."""
    options = parser((__doc__ or "").splitlines()[0])
    options.add_argument("--hidden", type=int, help="channels that stay (all)")
    options.add_argument("--intermediate", type=int, default=1024, help="neurons that stay")
    options.add_argument("--kv-heads", type=int, default=2, help="key/value heads that stay")
    options.add_argument("--multiple", type=int, default=64, help="what sizes are rounded to")
    recipe = Recipe(options.parse_args(argv))
    recipe.stage("dense")
    recipe.stage("trimmed", functools.partial(_trim, recipe))
    recipe.stage("random", functools.partial(_forget, recipe))
    for start in ("trimmed", "random"):
        recipe.stage(f"{start}, finetuned", functools.partial(_finetune, recipe, start))
        recipe.stage(f"{start}, distilled", functools.partial(_distil, recipe, start))
    print(recipe.table())
    return recipe.rows


def _trim(recipe: Recipe, output: Path) -> None:
    sizes = {name: getattr(recipe.arguments, name) for name in ("hidden", "intermediate", "kv_heads", "multiple")}
    prune_width(WidthOptions(**recipe.calibration(), **sizes, output=str(output)))


def _forget(recipe: Recipe, output: Path) -> None:
    """The same architecture with the first values that transformers gives it."""
    source = open_dense(str(recipe.place("trimmed")))
    torch.manual_seed(recipe.arguments.seed)
    trimmed = load_model(source)
    fresh = type(trimmed)(trimmed.config)
    write_new(fresh, source, output, record={"method": "random", "pattern": None})


def _finetune(recipe: Recipe, start: str, output: Path) -> None:
    finetune(FinetuneOptions(**recipe.training(), model=str(recipe.place(start)), output=str(output)))


def _distil(recipe: Recipe, start: str, output: Path) -> None:
    model, teacher = str(recipe.place(start)), recipe.arguments.model
    distill(DistillOptions(**recipe.training(), model=model, teacher=teacher, output=str(output)))


if __name__ == "__main__":
    main()
