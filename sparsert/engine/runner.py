"""Prefill and decode of one batch over a static KV cache, under a layer plan.

A prefill sees exactly the prompts' tokens, packed one after the other, and at most
:data:`PREFILL_CHUNK_TOKENS` of them in one forward (:mod:`sparsert.engine.prompt_chunks`).

Shapes of steps are few on purpose. The cache grows in powers of two and is kept between batches; a decode step
reads a window of 256, 512, 1024, ... positions, the smallest that holds the longest row still running.
So on a GPU a step is one of a handful of CUDA graphs, by (plan, kind, batch, window, tokens a row), each captured
the first time it is needed (:mod:`sparsert.engine.graphs`); on a CPU the same step function runs as it is. A short
prefill is one too, by (plan, texts, tokens; :mod:`sparsert.engine.prompt_step`). What it gives up: up to half of the
window is read for nothing, and a longer cache drops the graphs.

A runner is a plan over a workspace. Runners of several plans of one model (:meth:`Runner.with_plan`) share
the workspace, that is weights, cache, static inputs and graphs: slots of the cache keep the numbers of the
loaded model's layers, so a shortened plan reads and writes some of the full plan's slots. Switching plans
costs nothing, and a draft can go on from what the full model has read.
"""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from sparsert.engine.cache import DecodeAttention, ExtendAttention, KVCache, PackedPrefillAttention, kv_bytes_per_token
from sparsert.engine.graphs import StepGraphs
from sparsert.engine.prompt_chunks import cut_prompts
from sparsert.engine.prompt_step import PromptBucket, PromptInputs, find_bucket, prompt_graph_tokens
from sparsert.errors import InputError
from sparsert.models import DecoderModel
from sparsert.schedule import LayerPlan

#: Rows of a batch at most: the batch sizes that decode graphs are made for.
MAX_BATCH_SIZE = 16

#: Tokens a row that one step may add at most.
MAX_STEP_TOKENS = 17

#: Tokens of one forward of a prefill at most. Products of 8,192 rows fill a GPU as well as larger ones, and the widest
#: activation of a layer (gate and up of Llama-3.1-8B, 28,672 values in 16 bits) stays at 470 MB.
PREFILL_CHUNK_TOKENS = 8192

#: Smallest window of a decode step, in tokens.
_LEAST_WINDOW = 256

#: Cache lengths are multiples of it, so that rows of keys and masks stay aligned for attention kernels.
_LENGTH_UNIT = 16

AnyRunner = TypeVar("AnyRunner", bound="Runner")


def window_for(tokens: int, capacity: int) -> int:
    """Smallest window (256, 512, 1024, ..., at most ``capacity``) that holds ``tokens`` positions."""
    window = _LEAST_WINDOW
    while window < tokens:
        window *= 2
    return min(window, capacity)


class _Workspace:
    """What the runners of one loaded model share.

    Attributes:
        cache: keys and values, None before the first prefill.
        graphs: of steps; None on a CPU.
        tables: addresses of the rotary tables that the graphs read.
        prompts: static inputs of short prefills.
        prompt_graph_tokens: most tokens, padding included, of a prefill that is padded and captured; 0: none is.
        tokens: static input of a step of one token: int64 ``[MAX_BATCH_SIZE]``.
        step_tokens: static input of a step of several: int64 ``[MAX_BATCH_SIZE, MAX_STEP_TOKENS]``.
        lengths: static: int64 ``[MAX_BATCH_SIZE]``, tokens of each row in the cache.
        batch: rows of the batch under way.
        lock: held while a batch is under way.
    """

    def __init__(self, model: DecoderModel) -> None:
        device = model.device
        self.cache: KVCache | None = None
        self.tokens = torch.zeros(MAX_BATCH_SIZE, dtype=torch.int64, device=device)
        self.step_tokens = torch.zeros(MAX_BATCH_SIZE, MAX_STEP_TOKENS, dtype=torch.int64, device=device)
        self.lengths = torch.zeros(MAX_BATCH_SIZE, dtype=torch.int64, device=device)
        self.graphs = StepGraphs([self.tokens, self.lengths]) if device.type == "cuda" else None
        self.tables: tuple[int, ...] = ()
        self.prompts = PromptInputs(MAX_BATCH_SIZE, device)
        # also loads what packed attention is made of: that can take more than a second, which the first prompt should
        # not wait for
        self.prompt_graph_tokens = prompt_graph_tokens(model.attention_shapes, device, model.dtype)
        self.batch = 0
        self.lock = threading.Lock()


