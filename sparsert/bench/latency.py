"""``sparsert bench latency``: one batch at a time, from its prompts to its last token.

For every contender, batch and pair of lengths: TTFT, TPOT, ITL, tokens per second, share of the measured
bandwidth, memory and load time, by the definitions of :mod:`sparsert.bench.metrics`. The speed-up is the
ratio of median TPOTs to the dense model in our own engine, in the same run.
"""

from __future__ import annotations

import argparse
from typing import Any

from sparsert.bench.generation import add_generation_options, run_generation

EXAMPLES = """\
examples:
  sparsert bench latency --arch llama-3.1-8b --peers dense,hf,hf-compile --output latency.json
  sparsert bench latency --arch llama-2-7b --remove-blocks 8 --corners --lengths shortened-llama
  sparsert bench latency --model DIR --lengths maskllm --batch 1,2,4,8,16

Peers run the unpruned model: dense in this engine, hf and hf-compile in transformers, vllm in vLLM, gpt-fast
in the checkout that the variable SPARSERT_GPT_FAST names; torch-sparse is this engine with torch.sparse's 2:4
layers. One that is not installed or fails is skipped with the reason.
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add this command's own options."""
    add_generation_options(parser, runs=3)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure, print cards and table, and return the record.

    Raises:
        InputError, UnsupportedError, CheckpointError: options that do not fit.
        CutOff: a signal ended the run; it has the record so far.
    """
    return run_generation("latency", arguments)
