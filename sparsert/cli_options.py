"""What the command line accepts: subcommands, options and their help texts, as argparse wants them.

Apart from parsing nothing happens here; ``sparsert.cli`` says what each subcommand does.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from sparsert import __version__
from sparsert.errors import InputError

#: A subcommand: takes the parsed options, prints its result, and returns an exit code if that is not 0.
Command = Callable[[argparse.Namespace], int | None]


class _UsageError(InputError):
    """A command line that cannot be parsed."""


class Parser(argparse.ArgumentParser):
    """argparse that reports as every other error does, instead of printing usage and exiting."""

    def error(self, message: str) -> NoReturn:
        raise _UsageError(f"{message}; see `{self.prog} --help`")


_EXAMPLES = """\
examples:
  sparsert generate --prompt "The tower of Pisa"        fetch a small model, run it under the 2:4 masks it comes with
  sparsert generate --model DIR --prompt "Hello" --chat  run your own checkpoint as a chat model
  sparsert eval --model DIR --text wikitext2-test.txt    measure its perplexity
  sparsert prune --model DIR --output PRUNED             write a 2:4 checkpoint
  sparsert learn-masks --model DIR --text FILE --output PRUNED   learn which weights stay
  sparsert convert PRUNED PACKED                         store 2:4 weights packed, at 9/16 of the bytes
  sparsert inspect PRUNED                                see which layers would run sparse
  sparsert bench kernels                                 measure layers against cuBLAS and torch.sparse
  sparsert env                                           see what this machine can use
"""

_MODEL_HELP = "model directory or hub id (default: SmolLM2-135M-Instruct, fetched, under the 2:4 masks that come along)"
_MASKS_HELP = "apply the 2:4 masks of a mask_compressed.npz while loading; none: run the default model unpruned"

_GENERATE_EXAMPLES = """\
examples:
  sparsert generate --prompt "The tower of Pisa"
  sparsert generate --model meta-llama/Llama-3.1-8B --masks mask_compressed.npz --prompt "Once"
  sparsert generate --model DIR --remove-blocks 21-25,27 --prompt "Once" --temperature 0.7 --seed 1
  sparsert generate --model DIR --remove-blocks block_order.csv:6 --prompts prompts.txt --json
  sparsert generate --model DIR --draft-remove-blocks 10-19,22 --draft-tokens 4 --prompt "Once"

Weights whose zeros already form 2:4 are found and packed; nothing has to be said about them. A mask
file is MaskLLM's mask_compressed.npz. A block order file is Shortened LLaMA's: one line of block
numbers, the one to remove first standing first. A draft proposes tokens that the model then checks several
at a time: the texts stay what they would be without it, only sooner if most proposals stand.
"""

_EVAL_EXAMPLES = """\
examples:
  sparsert eval --model DIR --text wikitext2-test.txt
  sparsert eval --model DIR --text wikitext2-test.txt --window 128 --bos window --batch-size 16
  sparsert eval --model DIR --remove-blocks 21-25,27 --text test.txt --json
  sparsert eval --model DIR --tasks piqa,winogrande,arc_easy --batch-size 8

