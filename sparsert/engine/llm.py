"""The facade: a model directory or hub id in, texts out.

    llm = LLM("path/to/model", remove_blocks="21-25,27")
    for completion in llm.generate(["The sea was"], SamplingParams(max_new_tokens=32)):
        print(completion.text)

Names follow what users of other engines know (``LLM``, ``SamplingParams``, ``generate``). Prompts run in
batches of up to sixteen, in the order given; texts of one batch start together and the batch ends with
its longest. What it gives up: nothing joins a batch that is under way, which is a server's business.

One loaded model serves any plan within what is loaded, and drafts for itself:

    shorter = llm.with_plan(LayerPlan.remove(32, "21-25,27"))
    llm.generate(prompts, draft_plan=shorter.plan, draft_tokens=4)  # the texts of llm.generate(prompts), sooner
"""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsert.checkpoint import (
    MaskFile,
    fetch_default_model,
    open_checkpoint,
    read_default_masks,
    read_maskllm,
    resolve_checkpoint,
)
from sparsert.checkpoint.prune import base_plan
from sparsert.checkpoint.writer import stored_plan
from sparsert.engine.generate import generate_batch
from sparsert.engine.growing_text import StreamCallback
from sparsert.engine.params import SamplingParams
from sparsert.engine.prompts import prepare_texts
from sparsert.engine.results import Completion
from sparsert.engine.runner import MAX_BATCH_SIZE, Runner
from sparsert.engine.speculate import MAX_DRAFT_TOKENS
from sparsert.engine.step_kernels import attention_kernel, linear_kernel
from sparsert.engine.tokenizer import LazyTokenizer, Prompt, read_eos_token_ids
from sparsert.errors import InputError
from sparsert.models import DecoderConfig, load_model
from sparsert.schedule import Blocks, LayerPlan

#: Tokens drafted in a round unless said otherwise.
_DRAFT_TOKENS = 4


