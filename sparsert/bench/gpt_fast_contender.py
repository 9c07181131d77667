"""gpt-fast as a contender: a Llama in a few hundred lines of torch, its decode step compiled into one CUDA graph.

It is a repository, not a package: ``model.py`` and ``generate.py`` come from the folder that the environment
variable SPARSERT_GPT_FAST names, and nothing of it is copied here. What its ``generate`` does for a text is done
here with its own functions, compiled and sampled by its own defaults: prefill, then its loop of decode steps. The
loop never waits for the device, so a token's time is that of a CUDA event behind its step. What it gives up:
weights are random whatever model is measured, since gpt-fast reads a format of its own; and of Llama models those
whose heads are ``hidden_size / heads`` wide, without biases.

Source: https://github.com/meta-pytorch/gpt-fast, ``generate.py``.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import os
import sys
import time
import types
from typing import Any

import torch
from torch import Tensor

from sparsert.bench.effort import Effort
from sparsert.bench.memory import PeakMemory
from sparsert.bench.metrics import Run
from sparsert.bench.peers import GPT_FAST_VARIABLE, NOT_CHECKED
from sparsert.bench.subject import Subject
from sparsert.bench.workload import Setting, random_prompts
from sparsert.errors import UnsupportedError

#: Defaults of its command line.
_SAMPLING = {"temperature": 0.8, "top_k": 200}

_WEIGHT_STD = 0.02


class GptFastContender:
    """gpt-fast's model and loop, compiled on a GPU, as it is on a CPU.

    Attributes:
        load_s: seconds to make the model.
    """

    def __init__(self, subject: Subject, device: torch.device) -> None:
        """Make the model on its device.

        Raises:
            UnsupportedError: not a model that gpt-fast runs.
        """
        if subject.removed or subject.sparse:
            raise UnsupportedError("gpt-fast runs unpruned models only")
        model_module, self._generate = _import_gpt_fast(os.environ[GPT_FAST_VARIABLE])
        start = time.perf_counter()
        arguments = model_module.ModelArgs(**_model_arguments(subject, model_module.ModelArgs))
        with torch.device("meta"):
            model: Any = model_module.Transformer(arguments).to(subject.torch_dtype)
        self.model = model.to_empty(device=device).eval().requires_grad_(False)
        torch.manual_seed(subject.seed)
        for parameter in self.model.parameters():
            if parameter.dim() == 1:
                torch.nn.init.ones_(parameter)  # scales of norms
            else:
                torch.nn.init.normal_(parameter, std=_WEIGHT_STD)
        if subject.config.tie_word_embeddings:
            self.model.output.weight = self.model.tok_embeddings.weight
        self._memory = PeakMemory(device)
        self._memory.clear()
        self.load_s = time.perf_counter() - start
        self._load_peak_bytes = self._memory.peak_bytes()
        self._device, self._vocab_size = device, subject.config.vocab_size
        if device.type == "cuda":
            if hasattr(self._generate, "create_block_mask"):  # versions that build masks of flex attention
                self._generate.create_block_mask = torch.compile(self._generate.create_block_mask)
            self._generate.decode_one_token = torch.compile(
                self._generate.decode_one_token, mode="reduce-overhead", fullgraph=True
            )

    def facts(self) -> dict[str, Any]:
        """What is loaded."""
        weight_bytes = sum(parameter.nbytes for parameter in self.model.parameters())
        embedding = self.model.tok_embeddings.weight
        tied = self.model.output.weight is embedding
        sampling = ", ".join(f"{name} {value:g}" for name, value in _SAMPLING.items())
        return {
            "load_s": self.load_s,
            "load_peak_bytes": self._load_peak_bytes,
            "weight_bytes": weight_bytes,
            "read_bytes": weight_bytes - (0 if tied else embedding.nbytes),
            "kernel": f"torch.compile, static cache, {sampling}" if self._device.type == "cuda" else "eager",
            "fallbacks": [],
        }

    def check(self, batch: int) -> dict[str, Any]:
        """Its weights are its own."""
        return {"correct": None, "check": NOT_CHECKED}

    def measure(self, setting: Setting, effort: Effort, seed: int) -> tuple[list[Run], dict[str, Any]]:
        """Warm up, send the prompts as often as the effort allows; returns the runs and further keys of the row.

        Raises:
            UnsupportedError: a batch that this version does not run, or prompts that would have to wait.
        """
        if setting.batch > 1 and "batch_size" not in inspect.signature(self._generate.generate).parameters:
            raise UnsupportedError("this version of gpt-fast runs one text at a time")
        if setting.num_prompts != setting.batch:
            raise UnsupportedError("gpt-fast has no queue: it runs as many prompts as the batch holds")
        prompts = random_prompts(setting, self._vocab_size, seed)
        tokens = torch.tensor(prompts, dtype=torch.int, device=self._device)
        self._make_caches(setting)
        for _ in range(max(1, effort.warmup)):
            self._send(tokens, setting)
        self._memory.reset()
        return effort.measure(lambda: self._send(tokens, setting)), self._memory.to_dict()

    def _make_caches(self, setting: Setting) -> None:
        """Caches of exactly this size; gpt-fast itself would keep larger ones, whose every row a step writes."""
        for layer in self.model.layers:
            layer.attention.kv_cache = None
        self._memory.clear()
        self.model.max_batch_size = self.model.max_seq_length = -1
        with torch.device(self._device):
            self.model.setup_caches(max_batch_size=setting.batch, max_seq_length=setting.length)

    @torch.no_grad()
    def _send(self, tokens: Tensor, setting: Setting) -> Run:
        batch, input_len = tokens.shape
        clock = _DeviceClock(self._device)
        positions = torch.arange(input_len, device=self._device)
        first = self._generate.prefill(self.model, tokens, positions, **_SAMPLING)
        clock.tick()
        position = torch.tensor([input_len], device=self._device, dtype=torch.int)
        self._generate.decode_n_tokens(
            self.model,
            first.clone().view(batch, -1),
            position,
            setting.output_len - 1,
            callback=lambda _: clock.tick(),
            **_SAMPLING,
        )
        token_s = tuple(clock.seconds())
        return Run((token_s,) * batch, clock.elapsed_s())


class _DeviceClock:
    """Times on the device since it was made, taken without waiting; on a CPU the wall clock's."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._ticks: list[Any] = []
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        self._start = time.perf_counter()
        self._end: float | None = None
        self.tick()  # tick 0 is the start

    def tick(self) -> None:
        """Note when the device gets here."""
        if self._device.type != "cuda":
            self._ticks.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        self._ticks.append(event)

    def seconds(self) -> list[float]:
        """Seconds from the start to every later tick; waits for the last."""
        if self._device.type != "cuda":
            self._end = time.perf_counter()
            return [tick - self._ticks[0] for tick in self._ticks[1:]]
        torch.cuda.synchronize(self._device)
        self._end = time.perf_counter()
        return [self._ticks[0].elapsed_time(tick) * 1e-3 for tick in self._ticks[1:]]

    def elapsed_s(self) -> float:
        """Seconds on the host from the start to the end of :meth:`seconds`."""
        assert self._end is not None, "seconds() comes first"
        return self._end - self._start


