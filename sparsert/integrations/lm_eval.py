"""lm-eval (the Language Model Evaluation Harness) on our engine.

    from sparsert.integrations.lm_eval import SparsertLM, run_tasks

    results = run_tasks(llm, ["piqa", "winogrande"], batch_size=8)      # what `sparsert eval --tasks` does
    lm_eval.simple_evaluate(model=SparsertLM(llm), tasks=["piqa"])      # or with lm-eval's own options

lm-eval has no entry point for models, so ``lm_eval --model sparsert`` cannot exist; ``lm_eval --model hf`` reads our
format as any other once sparsert is imported. Tokens are made as lm-eval's own ``hf`` model makes them (context and
continuation together, the tokenizer's special tokens, BOS or else EOS in front of an empty context), so numbers
compare.

Source: lm-eval 0.4.13, ``docs/model_guide.md``, ``models/huggingface.py``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from sparsert.engine import LLM, SamplingParams
from sparsert.errors import CheckpointError, InputError, UnsupportedError
from sparsert.evaluate import score_sequences

#: Tokens that a task generates if it does not say how many; lm-eval's own default.
_DEFAULT_NEW_TOKENS = 256

#: A task's generation options that our sampler has under the same name.
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
_LENGTH_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")

#: (texts for the cache, tokens of the context, tokens of the continuation)
_Request = tuple[Any, list[int], list[int]]


class SparsertLM(TemplateLM):
    """lm-eval's view of a loaded model.

    Args:
        llm: the model; its plan is what runs.
        batch_size: sequences scored, or texts generated, at a time.

    Raises:
        CheckpointError: the model has no tokenizer.
        InputError: a batch size below 1.
    """

    def __init__(self, llm: LLM, batch_size: int = 1) -> None:
        super().__init__()
        if batch_size < 1:
            raise InputError(f"batch_size is {batch_size}; it must be at least 1")
        self.llm, self.batch_size = llm, batch_size
        self.tokenizer = llm.tokenizer

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        token = self.tokenizer.eos_token_id
        if token is None:
            token = min(self.llm.eos_token_ids, default=None)
        if token is None:
            raise CheckpointError("neither tokenizer nor config.json names an end token, which lm-eval needs")
        return int(token)

    @property
    def prefix_token_id(self) -> int:
        """What stands in front of an empty context: BOS, or else the end token."""
        token = self.tokenizer.bos_token_id
        return self.eot_token_id if token is None else int(token)

    @property
    def max_length(self) -> int:
        """Tokens that the model reads at most."""
        return self.llm.max_length

    @property
    def max_gen_toks(self) -> int:
        """Tokens that a task generates if it does not say how many."""
        return _DEFAULT_NEW_TOKENS

    @property
    def tokenizer_name(self) -> str:
        """Names the tokenizer in lm-eval's caches of chat requests."""
        return str(self.llm.checkpoint.directory).replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as one text."""
        text: str = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return text

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids of a text; by default with the tokenizer's special tokens, unless the text begins with BOS."""
        if add_special_tokens is None:
            bos = self.tokenizer.decode(self.prefix_token_id)
            add_special_tokens = not (bos and string.startswith(bos))
        return list(self.tokenizer.encode(string, add_special_tokens=add_special_tokens, verbose=False))

    def _loglikelihood_tokens(
        self, requests: Sequence[_Request], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        # longest first: sequences of a batch are of like length, and what does not fit fails at once
        order = sorted(range(len(requests)), key=lambda index: -len(requests[index][1]) - len(requests[index][2]))
        sequences = [self._sequence(requests[index]) for index in order]
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        scored = score_sequences(self.llm, sequences, batch_size=self.batch_size)
        for index, scores in zip(order, _with_progress(scored, len(order), "scoring", disable_tqdm), strict=True):
            texts, _context, continuation = requests[index]
            count = len(continuation)
            answers[index] = (
                float(scores.log_likelihoods[-count:].double().sum()),
                bool(scores.greedy[-count:].all()),
            )
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answers[index])
        return answers

    def _sequence(self, request: _Request) -> list[int]:
        """Context and continuation, the context cut on its left so that the model can read all but the last token."""
        texts, context, continuation = request
        if not context or not continuation or len(continuation) > self.max_length:
            raise InputError(
                f"{texts!r}: {len(context)} tokens of context and {len(continuation)} to score; need at least one "
                f"each, and at most {self.max_length} to score"
            )
        return (context + continuation)[-(self.max_length + 1) :]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, each token scored once with as much context as windows give."""
        windows: list[_Request] = []
        owners: list[int] = []
        for index, request in enumerate(requests):
            (text,) = request.args
            pieces = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for context, continuation in map(make_disjoint_window, pieces):
                windows.append((None, list(context), list(continuation)))
                owners.append(index)
        totals = [0.0] * len(requests)
        for owner, (score, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[owner] += score
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Texts that go on from each context, up to a stop string or length that its task names.

        Raises:
            UnsupportedError: a task names an option that our sampler does not have.
        """
        answers = [""] * len(requests)
        groups: dict[SamplingParams, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(self._sampling(request.args[1]), []).append(index)
        batches = [
            (params, members[begin : begin + self.batch_size])
            for params, members in groups.items()
            for begin in range(0, len(members), self.batch_size)
        ]
        for params, members in _with_progress(batches, len(batches), "generating", disable_tqdm):
            room = self.max_length - params.max_new_tokens
            prompts = [self.tok_encode(requests[index].args[0])[-room:] for index in members]
            for index, completion in zip(members, self.llm.generate(prompts, params), strict=True):
                answers[index] = completion.text
                self.cache_hook.add_partial("generate_until", requests[index].args, completion.text)
        return answers

    def _sampling(self, options: Mapping[str, Any]) -> SamplingParams:
        """A task's generation options as ours; without ``do_sample`` or a temperature it is greedy, as in lm-eval."""
        left = dict(options)
        lengths = [left.pop(name) for name in _LENGTH_NAMES if name in left]
        length = int(lengths[0]) if lengths else self.max_gen_toks
        if not 0 < length < self.max_length:
            raise InputError(f"a task generates {length} tokens; this model takes {self.max_length} with the prompt")
        until = left.pop("until", None) or ()
        stop = (until,) if isinstance(until, str) else tuple(until)
        sampled = left.pop("do_sample", float(left.get("temperature") or 0) > 0)
        unknown = sorted(set(left) - set(_SAMPLING))
        if unknown:
            raise UnsupportedError(
                f"a task sets {', '.join(unknown)} for generation; known are until, do_sample, {_LENGTH_NAMES[0]}, "
                f"{', '.join(_SAMPLING)}"
            )
        chosen = {name: value for name, value in left.items() if value is not None}
        if not sampled:
            chosen["temperature"] = 0.0
        elif "temperature" not in chosen:
            chosen["temperature"] = 1.0
        return SamplingParams(max_new_tokens=length, stop=tuple(text for text in stop if text), **chosen)


def run_tasks(
    llm: LLM,
    tasks: Sequence[str],
    *,
    task_path: str | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 1,
    chat: bool = False,
) -> dict[str, dict[str, Any]]:
    """Run lm-eval tasks. lm-eval fetches their data sets unless they are on the machine.

    Args:
        llm: the model.
        tasks: names of tasks or groups.
        task_path: folder with further task files.
        num_fewshot: examples in front of each question; default what the task says.
        limit: only that many documents of each task.
        batch_size: sequences at a time.
        chat: put every question through the chat template.

    Returns:
        Task -> its metrics, as lm-eval names them.

    Raises:
        UnsupportedError: packages that lm-eval needs are missing.
        InputError: a task that lm-eval does not know.
    """
    try:
        from lm_eval.evaluator import simple_evaluate
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UnsupportedError(f"lm-eval is not complete ({error}); run pip install 'sparsert[eval]'") from error
    manager = TaskManager(include_path=task_path)
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown or not tasks:
        raise InputError(
            f"lm-eval knows no task {', '.join(unknown) or '(none given)'}; `lm_eval ls tasks` lists them, and a "
            "folder with task files can be named"
        )
    found = simple_evaluate(
        model=SparsertLM(llm, batch_size),
        tasks=manager.match_tasks(list(tasks)),
        num_fewshot=num_fewshot,
        limit=limit,
        apply_chat_template=chat,
        task_manager=manager,
        log_samples=False,
    )
    return {task: dict(metrics) for task, metrics in found["results"].items()}


def _with_progress(items: Iterable[Any], total: int, what: str, disable: bool) -> Iterable[Any]:
    from tqdm import tqdm

    bar: Iterable[Any] = tqdm(items, total=total, desc=what, disable=True if disable else None)
    return bar