class LLM:
    """A loaded model that generates text.

    Attributes:
        checkpoint: the opened model directory.
        model: the decoder with its packed weights.
        max_length: most tokens of a text, prompt and output together.
        load_s: seconds that opening and loading took.
        eos_token_ids: the model's own end tokens.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        masks: str | Path | MaskFile | None = None,
        remove_blocks: Blocks | None = None,
        block_order: tuple[str | Path, int] | None = None,
        skip_attention: Blocks = (),
        skip_mlp: Blocks = (),
        plan: LayerPlan | None = None,
        force_remove: bool = False,
        max_length: int | None = None,
        backend: str = "auto",
        mask_maker: Callable[[Tensor], Tensor] | None = None,
        progress: bool = False,
    ) -> None:
        """Load a model.

        Args:
            model: a model directory, or a hub id such as ``owner/name``. Default: SmolLM2-135M-Instruct, fetched the
                first time, under the 2:4 masks and the plan that come with this package unless ``masks`` or
                ``mask_maker`` is given; ``LLM(sparsert.checkpoint.fetch_default_model())`` is the same unpruned.
            device: ``"cpu"``, ``"cuda"``, ``"cuda:1"``; default a GPU if there is one.
            dtype: bfloat16, float16 or float32; default float32 on a CPU, 16-bit on a GPU.
            masks: a MaskLLM mask file for this model.
            remove_blocks: blocks to skip, as ``"21-25,27"`` or numbers.
            block_order: an order file and how many blocks to remove by it, instead of ``remove_blocks``.
            skip_attention, skip_mlp: blocks of which only this half is skipped, likewise as text or numbers.
            plan: all of this as a plan, instead of the four before.
            force_remove: allow removing blocks 0-3 and the last two, or halves of them.
            max_length: most tokens of a text, prompt and output together; default what the model was
                made for. Memory for keys and values is taken as needed, not for all of it.
            backend: kernels of the packed layers: auto, native, triton, torch or dense.
            mask_maker: prunes every linear of a block while loading: weight ``[out_features, in_features]`` ->
                2:4 mask of that shape, e.g. ``sparsert.compress.magnitude_mask``.
            progress: show a bar on standard error.

        Raises:
            CheckpointError: the checkpoint or mask file is missing, damaged, or does not fit.
            SparsityError: a mask, or a weight said to be 2:4, is not.
            UnsupportedError: architecture, device, dtype or backend that cannot be run.
            InputError: block numbers or ``max_length`` out of range, or arguments that exclude each other.
        """
        start = time.perf_counter()
        if mask_maker is not None and masks is not None:
            raise InputError("masks and mask_maker exclude each other; give a mask file or a pruning method, not both")
        shipped = read_default_masks() if model is None and masks is None and mask_maker is None else None
        directory = fetch_default_model(progress=progress) if model is None else resolve_checkpoint(str(model))
        self.checkpoint = open_checkpoint(directory)
        if shipped is not None:
            shipped.check(self.checkpoint)
            masks = shipped.masks
        config = DecoderConfig.from_hf(self.checkpoint.config)
        if plan is None:
            if remove_blocks is not None and block_order is not None:
                raise InputError("remove_blocks and block_order exclude each other; give a block list or an order file")
            plan = LayerPlan.remove(
                config.num_blocks, remove_blocks or (), order=block_order, skip_attention=skip_attention,
                skip_mlp=skip_mlp, force=force_remove,
            )  # fmt: skip
        elif remove_blocks is not None or block_order is not None or skip_attention or skip_mlp:
            raise InputError("plan already says which blocks run; leave the arguments that remove or skip blocks out")
        plan = stored_plan(self.checkpoint.config, config.num_blocks).intersect(plan)
        if shipped is not None:
            plan = shipped.plan.intersect(plan)
        self._base_plan = base_plan(self.checkpoint.config, plan)
        self.max_length = _check_max_length(max_length, config)
        self.eos_token_ids = read_eos_token_ids(self.checkpoint)
        mask_file = read_maskllm(masks) if isinstance(masks, (str, Path)) else masks
        self.model = load_model(
            self.checkpoint,
            device=device,
            dtype=dtype,
            plan=plan,
            masks=mask_file,
            mask_maker=mask_maker,
            backend=backend,
            progress=progress,
        )
        self.backend = backend
        self.runner = Runner(self.model, self.max_length)
        self._tokenizer = LazyTokenizer(self.checkpoint.directory)
        self._drafts: dict[str, LLM] = {}
        self._same_tokenizers: list[LazyTokenizer] = []
        self.load_s = time.perf_counter() - start

    @property
    def tokenizer(self) -> Any:
        """The checkpoint's tokenizer, loaded when first asked for.

        Raises:
            CheckpointError: there is none, or it cannot be read.
        """
        return self._tokenizer.get()

    @property
    def plan(self) -> LayerPlan:
        """Which blocks run, in the checkpoint's numbering."""
        return self.runner.plan

    def with_plan(self, plan: LayerPlan) -> LLM:
        """The same loaded model under another plan.

        Weights, tokenizer, KV cache and CUDA graphs are shared: the view costs nothing, and going back and forth
        between plans captures no graph twice. One of the views can generate at a time.

        Args:
            plan: within what was loaded, in the checkpoint's numbering.

        Raises:
            InputError: the plan runs what was not loaded.
        """
        view = copy.copy(self)
        view.runner = self.runner.with_plan(plan)
        view._base_plan = base_plan(self.checkpoint.config, plan)
        return view

    def generate(
        self,
        prompts: str | Sequence[Prompt],
        params: SamplingParams | None = None,
        *,
        stream: StreamCallback | None = None,
        chat: bool = False,
        draft_plan: LayerPlan | None = None,
        draft: LLM | str | Path | None = None,
        draft_tokens: int | None = None,
    ) -> list[Completion]:
        """Generate a text for each prompt.

        With a draft, tokens are proposed by a cheaper model and checked by this one, several at a time. Greedy texts
        are the same as without (as far as a forward of several tokens rounds like one of a single token), sampled
        ones have the same distribution, though a seed gives another text.

        Args:
            prompts: texts, lists of token ids (taken as they are), or with ``chat`` conversations; a lone
                string is one prompt.
            params: default greedy, 128 tokens.
            stream: called with (index of the prompt, new text, new token ids) for every new token; the
                text may be empty while a character or a possible stop string is incomplete.
            chat: put each text or conversation through the checkpoint's chat template.
            draft_plan: draft with this shorter plan of the same weights; it must lie within :attr:`plan`.
            draft: draft with this model instead, which has the same vocabulary and device; a directory or hub id is
                loaded once and kept. Guards of blocks are not asked: a draft costs time, never quality.
            draft_tokens: tokens to draft in a round, 1 to 16; default 4.

        Returns:
            One completion for each prompt, in order.

        Raises:
            InputError: no prompts, an empty one, one with token ids outside the vocabulary, or one too
                long for ``max_length``; a draft that does not fit this model; or a call while another one of this
                model is under way.
            CheckpointError: text is given and the checkpoint has no tokenizer.
            UnsupportedError: ``chat`` without a chat template.
        """
        params = params or SamplingParams()
        given: list[Prompt] = [prompts] if isinstance(prompts, str) else list(prompts)
        if not given:
            raise InputError("no prompts given; give at least one")
        drafter = self._drafter(draft_plan, draft, draft_tokens)
        count = 0 if drafter is None else _DRAFT_TOKENS if draft_tokens is None else draft_tokens
        texts = prepare_texts(
            given, params, config=self.model.config, tokenizer=self._tokenizer, eos_token_ids=self.eos_token_ids,
            max_length=self.max_length, chat=chat,
        )  # fmt: skip
        completions: list[Completion] = []
        for begin in range(0, len(texts), MAX_BATCH_SIZE):
            batch = texts[begin : begin + MAX_BATCH_SIZE]
            with contextlib.ExitStack() as sessions:
                sessions.enter_context(self.runner.session())
                if drafter is not None and not drafter.shares_cache_with(self.runner):
                    sessions.enter_context(drafter.session())
                timings = generate_batch(
                    self.runner, batch, params, load_s=self.load_s, stream=stream, draft=drafter, draft_tokens=count
                )
            completions += [
                Completion(
                    text.index,
                    given[text.index],
                    tuple(text.prompt),
                    text.text,
                    tuple(text.token_ids),
                    text.finish_reason or "length",
                    timings,
                )
                for text in batch
            ]
        return completions

    def _drafter(self, plan: LayerPlan | None, draft: LLM | str | Path | None, tokens: int | None) -> Runner | None:
        """The runner that drafts, checked against this model; None without a draft."""
        if plan is None and draft is None:
            if tokens is not None:
                raise InputError(f"draft_tokens {tokens} without a draft; give draft_plan or draft as well")
            return None
        if plan is not None and draft is not None:
            raise InputError("draft_plan and draft both say what drafts; give one of them")
        if tokens is not None and not (type(tokens) is int and 1 <= tokens <= MAX_DRAFT_TOKENS):
            raise InputError(f"draft_tokens is {tokens!r}; it must be a whole number, 1-{MAX_DRAFT_TOKENS}")
        if isinstance(draft, (str, Path)):
            draft = self._load_draft(str(draft))
        runner = self.runner.with_plan(plan) if plan is not None else draft.runner  # type: ignore[union-attr]
        if runner.shares_cache_with(self.runner):
            # a block that the target does not run has keys of no token in the cache that they share
            runner.plan.check_within(self.plan, "the model it drafts for")
        else:
            assert draft is not None
            self._check_draft(draft)
        return runner

    def _load_draft(self, name: str) -> LLM:
        if name not in self._drafts:
            self._drafts[name] = LLM(name, device=self.model.device, dtype=self.model.dtype, backend=self.backend)
        return self._drafts[name]

    def _check_draft(self, draft: LLM) -> None:
        ours, theirs = self.model.config.vocab_size, draft.model.config.vocab_size
        if ours != theirs:
            raise InputError(
                f"the draft has a vocabulary of {theirs} tokens, this model one of {ours}; they must be the same"
            )
        if draft.model.device != self.model.device:
            raise InputError(
                f"the draft is on {draft.model.device}, this model on {self.model.device}; load both on one"
            )
        if draft.max_length < self.max_length:
            raise InputError(
                f"the draft takes texts of {draft.max_length} tokens, this model {self.max_length}; load this model "
                f"with max_length={draft.max_length}"
            )
        if draft._tokenizer in self._same_tokenizers or not (self._tokenizer.exists and draft._tokenizer.exists):
            return
        if self.tokenizer.get_vocab() != draft.tokenizer.get_vocab():
            raise InputError(
                "the draft's tokenizer gives other numbers to tokens than this model's; use a draft of its family"
            )
        self._same_tokenizers.append(draft._tokenizer)  # a large vocabulary takes a while to compare

    def summary(self) -> dict[str, Any]:
        """What is loaded, as plain data for JSON.

        Returns:
            Architecture, the plan (blocks kept and removed, halves skipped; in words, in the numbering of the model
            that the checkpoint was pruned from), linear layers by kind, bytes of weights packed and dense, dtype,
            device, backend, what the packed layers and the attention of a decode step at batch 1 run on, KV cache bytes
            per token, and ``warnings``: whatever is not as a user may expect. What is loaded counts, also where a plan
            runs less.
        """
        model, report = self.model, self.model.report
        kernel, passed_over = linear_kernel(model, self.backend)
        attention, attention_passed_over = attention_kernel(model.attention_shapes, model.device, model.dtype)
        tied = model.lm_head.weight is model.embed_tokens.weight
        head_bytes = 0 if tied else model.lm_head.weight.nbytes
        return {
            "model": str(self.checkpoint.directory),
            "architecture": model.config.architecture,
            "blocks": self.plan.num_blocks,
            "blocks_kept": list(self.plan.kept),
            "blocks_removed": list(self.plan.removed),
            "without_attention": list(self.plan.without_attention),
            "without_mlp": list(self.plan.without_mlp),
            "plan": str(self._base_plan),
            "linears_sparse": report.count("2:4"),
            "linears_dense": report.count("dense"),
            "linear_bytes": report.stored_bytes,
            "linear_bytes_dense": report.dense_bytes,
            "linear_share": round(report.share, 4),
            "embedding_bytes": model.embed_tokens.weight.nbytes + head_bytes,
            "tied_head": tied,
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": _device_name(model.device),
            "backend": self.backend,
            "kernel": kernel,
            "attention": attention,
            "max_length": self.max_length,
            "kv_bytes_per_token": self.runner.kv_bytes_per_token,
            "load_s": round(self.load_s, 3),
            "warnings": [*report.warnings, *passed_over, *attention_passed_over],
        }


def _check_max_length(max_length: int | None, config: DecoderConfig) -> int:
    most = config.max_position_embeddings
    if max_length is None:
        return most
    if not 2 <= max_length <= most:
        raise InputError(f"max_length {max_length} is out of range; this model takes 2-{most} tokens")
    return max_length


def _device_name(device: torch.device) -> str:
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)