class Runner:
    """Runs one batch at a time: one :meth:`prefill`, then steps that add a token or several to each text.

    Attributes:
        model: the loaded model.
        plan: which of its blocks run.
        max_length: most tokens of a text, prompt and output together.
    """

    def __init__(self, model: DecoderModel, max_length: int) -> None:
        self.model = model
        self.plan = model.plan
        self.max_length = max_length
        self._workspace = _Workspace(model)

    def with_plan(self: AnyRunner, plan: LayerPlan) -> AnyRunner:
        """A runner of another plan over the same weights, cache and graphs.

        Raises:
            InputError: the plan runs what is not loaded.
        """
        plan.check_within(self.model.plan, "the loaded model")
        other = copy.copy(self)
        other.plan = plan
        return other

    def shares_cache_with(self, other: Runner) -> bool:
        """Whether two runners differ in their plans only."""
        return self._workspace is other._workspace

    @property
    def capture_s(self) -> float:
        """Seconds spent on capturing CUDA graphs so far."""
        return self._workspace.graphs.capture_s if self._workspace.graphs is not None else 0.0

    @property
    def graph_count(self) -> int:
        """CUDA graphs held now, of all plans that share the cache."""
        return len(self._workspace.graphs) if self._workspace.graphs is not None else 0

    @property
    def cache_nbytes(self) -> int:
        """Bytes of the KV cache as it is now."""
        return self._workspace.cache.nbytes if self._workspace.cache is not None else 0

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of keys and values that the plan writes for one token of one text."""
        return kv_bytes_per_token(self.model.config.attention_shapes(self.plan), self.model.dtype)

    @property
    def lengths(self) -> Tensor:
        """Tokens of each row in the cache: int64 ``[batch]`` on the device, a copy."""
        return self._workspace.lengths[: self._workspace.batch].clone()

    @contextlib.contextmanager
    def session(self) -> Iterator[None]:
        """Hold the cache for one batch.

        Raises:
            InputError: another batch is under way, in another thread or around a stream callback.
        """
        if not self._workspace.lock.acquire(blocking=False):
            raise InputError(
                "this model is in the middle of another call of generate, and its plans share one cache; wait for that "
                "call to return, or load the model a second time"
            )
        try:
            yield
        finally:
            self._workspace.lock.release()

    def prefill(
        self,
        prompts: Sequence[Sequence[int]],
        room: int,
        spare: int = 0,
        *,
        chunk_tokens: int = PREFILL_CHUNK_TOKENS,
    ) -> Tensor:
        """Read the prompts into the cache, one after the other and some tokens at a time.

        There is no padding, unless so few tokens are read that the whole prefill is one CUDA graph.

        Args:
            prompts: token ids of 1 to :data:`MAX_BATCH_SIZE` texts, of any lengths from 1.
            room: positions that the longest text will need in the end, at most ``max_length``.
            spare: further positions behind that which steps may write to.
            chunk_tokens: most tokens of one forward, of all texts together; memory for activations grows with it.

        Returns:
            Logits of each first new token, ``[batch, vocabulary]``. Nothing waits for the device once the prompts
            are on it.

        Raises:
            InputError: too many prompts, an empty or too long one, or no memory for the cache.
        """
        lengths = [len(prompt) for prompt in prompts]
        if not 1 <= len(prompts) <= MAX_BATCH_SIZE or min(lengths) < 1:
            raise InputError(f"got {len(prompts)} prompts of {lengths} tokens; need 1-{MAX_BATCH_SIZE}, none empty")
        if max(*lengths, room) > self.max_length:
            raise InputError(f"{max(*lengths, room)} tokens do not fit into max_length {self.max_length}")
        bucket = find_bucket(lengths, min(chunk_tokens, self._workspace.prompt_graph_tokens))
        longest = max(*lengths, room)
        if bucket is not None:  # padding is written behind the last text
            spare = max(spare, lengths[-1] + bucket.padding_behind(lengths) - longest)
        cache = self._reserve(len(prompts), longest, spare)
        device = self.model.device
        self._workspace.batch = len(prompts)
        if bucket is not None:
            with self._on_device():
                self._workspace.prompts.fill_(prompts, bucket)
                logits = self._run((self.plan, "prompt", *bucket), lambda: self._prompt_step(bucket))
                # the next step, whichever it is, may write where a graph's result lies
                return logits[: len(prompts)].clone()
        self.place_(torch.tensor(lengths).to(device))
        with torch.inference_mode(), self._on_device():
            first = [
                self.model(chunk.tokens, PackedPrefillAttention(cache, chunk), rows=chunk.ends, plan=self.plan)[0]
                for chunk in cut_prompts(prompts, chunk_tokens, device)
            ]
            return torch.cat(first) if len(first) > 1 else first[0]

    def decode(self, tokens: Tensor, longest: int) -> Tensor:
        """Add one token to each row.

        Args:
            tokens: int64 ``[batch]`` on the device: the tokens just chosen.
            longest: tokens in the cache before this step, of the longest row whose logits matter.

        Returns:
            Logits of the next tokens, ``[batch, vocabulary]``, valid until the next call. Nothing waits
            for the device.
        """
        self._workspace.tokens[: self._workspace.batch].copy_(tokens)
        return self._run_step("decode", self._decode_step, longest, 1)

    def decode_greedy(self, tokens: Tensor, longest: int) -> Tensor:
        """Add one token to each row and take the likeliest next ones: all of it one graph on a GPU.

        Args:
            tokens, longest: as for :meth:`decode`; what the last greedy step returned is not copied again.

        Returns:
            The next tokens, int64 ``[batch]``, valid until the next step is launched.
        """
        here = self._workspace.tokens[: self._workspace.batch]
        if tokens.data_ptr() != here.data_ptr():
            here.copy_(tokens)
        self._run_step("greedy", self._greedy_step, longest, 1)
        return here

    def extend(self, tokens: Tensor, longest: int) -> Tensor:
        """Add several tokens to each row, whose lengths stay: :meth:`place_` says how many of them count.

        Args:
            tokens: int64 ``[batch, tokens]`` on the device, 1 to :data:`MAX_STEP_TOKENS` a row.
            longest: as for :meth:`decode`.

        Returns:
            Logits behind each of them, ``[batch, tokens, vocabulary]``, valid until the next call.
        """
        count = tokens.shape[1]
        self._workspace.step_tokens[: self._workspace.batch, :count].copy_(tokens)
        return self._run_step("extend", self._extend_step, longest, count)

    def place_(self, lengths: Tensor) -> None:
        """Set where the next token of each row goes.

        Args:
            lengths: int64 ``[batch]`` on the device: tokens in the cache that count.
        """
        self._workspace.lengths[: self._workspace.batch].copy_(lengths)

    def _run_step(self, kind: str, step: Callable[[int, int, int], Tensor], longest: int, count: int) -> Tensor:
        """Run a step of ``count`` tokens a row."""
        workspace = self._workspace
        assert workspace.cache is not None, "prefill comes first"
        batch, window = workspace.batch, window_for(longest + count, workspace.cache.length)
        return self._run((self.plan, kind, batch, window, count), lambda: step(batch, window, count))

    def _run(self, key: Hashable, step: Callable[[], Tensor]) -> Tensor:
        """Run a step, as a graph where there are any."""
        workspace = self._workspace
        with torch.inference_mode(), self._on_device():
            if workspace.graphs is None:
                return step()
            tables = tuple(table.data_ptr() for table in self.model.rotary_tables)
            if tables != workspace.tables:
                # another runner of this model, or a plain forward, needed longer ones, and these are gone
                workspace.graphs.clear()
                workspace.tables = tables
            return workspace.graphs.run(key, step)

    # Steps are functions of the static buffers: capturable, same shapes for same arguments.

    def _lengths_within(self, batch: int, window: int, count: int) -> Tensor:
        """Lengths with room for ``count`` tokens in the window: rows that have ended may lie behind it, and move there.

        Outside of the window a row of a model with sliding attention would see nothing at all, and leave NaN in the
        cache for whoever has the row next.
        """
        return self._workspace.lengths[:batch].clamp_(max=window - count)

    def _decode_step(self, batch: int, window: int, count: int) -> Tensor:
        workspace = self._workspace
        assert workspace.cache is not None
        lengths = self._lengths_within(batch, window, count)
        attention = DecodeAttention(workspace.cache, lengths, window)
        logits: Tensor = self.model(workspace.tokens[:batch].unsqueeze(1), attention, plan=self.plan)
        lengths.add_(1)
        return logits.squeeze(1)

    def _greedy_step(self, batch: int, window: int, count: int) -> Tensor:
        logits = self._decode_step(batch, window, count)
        return self._workspace.tokens[:batch].copy_(logits.argmax(dim=-1))

    def _extend_step(self, batch: int, window: int, count: int) -> Tensor:
        workspace = self._workspace
        assert workspace.cache is not None
        attention = ExtendAttention(workspace.cache, self._lengths_within(batch, window, count), window)
        logits: Tensor = self.model(workspace.step_tokens[:batch, :count], attention, plan=self.plan)
        return logits

    def _prompt_step(self, bucket: PromptBucket) -> Tensor:
        workspace = self._workspace
        assert workspace.cache is not None
        chunk, lengths = workspace.prompts.read(bucket)
        workspace.lengths[: bucket.texts].copy_(lengths)
        attention = PackedPrefillAttention(workspace.cache, chunk)
        logits: Tensor = self.model(chunk.tokens, attention, rows=chunk.ends, plan=self.plan)
        return logits[0]

    def _on_device(self) -> contextlib.AbstractContextManager[object]:
        """Make the model's GPU the current one: kernels and graphs go to the current stream."""
        return torch.cuda.device(self.model.device) if self.model.device.type == "cuda" else contextlib.nullcontext()

    def _reserve(self, batch: int, length: int, spare: int) -> KVCache:
        """A cache of at least this size; a new one makes captured graphs useless."""
        workspace, old = self._workspace, self._workspace.cache
        needed = length + spare
        if old is not None and old.batch_size >= batch and old.length >= needed:
            return old
        if old is not None:
            batch, needed = max(batch, old.batch_size), max(needed, old.length)
        rows = 1 << (batch - 1).bit_length()
        capacity = -(-window_for(needed, max(needed, self.max_length)) // _LENGTH_UNIT) * _LENGTH_UNIT
        workspace.cache = old = None  # free before the larger one is made
        if workspace.graphs is not None:
            workspace.graphs.clear()
        self.model.reserve_positions_(capacity)
        workspace.cache = KVCache(self.model.attention_shapes, rows, capacity, self.model.device, self.model.dtype)
        return workspace.cache