Perplexity is measured as the papers' tables are: the whole text tokenised once, cut into windows of
min(4096, the model's length) tokens that do not overlap, the rest left out, the first token of a window not
predicted. WikiText-2's articles are joined by an empty line there. Nothing is downloaded for it; tasks
are those of lm-eval (pip install 'sparsert[eval]'), which fetches their data sets.
"""

_PRUNE_EXAMPLES = """\
examples:
  sparsert prune --model HuggingFaceTB/SmolLM2-135M-Instruct --output smollm2-2of4
  sparsert prune --model DIR --remove-blocks 21-25,27 --output PRUNED
  sparsert prune --model DIR --masks mask_compressed.npz --to sparsert --output PACKED
  sparsert prune --model DIR --method none --remove-blocks 21-25,27 --output SHORTER
  sparsert prune mask --model DIR --method sparsegpt --text FILE --output PRUNED

The result is an ordinary Hugging Face checkpoint: zeros where values were pruned (or packed, with
--to sparsert), the remaining blocks numbered anew. What was done stands in its config.json. Magnitude
masks need no data and cost quality; small models lose nearly all of it.
"""

_CONVERT_EXAMPLES = """\
examples:
  sparsert convert PRUNED PACKED                       2:4 linears packed: 9/16 of their bytes, loads sooner
  sparsert convert PACKED PLAIN --to dense             back: zeros and all, for every other loader
  sparsert convert DIR OUT --to safetensors            .bin files as safetensors

Reads every format that `sparsert inspect` knows (docs/formats.md). What is written is read back and compared; an
interrupted conversion goes on where it stopped when it is run again.
"""

_INSPECT_EXAMPLES = """\
examples:
  sparsert inspect PRUNED
  sparsert inspect RedHatAI/Sparse-Llama-3.1-8B-2of4 --json

Columns: the share of zeros, how many groups of four inputs hold more than two values ("bad groups":
0 means 2:4), the pattern, whether the weight would run sparse, and its size now and on the device. Below
stands the format, and why weights would run dense. A mask file, an order of blocks or a lone weight file
is told for what it is.
"""


def build_parser(
    run: Mapping[str, Command],
    add_more: Sequence[Callable[[Any], None]] = (),
    add_ways_to_prune: Sequence[Callable[[Any], None]] = (),
) -> argparse.ArgumentParser:
    """The parser of the whole command line.

    Args:
        run: what each subcommand does; the parsed options carry it as ``run``.
        add_more: each adds further subcommands to what ``add_subparsers`` returned.
        add_ways_to_prune: each adds subcommands of ``prune`` likewise.

    Returns:
        A parser that raises ``InputError`` for a command line it does not understand.
    """
    parser = Parser(
        prog="sparsert",
        description="Run pruned language models: 2:4 weights packed once, removed blocks skipped.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"sparsert {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_generate(commands, run["generate"])
    _add_eval(commands, run["eval"])
    _add_prune(commands, run["prune"], add_ways_to_prune)
    _add_convert(commands, run["convert"])
    _add_inspect(commands, run["inspect"])
    for add in add_more:
        add(commands)
    _add_env(commands, run["env"])
    return parser


def _add_command(commands: Any, name: str, run: Command, help_text: str, epilog: str | None) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        name,
        help=help_text,
        description=help_text[0].upper() + help_text[1:] + ".",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.set_defaults(run=run)
    return command


def _add_generate(commands: Any, run: Command) -> None:
    command = _add_command(commands, "generate", run, "continue prompts with a pruned model", _GENERATE_EXAMPLES)
    what = command.add_argument_group("what to run")
    what.add_argument("--model", metavar="DIR|ID", help=_MODEL_HELP)
    what.add_argument("--prompt", metavar="TEXT", action="append", help="text to continue; may be given several times")
    what.add_argument("--prompts", metavar="FILE", help="file with one prompt a line, all run together; - reads stdin")
    what.add_argument("--chat", action="store_true", help="wrap each prompt in the model's chat template")
    what.add_argument("--masks", metavar="FILE|none", help=_MASKS_HELP)
    _add_block_options(what)

    sampling = command.add_argument_group("how to choose tokens")
    sampling.add_argument("--max-new-tokens", metavar="N", type=int, help="most tokens to generate (default: 128)")
    sampling.add_argument("--temperature", metavar="T", type=float, help="0 always takes the likeliest (default: 0)")
    sampling.add_argument("--top-k", metavar="K", type=int, help="sample among the K likeliest tokens (default: all)")
    sampling.add_argument("--top-p", metavar="P", type=float, help="... among the likeliest that sum to P (default: 1)")
    sampling.add_argument("--min-p", metavar="P", type=float, help="... among those P times as likely as the likeliest")
    sampling.add_argument(
        "--repetition-penalty", metavar="R", type=float, help="above 1 discourages repeats (default: 1)"
    )
    sampling.add_argument("--seed", metavar="N", type=int, help="same seed, same text (default: a new one each time)")
    sampling.add_argument(
        "--stop", metavar="TEXT", action="append", help="end before this text; may be given several times"
    )
    sampling.add_argument("--ignore-eos", action="store_true", help="go on past the model's end token")

    how = _add_device_options(command)
    how.add_argument(
        "--max-length", metavar="N", type=int, help="tokens of prompt and text that must fit (default: as needed)"
    )

    draft = command.add_argument_group("drafting (speculative decoding)")
    draft.add_argument(
        "--draft-remove-blocks",
        metavar="LIST",
        help="draft with the same model without these blocks, as --remove-blocks",
    )
    draft.add_argument("--draft-skip-attention", metavar="LIST", help="... without the attention of these blocks")
    draft.add_argument("--draft-skip-mlp", metavar="LIST", help="... without the feed-forward layer of these blocks")
    draft.add_argument("--draft-model", metavar="DIR|ID", help="draft with this model, of the same vocabulary, instead")
    draft.add_argument("--draft-tokens", metavar="K", type=int, help="tokens to draft at a time, 1-16 (default: 4)")

    output = command.add_argument_group("output").add_mutually_exclusive_group()
    output.add_argument("--stream", action="store_true", help="print the text as it is made (one prompt only)")
    output.add_argument("--json", action="store_true", help="print one JSON object a prompt, a line each")


def _add_device_options(command: argparse.ArgumentParser) -> Any:
    how = command.add_argument_group("where and how to run")
    how.add_argument("--device", metavar="cpu|cuda", help="cpu, cuda or cuda:N (default: a GPU if there is one)")
    how.add_argument(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        help="number format (default: float32 on a CPU, else as stored)",
    )
    how.add_argument(
        "--backend",
        choices=("auto", "native", "triton", "torch", "dense"),
        default="auto",
        help="kernels for 2:4 layers: ours in CUDA (native) or Triton, torch.sparse, or unpacked (default: auto)",
    )
    return how


def _add_eval(commands: Any, run: Command) -> None:
    command = _add_command(commands, "eval", run, "measure perplexity on a text, or run lm-eval tasks", _EVAL_EXAMPLES)
    what = command.add_argument_group("what to measure")
    what.add_argument("--model", metavar="DIR|ID", help=_MODEL_HELP)
    what.add_argument(
        "--text",
        metavar="FILE",
        help="measure the perplexity of a text: .txt or .jsonl, also .gz or .xz, or token ids in .npy; - reads stdin",
    )
    what.add_argument("--tasks", metavar="NAMES", help="run these lm-eval tasks, separated by commas")
    what.add_argument("--masks", metavar="FILE|none", help=_MASKS_HELP)
    _add_block_options(what)

    text = command.add_argument_group("perplexity")
    text.add_argument("--window", metavar="N", type=int, help="tokens read at a time (default: 4096, or the model's)")
    text.add_argument("--stride", metavar="N", type=int, help="tokens from window to window (default: the window)")
    text.add_argument(
        "--bos",
        choices=("text", "window", "none"),
        default="text",
        help="BOS as the tokenizer puts it at the start of the text, in front of every window, or none (default: text)",
    )
    text.add_argument("--keep-tail", action="store_true", help="also score what is left behind the last whole window")
    text.add_argument("--max-windows", metavar="N", type=int, help="only the first N windows (default: all)")

    tasks = command.add_argument_group("lm-eval tasks")
    tasks.add_argument("--num-fewshot", metavar="N", type=int, help="examples in front of each question")
    tasks.add_argument("--limit", metavar="N", type=int, help="only the first N documents of each task (default: all)")
    tasks.add_argument("--task-path", metavar="DIR", help="folder with task files of your own")
    tasks.add_argument("--chat", action="store_true", help="put each question through the model's chat template")

    how = _add_device_options(command)
    how.add_argument("--batch-size", metavar="N", type=int, default=1, help="windows or texts at a time (default: 1)")
    command.add_argument("--json", action="store_true", help="print one JSON object instead of lines")


def _add_prune(commands: Any, run: Command, add_ways: Sequence[Callable[[Any], None]]) -> None:
    command = _add_command(commands, "prune", run, "write a pruned copy of a checkpoint", _PRUNE_EXAMPLES)
    ways = command.add_subparsers(
        title="ways to prune that look at a text, each with options of its own", metavar="WAY"
    )
    for add in add_ways:
        add(ways)
    # needed, but by `prune` alone: argparse would ask `prune WAY` for them as well
    command.add_argument("--model", metavar="DIR|ID", help="model directory or hub id")
    command.add_argument("--output", metavar="DIR", help="directory to create; must be new or empty")
    command.add_argument(
        "--method",
        choices=("magnitude", "none"),
        help="how masks are made; none only removes blocks (default: magnitude)",
    )
    command.add_argument("--masks", metavar="FILE", help="take the masks of a mask_compressed.npz or raw .pt instead")
    _add_block_options(command)
    command.add_argument(
        "--to",
        choices=("dense", "sparsert", "sparse-24-bitmask"),
        help="how to store 2:4 weights: with zeros, or packed (default: dense, or packed if the model is)",
    )
    command.add_argument("--json", action="store_true", help="print what was done as one JSON object")


def _add_convert(commands: Any, run: Command) -> None:
    command = _add_command(commands, "convert", run, "write a checkpoint in another format", _CONVERT_EXAMPLES)
    command.add_argument("input", metavar="IN", help="model directory or hub id")
    command.add_argument("output", metavar="OUT", help="directory to create; must be new or empty")
    command.add_argument(
        "--to",
        choices=("sparsert", "dense", "sparse-24-bitmask", "safetensors"),
        default="sparsert",
        help="format to write; safetensors leaves packed what is packed (default: sparsert)",
    )
    command.add_argument("--json", action="store_true", help="print what was done as one JSON object")


def _add_inspect(commands: Any, run: Command) -> None:
    command = _add_command(commands, "inspect", run, "show what in a checkpoint is 2:4", _INSPECT_EXAMPLES)
    command.add_argument("path", metavar="PATH", help="model directory or hub id, or a mask or order file")
    command.add_argument("--json", action="store_true", help="print one JSON object instead of the table")


def _add_env(commands: Any, run: Command) -> None:
    command = _add_command(commands, "env", run, "show versions, GPUs, what was built and what is missing", None)
    command.add_argument("--json", action="store_true", help="print one JSON object instead of the list")


def _add_block_options(group: Any) -> None:
    group.add_argument(
        "--remove-blocks",
        metavar="LIST",
        help="transformer blocks to leave out, e.g. 21-25,27, or an order file and a count, e.g. block_order.csv:6",
    )
    group.add_argument("--block-order", metavar="FILE", help="order file, with --remove-count")
    group.add_argument("--remove-count", metavar="N", type=int, help="how many blocks of the order file to leave out")
    group.add_argument(
        "--skip-attention", metavar="LIST", help="blocks that run without their attention, e.g. 20,23-25"
    )
    group.add_argument("--skip-mlp", metavar="LIST", help="blocks that run without their feed-forward layer")
    group.add_argument(
        "--force-remove",
        action="store_true",
        help="allow blocks 0-3 and the last two, without which, or halves of which, most models break",
    )
