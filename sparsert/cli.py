"""The command line: parse, call, print.

Each subcommand is one function that takes the parsed options. Results go to standard output, all
else (progress, notes, errors) to standard error, so output can be piped. Exit codes: 0; 2 for
whatever the user can mend, with one sentence; 3 when `bench check` finds something slower; 1 for a
bug, with the traceback; 130 after Ctrl-C.
Everything heavy is imported inside the functions, so ``sparsert --help`` answers at once.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsert.cli_bench import add_bench
from sparsert.cli_convert import convert, mask_method
from sparsert.cli_jobs import add_jobs, add_ways_to_prune, read_documents
from sparsert.cli_options import build_parser
from sparsert.errors import InputError, SparsertError, UnsupportedError

if TYPE_CHECKING:
    from torch import Tensor

    from sparsert.engine import LLM, Completion
    from sparsert.engine.growing_text import StreamCallback
    from sparsert.schedule import LayerPlan

EXIT_BUG = 1
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141

#: Options of generate that are passed on to SamplingParams when they are given.
_SAMPLING_OPTIONS = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")

#: What --masks says instead of a file to leave a model as it is.
_NO_MASKS = "none"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments after the program name, default those of the process.

    Returns:
        The exit code.
    """
    with contextlib.suppress(AttributeError):
        # a terminal that cannot show a character gets an escape, not a crash
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        with _short_warnings():
            commands = {
                "generate": generate,
                "eval": evaluate,
                "prune": prune,
                "convert": convert,
                "inspect": inspect,
                "env": env,
            }
            arguments = build_parser(commands, (add_jobs, add_bench), (add_ways_to_prune,)).parse_args(argv)
            code = arguments.run(arguments)
        sys.stdout.flush()
    except SystemExit as leaving:  # --help and --version
        return leaving.code if isinstance(leaving.code, int) else 0
    except SparsertError as error:
        _say(f"error: {' '.join(str(error).split())}")
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        _say("interrupted")
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # the reader has had enough; Python must not complain again when it flushes at exit
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    except Exception as error:
        # torch.OutOfMemoryError, by name: this file does not import torch
        if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
            _say(
                f"error: out of memory ({(str(error).splitlines() or ['host'])[0]}); use fewer prompts, a smaller "
                "--max-length, a 16-bit --dtype or a smaller model"
            )
            return EXIT_USER_ERROR
        traceback.print_exc()
        _say("this is a bug: please report it with the lines above and the output of `sparsert env`")
        return EXIT_BUG
    return code or 0


def generate(arguments: argparse.Namespace) -> None:
    """``sparsert generate``: text from a pruned model."""
    prompts = _read_prompts(arguments)
    if arguments.stream and len(prompts) > 1:
        raise InputError(f"--stream shows one text as it comes, but there are {len(prompts)} prompts; leave it out")
    blocks, draft_blocks = _parse_block_options(arguments), _parse_draft_options(arguments)
    from sparsert.engine import SamplingParams

    options = {name: getattr(arguments, name) for name in _SAMPLING_OPTIONS}
    params = SamplingParams(
        stop=tuple(arguments.stop or ()),
        ignore_eos=arguments.ignore_eos,
        **{name: value for name, value in options.items() if value is not None},
    )
    llm = _load_llm(arguments, blocks, max_length=arguments.max_length, progress=sys.stderr.isatty())
    draft_plan = None
    if draft_blocks is not None:
        # a draft costs time, never quality: no block is guarded, and what the model skips the draft skips as well
        wanted = draft_blocks.plan(llm.plan.num_blocks, force=True)
        draft_plan = wanted.intersect(llm.plan)

    def run(stream: StreamCallback | None = None) -> list[Completion]:
        return llm.generate(
            prompts,
            params,
            stream=stream,
            chat=arguments.chat,
            draft_plan=draft_plan,
            draft=arguments.draft_model,
            draft_tokens=arguments.draft_tokens,
        )

    if arguments.stream:
        _print_stream(run)
        return
    completions = run()
    if arguments.json:
        summary = llm.summary()
        for completion in completions:
            print(json.dumps(_completion_record(completion, summary), ensure_ascii=False))
        return
    for completion in completions:
        if len(completions) > 1:
            print(f"[{completion.index + 1}/{len(completions)}] {completion.prompt}")
        print(completion.text)
        if len(completions) > 1:
            print()
    _say_timings(completions)


