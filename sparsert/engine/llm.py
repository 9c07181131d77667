"""The facade: a model directory or hub id in, texts out.

    llm = LLM("path/to/model", remove_blocks="21-25,27")
    for completion in llm.generate(["The sea was"], SamplingParams(max_new_tokens=32)):
        print(completion.text)

Names follow what users of other engines know (``LLM``, ``SamplingParams``, ``generate``). Prompts run in
batches of up to sixteen, in the order given; texts of one batch start together and the batch ends with
its longest. What it gives up: nothing joins a batch that is under way, which is a server's business.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsert import ops
from sparsert.checkpoint import MaskFile, open_checkpoint, read_maskllm, resolve_checkpoint
from sparsert.engine.cache import kv_bytes_per_token
from sparsert.engine.generate import GrowingText, StreamCallback, generate_batch
from sparsert.engine.params import SamplingParams
from sparsert.engine.results import Completion
from sparsert.engine.runner import MAX_BATCH_SIZE, Runner
from sparsert.engine.tokenizer import (
    Prompt,
    encode_prompt,
    has_tokenizer,
    is_token_ids,
    load_tokenizer,
    read_eos_token_ids,
)
from sparsert.errors import InputError
from sparsert.models import DecoderConfig, load_model
from sparsert.schedule import LayerPlan, parse_block_list, read_block_order


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
        model: str | Path,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        masks: str | Path | MaskFile | None = None,
        remove_blocks: str | Iterable[int] | None = None,
        block_order: tuple[str | Path, int] | None = None,
        force_remove: bool = False,
        max_length: int | None = None,
        backend: str = "auto",
        mask_maker: Callable[[Tensor], Tensor] | None = None,
        progress: bool = False,
    ) -> None:
        """Load a model.

        Args:
            model: a model directory, or a hub id such as ``owner/name``.
            device: ``"cpu"``, ``"cuda"``, ``"cuda:1"``; default a GPU if there is one.
            dtype: bfloat16, float16 or float32; default float32 on a CPU, 16-bit on a GPU.
            masks: a MaskLLM mask file for this model.
            remove_blocks: blocks to skip, as ``"21-25,27"`` or numbers.
            block_order: an order file and how many blocks to remove by it, instead of ``remove_blocks``.
            force_remove: allow removing blocks 0-3 and the last two.
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
        self.checkpoint = open_checkpoint(resolve_checkpoint(str(model)))
        config = DecoderConfig.from_hf(self.checkpoint.config)
        plan = _layer_plan(config.num_blocks, remove_blocks, block_order, force_remove)
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
        self._tokenizer: Any = None
        self.load_s = time.perf_counter() - start

    @property
    def tokenizer(self) -> Any:
        """The checkpoint's tokenizer, loaded when first asked for.

        Raises:
            CheckpointError: there is none, or it cannot be read.
        """
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.checkpoint.directory)
        return self._tokenizer

    def generate(
        self,
        prompts: str | Sequence[Prompt],
        params: SamplingParams | None = None,
        *,
        stream: StreamCallback | None = None,
        chat: bool = False,
    ) -> list[Completion]:
        """Generate a text for each prompt.

        Args:
            prompts: texts, lists of token ids (taken as they are), or with ``chat`` conversations; a lone
                string is one prompt.
            params: default greedy, 128 tokens.
            stream: called with (index of the prompt, new text, new token ids) for every new token; the
                text may be empty while a character or a possible stop string is incomplete.
            chat: put each text or conversation through the checkpoint's chat template.

        Returns:
            One completion for each prompt, in order.

        Raises:
            InputError: no prompts, an empty one, one with token ids outside the vocabulary, or one too
                long for ``max_length``.
            CheckpointError: text is given and the checkpoint has no tokenizer.
            UnsupportedError: ``chat`` without a chat template.
        """
        params = params or SamplingParams()
        given: list[Prompt] = [prompts] if isinstance(prompts, str) else list(prompts)
        if not given:
            raise InputError("no prompts given; give at least one")
        if not all(isinstance(prompt, Sequence) for prompt in given):
            raise InputError("each prompt is a text or a list of token ids; write one list of ids as [[1, 2, 3]]")
        texts = self._prepare(given, params, chat)
        completions: list[Completion] = []
        for begin in range(0, len(texts), MAX_BATCH_SIZE):
            batch = texts[begin : begin + MAX_BATCH_SIZE]
            timings = generate_batch(self.runner, batch, params, load_s=self.load_s, stream=stream)
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

    def _prepare(self, prompts: Sequence[Prompt], params: SamplingParams, chat: bool) -> list[GrowingText]:
        """Tokenise and check the prompts."""
        needs_text = bool(params.stop) or not all(is_token_ids(prompt) for prompt in prompts)
        tokenizer = self.tokenizer if needs_text or has_tokenizer(self.checkpoint.directory) else None
        stop_tokens = frozenset(params.stop_token_ids)
        if not params.ignore_eos:
            stop_tokens |= self.eos_token_ids
        texts, shortened = [], []
        for index, prompt in enumerate(prompts):
            if is_token_ids(prompt):
                ids = self._check_token_ids(index, prompt)
            else:
                ids = encode_prompt(tokenizer, prompt, index, chat=chat)
            room = self.max_length - len(ids)
            if room < 1:
                raise InputError(
                    f"prompt {index} has {len(ids)} tokens, but prompt and output together must fit into max_length "
                    f"{self.max_length}; shorten it to {self.max_length - 1} or fewer{self._longer_hint()}"
                )
            if room < params.max_new_tokens:
                shortened.append(index)
            limit = min(params.max_new_tokens, room)
            texts.append(GrowingText(index, ids, limit, stop_tokens, tuple(params.stop), tokenizer))
        if shortened:
            first = texts[shortened[0]]
            warnings.warn(
                f"{len(shortened)} prompts leave less room than max_new_tokens {params.max_new_tokens}: prompt "
                f"{first.index} has {len(first.prompt)} tokens, so at most {first.limit} can follow within max_length "
                f"{self.max_length}",
                stacklevel=3,
            )
        return texts

    def _check_token_ids(self, index: int, prompt: Prompt) -> list[int]:
        ids = [int(token) for token in prompt]  # type: ignore[arg-type]
        vocab_size = self.model.config.vocab_size
        if not ids:
            raise InputError(f"prompt {index} is empty; give at least one token")
        bad = [token for token in ids if not 0 <= token < vocab_size]
        if bad:
            raise InputError(f"prompt {index}: token id {bad[0]} is outside the vocabulary, 0-{vocab_size - 1}")
        return ids

    def _longer_hint(self) -> str:
        most = self.model.config.max_position_embeddings
        return f", or raise max_length (this model: up to {most})" if most > self.max_length else ""

    def summary(self) -> dict[str, Any]:
        """What is loaded, as plain data for JSON.

        Returns:
            Architecture, blocks kept and removed, linear layers by kind, bytes of weights packed and
            dense, dtype, device, backend, the kernel that a decode step at batch 1 runs, KV cache bytes
            per token, and ``warnings``: whatever is not as a user may expect.
        """
        model, report = self.model, self.model.report
        kernel, fallback = self._decode_kernel()
        tied = model.lm_head.weight is model.embed_tokens.weight
        head_bytes = 0 if tied else model.lm_head.weight.nbytes
        return {
            "model": str(self.checkpoint.directory),
            "architecture": model.config.architecture,
            "blocks": model.plan.num_blocks,
            "blocks_kept": list(model.plan.kept),
            "blocks_removed": list(model.plan.removed),
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
            "max_length": self.max_length,
            "kv_bytes_per_token": kv_bytes_per_token(model.attention_shapes, model.dtype),
            "load_s": round(self.load_s, 3),
            "warnings": [*report.warnings, *fallback],
        }

    def _decode_kernel(self) -> tuple[str, list[str]]:
        """The kernel of the packed layers at batch 1, and a sentence if it is not the one meant for them."""
        if not self.model.report.count("2:4"):
            return "dense", []
        if self.backend == "torch":
            return "torch.sparse", []
        config = self.model.config
        choice = ops.explain(
            config.hidden_size,
            config.intermediate_size,
            1,
            device=self.model.device,
            dtype=self.model.dtype,
            backend=self.backend,
        )
        passed_over = [f"2:4 layers run on {choice.kernel}, not {name}: {why}" for name, why in choice.rejected]
        return choice.kernel, passed_over if choice.is_fallback else []


def _layer_plan(
    num_blocks: int,
    remove_blocks: str | Iterable[int] | None,
    block_order: tuple[str | Path, int] | None,
    force: bool,
) -> LayerPlan:
    if remove_blocks is not None and block_order is not None:
        raise InputError("remove_blocks and block_order exclude each other; give a block list or an order file")
    if block_order is not None:
        path, count = block_order
        remove_blocks = read_block_order(path, count, num_blocks, force=force)
    elif isinstance(remove_blocks, str):
        remove_blocks = parse_block_list(remove_blocks)
    return LayerPlan.remove(num_blocks, remove_blocks or (), force=force)


def _check_max_length(max_length: int | None, config: DecoderConfig) -> int:
    most = config.max_position_embeddings
    if max_length is None:
        return most
    if not 2 <= max_length <= most:
        raise InputError(f"max_length {max_length} is out of range; this model takes 2-{most} tokens")
    return max_length


def _device_name(device: torch.device) -> str:
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)