def _import_gpt_fast(folder: str) -> tuple[Any, Any]:
    """Its modules ``model`` and ``generate``, which have to be importable by these names."""
    importlib.import_module("torch._functorch.config")  # generate.py sets it without importing it
    sys.path.insert(0, folder)
    # its tokenizer needs packages of its own, and no text is read here
    tokenizer: Any = types.ModuleType("tokenizer")
    tokenizer.get_tokenizer = None
    sys.modules["tokenizer"] = tokenizer
    return importlib.import_module("model"), importlib.import_module("generate")


def _model_arguments(subject: Subject, arguments_class: Any) -> dict[str, Any]:
    """What its ``ModelArgs`` take, from a Hugging Face configuration.

    Raises:
        UnsupportedError: the model has something that gpt-fast does not know.
    """
    config, stored = subject.config, subject.hf_config
    if stored.get("model_type") != "llama":
        raise UnsupportedError(f"gpt-fast runs Llama models, and {subject.name} is a {stored.get('model_type')}")
    first = config.blocks[0]
    if first.attention is None or first.mlp is None or any(block != first for block in config.blocks):
        raise UnsupportedError(f"gpt-fast runs blocks that are all alike; those of {subject.name} differ")
    shape, rope = first.attention.shape, first.attention.rope
    if shape.head_dim * shape.num_heads != config.hidden_size or first.attention.bias:
        raise UnsupportedError(f"gpt-fast runs heads of hidden_size / heads without biases; {subject.name} has others")
    arguments: dict[str, Any] = {
        "block_size": config.max_position_embeddings,
        "vocab_size": config.vocab_size,
        "n_layer": config.num_blocks,
        "n_head": shape.num_heads,
        "n_local_heads": shape.num_kv_heads,
        "dim": config.hidden_size,
        "intermediate_size": first.mlp.intermediate_size,
        "rope_base": rope.theta,
        "norm_eps": config.norm.eps,
    }
    if rope.kind == "llama3":
        names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        arguments["rope_scaling"] = {name: getattr(rope, name) for name in names}
    unknown = set(arguments) - {field.name for field in dataclasses.fields(arguments_class)}
    if unknown:
        raise UnsupportedError(f"this version of gpt-fast does not know {', '.join(sorted(unknown))} of {subject.name}")
    return arguments
