"""Subcommands that make models: each is a job of ``sparsert.jobs``, with the options that its dataclass says.

A job is a function that takes its options and returns a result with ``to_dict()``, for ``--json``, and ``to_text()``.
To add one, name it in :data:`JOBS`. The modules named here are imported for the command line's help and so must not
import torch when they are.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsert.jobs.options import add_options, parse_options

if TYPE_CHECKING:
    from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Job:
    """A subcommand.

    Attributes:
        name: what it is called on the command line.
        module: of ``sparsert.jobs``, with the two names below.
        options: dataclass of its options.
        function: takes them and does it.
        help_text: one line.
        epilog: shown below the options, examples above all.
        way_to_prune: stands behind ``prune``.
    """

    name: str
    module: str
    options: str
    function: str
    help_text: str
    epilog: str
    way_to_prune: bool = False


JOBS = (
    Job(
        "mask",
        "prune_mask",
        "PruneMaskOptions",
        "prune_mask",
        "make 2:4 masks by magnitude, Wanda or SparseGPT",
        """\
examples:
  sparsert prune mask --model DIR --method wanda --text corpus.jsonl --output PRUNED
  sparsert prune mask --model DIR --method sparsegpt --update-weights --text corpus.txt --output PRUNED
  sparsert prune mask --model DIR --text corpus.txt --masks-output masks.npz
  sparsert prune mask --model DIR --masks learned.npz --update-weights --text corpus.txt --output FITTED

One block at a time is on the device, so 16 GB of GPU memory prune a model of 7 billion. SparseGPT without
--update-weights chooses masks and leaves the weights as they are, which is what `learn-masks` starts from.
""",
        way_to_prune=True,
    ),
    Job(
        "depth",
        "prune_depth",
        "DepthOptions",
        "prune_depth",
        "remove whole blocks, chosen by a criterion",
        """\
examples:
  sparsert prune depth --model DIR --count 6 --text corpus.txt --output SHORTER
  sparsert prune depth --model DIR --count 6 --criterion taylor --text corpus.txt --output SHORTER
  sparsert prune depth --model DIR --count 8 --mode contiguous --text corpus.txt --output SHORTER
  sparsert prune depth --model DIR --count 6 --criterion magnitude --plan-only --output PLAN

Blocks 0-3 and the last two stay unless --force. Beside the weights stand block_order.csv, for --remove-blocks
FILE:N of other commands, layer_plan.json and depth_scores.json. Recover with `sparsert distill`.
""",
        way_to_prune=True,
    ),
    Job(
        "width",
        "prune_width",
        "WidthOptions",
        "prune_width",
        "trim heads, neurons and channels, to sizes or to a budget",
        """\
examples:
  sparsert prune width --model DIR --intermediate 1024 --heads 6 --text corpus.txt --output NARROW
  sparsert prune width --model DIR --parameters 100e6 --text corpus.txt --output NARROW
  sparsert prune width --model DIR --us 300 --layer-times kernels.json --packed --search-steps 300 --text corpus.txt \\
    --output NARROW

The result is an ordinary checkpoint with other sizes. kernels.json is what `sparsert bench kernels --output` wrote
on the GPU that counts. Make 2:4 masks after this, not before. Recover with `sparsert distill`.
""",
        way_to_prune=True,
    ),
    Job(
        "distill",
        "recovery_options",
        "DistillOptions",
        "distill",
        "train a pruned model beside the one it was pruned from",
        """\
examples:
  sparsert distill --model SHORTER --teacher DIR --text corpus.jsonl --output RECOVERED
  sparsert distill --model SHORTER --teacher DIR --states --text corpus.jsonl --output RECOVERED
  sparsert distill --model PRUNED --teacher DIR --train lora --rank 16 --text corpus.jsonl --output RECOVERED
  sparsert distill --config job.toml --resume

2:4 weights stay 2:4. A killed run goes on with --resume to the same result. For a model of 7 billion on one GPU:
--dtype bfloat16 --optimizer-state bfloat16 --recompute --micro-batch 1.
""",
    ),
    Job(
        "finetune",
        "recovery_options",
        "FinetuneOptions",
        "finetune",
        "train a pruned model on text, all of it or a LoRA adapter",
        """\
examples:
  sparsert finetune --model PRUNED --text corpus.jsonl --output RECOVERED
  sparsert finetune --model PRUNED --train lora --targets q_proj v_proj --text corpus.jsonl --output RECOVERED

2:4 weights stay 2:4; an adapter is trained and merged under the masks.
""",
    ),
    Job(
        "report",
        "sensitivity_report",
        "ReportOptions",
        "report",
        "measure what removing each block and masking each layer would cost and save",
        """\
examples:
  sparsert report --model DIR --text valid.txt --output report.json
  sparsert report --model DIR --text valid.txt --layer-times kernels.json --save-us 0.3 --output report.json

Columns: increase of the loss (nats a token) without the block, what that saves, and the increase with a 2:4 mask
on each of its layers alone. Nothing is changed.
""",
    ),
    Job(
        "learn-masks",
        "learn_masks",
        "LearnMasksOptions",
        "learn_masks",
        "learn 2:4 masks end to end, with the weights frozen (MaskLLM)",
        """\
examples:
  sparsert learn-masks --model DIR --text corpus.jsonl --output PRUNED --masks-output masks.npz
  sparsert learn-masks --config job.toml --steps 4000 --resume
  sparsert learn-masks --model DIR --masks general.npz --text domain.txt --output DOMAIN
  accelerate launch --num_processes 8 -m sparsert learn-masks --config job.toml

A killed run goes on with --resume to the same result. Beside the output stands OUTPUT.training with the saved
state and log.jsonl, a line for every update.
""",
    ),
)


def add_jobs(commands: Any) -> None:
    """Add the jobs that are commands of their own to the command line."""
    for job in JOBS:
        if not job.way_to_prune:
            _add_job(commands, job)


def add_ways_to_prune(ways: Any) -> None:
    """Add the jobs that stand behind ``prune``."""
    for job in JOBS:
        if job.way_to_prune:
            _add_job(ways, job)


def run_job(job: Job, arguments: argparse.Namespace) -> None:
    """Run a job and print its result."""
    module = importlib.import_module(f"sparsert.jobs.{job.module}")
    options = parse_options(arguments, getattr(module, job.options))
    result = getattr(module, job.function)(options)
    if result is not None:  # the first of several processes has it
        print(json.dumps(result.to_dict()) if arguments.json else result.to_text())


def _add_job(commands: Any, job: Job) -> None:
    module = importlib.import_module(f"sparsert.jobs.{job.module}")
    parser = commands.add_parser(
        job.name,
        help=job.help_text,
        description=job.help_text[0].upper() + job.help_text[1:] + ".",
        epilog=job.epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_options(parser, getattr(module, job.options))
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    parser.set_defaults(run=functools.partial(run_job, job))


def read_documents(path: str) -> str | Tensor:
    """A text file as jobs read it: its documents with an empty line between them, or the token ids of ``.npy``.

    Raises:
        InputError: the file cannot be read or holds nothing.
    """
    from sparsert.jobs.text_files import load_tokens, read_texts

    return load_tokens([path], None) if path.endswith(".npy") else "\n\n".join(read_texts(Path(path)))
