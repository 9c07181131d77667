"""``sparsert bench throughput``: many prompts at once, as fast as they can be worked off.

All prompts are sent at the start; an engine runs as many together as the batch allows, and what waits has
its wait in its TTFT. Output and total tokens per second count from the start until the last prompt has ended.
The speed-up is the ratio of output tokens per second to the dense model in our own engine, in the same run.

Source: vLLM ``benchmarks/throughput.py``.
"""

from __future__ import annotations

import argparse
from typing import Any

from sparsert.bench.generation import add_generation_options, run_generation
from sparsert.errors import InputError

EXAMPLES = """\
examples:
  sparsert bench throughput --arch llama-3.1-8b --batch 16 --num-prompts 64 --peers dense,vllm
  sparsert bench throughput --model DIR --batch 8,16 --lengths 128/512 --output throughput.json
"""

#: Prompts for each place of the batch when their number is not given.
_BATCHES_EACH = 4


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add this command's own options."""
    add_generation_options(parser, runs=1)
    parser.add_argument(
        "--num-prompts",
        metavar="N",
        type=int,
        help=f"prompts in all (default: {_BATCHES_EACH} for each place of the batch)",
    )


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure, print cards and table, and return the record.

    Raises:
        InputError, UnsupportedError, CheckpointError: options that do not fit.
        CutOff: a signal ended the run; it has the record so far.
    """
    if arguments.num_prompts is not None and arguments.num_prompts < 1:
        raise InputError(f"--num-prompts {arguments.num_prompts}: give a whole number from 1")
    return run_generation(
        "throughput", arguments, prompts_of=lambda batch: arguments.num_prompts or _BATCHES_EACH * batch
    )