def _load_llm(arguments: argparse.Namespace, blocks: _BlockOptions, **more: Any) -> LLM:
    """The model that the options ask for; what only some commands know comes as further arguments."""
    from sparsert.checkpoint import DEFAULT_MODEL, fetch_default_model
    from sparsert.engine import LLM

    model, masks = arguments.model, arguments.masks
    if model is None:
        base = fetch_default_model(notify=_say)  # what it does is told here; LLM then finds it in the cache
        if masks == _NO_MASKS:
            model = base
        elif masks is None:
            _say(
                f"note: no --model given, so this is {DEFAULT_MODEL} under the 2:4 masks that come with sparsert; "
                f"--masks {_NO_MASKS} runs it unpruned"
            )
    return LLM(
        model,
        device=arguments.device,
        dtype=arguments.dtype,
        masks=None if masks == _NO_MASKS else masks,
        remove_blocks=blocks.removed,
        block_order=blocks.order,
        skip_attention=blocks.skip_attention,
        skip_mlp=blocks.skip_mlp,
        force_remove=arguments.force_remove,
        backend=arguments.backend,
        **more,
    )


def evaluate(arguments: argparse.Namespace) -> None:
    """``sparsert eval``: perplexity of a text, and tasks of lm-eval."""
    if arguments.text is None and arguments.tasks is None:
        raise InputError("there is nothing to measure; give --text FILE for its perplexity, or --tasks NAMES, or both")
    text = None if arguments.text is None else _read_text_or_ids(arguments.text)
    run_tasks = None if arguments.tasks is None else _import_lm_eval()
    blocks = _parse_block_options(arguments)
    from sparsert.evaluate import PerplexityProtocol, measure_perplexity

    protocol = PerplexityProtocol(
        arguments.window, arguments.stride, arguments.bos, arguments.keep_tail, arguments.max_windows
    )
    if arguments.batch_size < 1:
        raise InputError(f"--batch-size {arguments.batch_size}: it must be at least 1")
    llm = _load_llm(arguments, blocks, progress=True)
    record: dict[str, Any] = {"model": llm.summary()}
    if text is not None:
        result = measure_perplexity(llm, text, protocol, batch_size=arguments.batch_size, progress=True)
        record["perplexity"] = {"text": arguments.text, **result.to_dict()}
        if result.text_tokens + (result.bos == "window") < result.window:
            _say(
                f"note: the text has {result.text_tokens} tokens and a window takes {result.window}, so it was read as "
                "one shorter window; that makes its perplexity higher than in whole windows"
            )
        if not arguments.json:
            print(
                f"perplexity {result.perplexity:.4f} of {arguments.text}: {result.scored_tokens:,} tokens scored in "
                f"{result.windows} windows of {result.window}, stride {result.stride}, BOS: {result.bos}; "
                f"{result.left_out_tokens:,} tokens left out; {result.seconds:.1f} s"
            )
    if run_tasks is not None:
        record["tasks"] = run_tasks(
            llm,
            [task.strip() for task in arguments.tasks.split(",") if task.strip()],
            task_path=arguments.task_path,
            num_fewshot=arguments.num_fewshot,
            limit=arguments.limit,
            batch_size=arguments.batch_size,
            chat=arguments.chat,
        )
        if not arguments.json:
            print("\n".join(_task_lines(record["tasks"])))
    if arguments.json:
        print(json.dumps(record, ensure_ascii=False, default=str))


def prune(arguments: argparse.Namespace) -> None:
    """``sparsert prune``: write an ordinary checkpoint with zeros."""
    missing = [f"--{name}" for name in ("model", "output") if getattr(arguments, name) is None]
    if missing:
        raise InputError(f"the following arguments are required: {', '.join(missing)}; see `sparsert prune --help`")
    blocks = _parse_block_options(arguments)
    from sparsert.checkpoint import open_checkpoint, prune_checkpoint, resolve_checkpoint
    from sparsert.checkpoint.work import check_output
    from sparsert.models import DecoderConfig

    output = Path(arguments.output).expanduser()
    check_output(output)
    directory = resolve_checkpoint(arguments.model)
    checkpoint = open_checkpoint(directory)
    DecoderConfig.from_hf(checkpoint.config)  # refuses what could not be run afterwards
    plan = blocks.plan(checkpoint.num_blocks, force=arguments.force_remove)
    method, mask_maker, keep_dense = mask_method(arguments, checkpoint)
    summary = prune_checkpoint(
        checkpoint,
        output,
        method=method,
        mask_maker=mask_maker,
        # a path of this machine means nothing to the next reader, its last part may
        base_model=directory.resolve().name if Path(arguments.model).expanduser().exists() else arguments.model,
        plan=plan,
        target=arguments.to,
        keep_dense=keep_dense,
        progress=True,
    )
    if arguments.json:
        print(json.dumps(summary.to_dict()))
        return
    print(
        f"{summary.output}: {summary.masked_linears} linear weights 2:4 ({summary.zero_share:.1%} zeros, method "
        f"{summary.method}), {plan}, {summary.total_bytes / 1e6:.1f} MB"
    )
    if summary.dense_linears:
        _say(
            f"note: {len(summary.dense_linears)} linear weights stay dense because there is no mask for them or their "
            f"input width is no multiple of 4, the first {summary.dense_linears[0]}"
        )


def inspect(arguments: argparse.Namespace) -> None:
    """``sparsert inspect``: what is in a checkpoint and what of it would run sparse."""
    from sparsert.checkpoint import inspect_checkpoint, open_checkpoint, resolve_checkpoint
    from sparsert.models import DecoderConfig

    path = resolve_checkpoint(arguments.path)
    if path.is_file():
        from sparsert.checkpoint.describe import describe_file

        description = describe_file(path)
        print(json.dumps(description) if arguments.json else f"{path}: {description['summary']}")
        return
    checkpoint = open_checkpoint(path)
    report = inspect_checkpoint(checkpoint, architecture_check=DecoderConfig.from_hf, progress=True)
    print(json.dumps(report.to_dict()) if arguments.json else report.to_text())


def env(arguments: argparse.Namespace) -> None:
    """``sparsert env``: versions, GPUs, what was built."""
    from sparsert.environment import describe_environment

    environment = describe_environment()
    print(json.dumps(environment.to_dict()) if arguments.json else environment.to_text())


@dataclasses.dataclass(frozen=True)
class _BlockOptions:
    """What the options leave out: blocks by a list, or by an order file and a count; and halves of blocks."""

    removed: tuple[int, ...] | None = None
    order: tuple[str, int] | None = None
    skip_attention: str | tuple[()] = ()
    skip_mlp: str | tuple[()] = ()

    def plan(self, num_blocks: int, *, force: bool) -> LayerPlan:
        from sparsert.schedule import LayerPlan

        return LayerPlan.remove(
            num_blocks, self.removed or (), order=self.order, skip_attention=self.skip_attention,
            skip_mlp=self.skip_mlp, force=force,
        )  # fmt: skip


def _parse_block_options(arguments: argparse.Namespace) -> _BlockOptions:
    listed, file, count = arguments.remove_blocks, arguments.block_order, arguments.remove_count
    if (file is None) != (count is None):
        raise InputError("--block-order FILE and --remove-count N belong together; give both or neither")
    if listed is not None and file is not None:
        raise InputError("--remove-blocks and --block-order both say what to remove; give one of them")
    whole = _BlockOptions(order=(file, count)) if file is not None else _parse_listed("--remove-blocks", listed)
    return _without_halves(whole, arguments.skip_attention, arguments.skip_mlp)


def _parse_draft_options(arguments: argparse.Namespace) -> _BlockOptions | None:
    """What the draft leaves out; None if no option says so."""
    listed, attention, mlp = arguments.draft_remove_blocks, arguments.draft_skip_attention, arguments.draft_skip_mlp
    if listed is None and attention is None and mlp is None:
        return None
    if arguments.draft_model is not None:
        raise InputError(
            "--draft-model names another model to draft with, the other --draft options shorten this one for it; give "
            "one of the two"
        )
    return _without_halves(_parse_listed("--draft-remove-blocks", listed), attention, mlp)


def _without_halves(whole: _BlockOptions, attention: str | None, mlp: str | None) -> _BlockOptions:
    return dataclasses.replace(
        whole, skip_attention=() if attention is None else attention, skip_mlp=() if mlp is None else mlp
    )


def _parse_listed(option: str, listed: str | None) -> _BlockOptions:
    """A block list, or an order file and a count."""
    if listed is None:
        return _BlockOptions()
    path, colon, number = listed.rpartition(":")
    if colon:
        if not number.isdigit():
            raise InputError(f"{option} {listed}: after the colon stands how many blocks to remove, e.g. {path}:6")
        return _BlockOptions(order=(path, int(number)))
    from sparsert.schedule import parse_block_list

    return _BlockOptions(removed=parse_block_list(listed))


def _read_prompts(arguments: argparse.Namespace) -> list[str]:
    prompts = list(arguments.prompt or ())
    if arguments.prompts is not None:
        prompts += [line for line in _read_text("--prompts", arguments.prompts).splitlines() if line.strip()]
    if not prompts:
        raise InputError("there is nothing to continue; give --prompt TEXT, or --prompts FILE with a prompt a line")
    return prompts


def _read_text(option: str, path: str) -> str:
    """A text file, or standard input for ``-``."""
    try:
        return sys.stdin.read() if path == "-" else Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{option} {path}: cannot be read ({error}); give a UTF-8 text file") from error


def _read_text_or_ids(path: str) -> str | Tensor:
    """What ``--text`` names: documents with an empty line between them, or token ids."""
    if path == "-":
        text = _read_text("--text", path)
        if not text.strip():
            raise InputError("--text -: standard input holds no text; pipe some in")
        return text
    try:
        return read_documents(path)
    except InputError as error:
        raise InputError(f"--text {error}") from error


def _import_lm_eval() -> Callable[..., dict[str, dict[str, Any]]]:
    """Tasks need lm-eval; say so before a model is loaded."""
    try:
        from sparsert.integrations.lm_eval import run_tasks
    except ImportError as error:
        raise UnsupportedError(f"--tasks needs lm-eval ({error}); run pip install 'sparsert[eval]'") from error
    return run_tasks


def _task_lines(tasks: dict[str, dict[str, Any]]) -> list[str]:
    """A line for each metric; lm-eval names them ``metric,filter``, with ``metric_stderr,filter`` beside it."""
    lines = []
    for task, metrics in tasks.items():
        for name, value in metrics.items():
            metric, _, kind = name.partition(",")
            if isinstance(value, (int, float)) and kind and not metric.endswith("_stderr"):
                error = metrics.get(f"{metric}_stderr,{kind}")
                spread = f" +- {error:.4f}" if isinstance(error, (int, float)) else ""
                lines.append(f"{task}  {metric}{'' if kind == 'none' else f' ({kind})'}  {value:.4f}{spread}")
    return lines


def _print_stream(run: Callable[[StreamCallback], list[Completion]]) -> None:
    def show(index: int, text: str, token_ids: Sequence[int]) -> None:
        print(text, end="", flush=True)

    completions = run(show)
    print()
    _say_timings(completions)


def _completion_record(completion: Completion, model: dict[str, Any]) -> dict[str, Any]:
    return {
        "prompt": completion.prompt,
        "text": completion.text,
        "token_ids": list(completion.token_ids),
        "finish_reason": completion.finish_reason,
        "timings": dataclasses.asdict(completion.timings),
        "model": model,
    }


def _say_timings(completions: Sequence[Completion]) -> None:
    """One line about speed; prompts of one batch share one record of times."""
    batches = list({id(completion.timings): completion.timings for completion in completions}.values())
    decode_s = sum(timings.decode_ms for timings in batches) / 1e3
    new_tokens = sum(timings.new_tokens for timings in batches)
    # the first token of each prompt comes out of the prefill
    rate = f", decode {(new_tokens - len(completions)) / decode_s:.1f} tok/s" if decode_s > 0 else ""
    prefill_ms = sum(timings.prefill_ms for timings in batches)
    _say(
        f"{new_tokens} tokens for {len(completions)} prompt(s): load {batches[0].load_s:.1f} s, "
        f"prefill {prefill_ms:.0f} ms{rate}"
    )
    drafts = [timings.speculation for timings in batches if timings.speculation is not None]
    drafted, rounds = sum(draft.drafted for draft in drafts), sum(draft.rounds for draft in drafts)
    if drafted:
        accepted = sum(draft.accepted for draft in drafts)
        _say(
            f"draft of {drafts[0].draft_tokens}: {accepted / drafted:.1%} of {drafted} tokens stood, "
            f"{1 + accepted / rounds:.2f} tokens a round"
        )


def _say(sentence: str) -> None:
    print(f"sparsert: {sentence}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _short_warnings() -> Iterator[None]:
    """Show warnings as one line on standard error, without the place in the code."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: _say(f"warning: {' '.join(str(message).split())}")
        yield
