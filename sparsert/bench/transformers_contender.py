"""transformers as a contender: ``generate`` as it is, and with a static cache, which makes it compile its decode step.

It runs the unpruned architecture on the same token ids. A checkpoint is loaded from its directory; otherwise
the same configuration gets random weights, made on the device in the run's dtype. The streamer says when each
token comes. Compiling is part of the warm-up: once for the first batch size and once more, with a dynamic one,
for all others. What it gives up: nothing here tunes transformers beyond what its guide says.

Source: ``transformers`` text generation guide (static cache).
"""

from __future__ import annotations

import time
from typing import Any

import torch

from sparsert.bench.effort import Effort
from sparsert.bench.memory import PeakMemory
from sparsert.bench.metrics import Run
from sparsert.bench.peers import NOT_CHECKED
from sparsert.bench.subject import Subject
from sparsert.bench.workload import Setting, random_prompts

#: Eager transformers needs no more than this many tokens to be warm; compiled, it sees the full length, because the
#: static cache is as long as the text, and another length would compile again.
_WARM_UP_TOKENS = 8

#: Decode steps until a compiled one is warm: it compiles in the first, records its CUDA graph in the second.
_STEPS_TO_COMPILE = 3


class TransformersContender:
    """``generate`` of transformers: eager with a growing cache, or compiled with a static one.

    Attributes:
        load_s: seconds to load the model, or to make it.
    """

    def __init__(self, subject: Subject, device: torch.device, *, compiled: bool) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        start = time.perf_counter()
        if subject.checkpoint is not None:
            self.model: Any = AutoModelForCausalLM.from_pretrained(subject.checkpoint, dtype=subject.torch_dtype)
            self.model.to(device)
        else:
            torch.manual_seed(subject.seed)
            config = AutoConfig.for_model(**subject.hf_config)
            with torch.device(device):  # drawn there, in the run's dtype: nothing of it passes through the host
                self.model = AutoModelForCausalLM.from_config(config, dtype=subject.torch_dtype)
        self.model.eval()
        self.load_s = time.perf_counter() - start
        # nothing ends a text early
        self.model.generation_config.eos_token_id = None
        self.model.generation_config.pad_token_id = 0
        self._device, self._compiled = device, compiled
        self._memory = PeakMemory(device)
        self._load_peak_bytes = self._memory.peak_bytes()

    def facts(self) -> dict[str, Any]:
        """What is loaded."""
        embedding = self.model.get_input_embeddings().weight
        weight_bytes = sum(parameter.nbytes for parameter in self.model.parameters())
        tied = self.model.get_output_embeddings().weight is embedding
        return {
            "load_s": self.load_s,
            "load_peak_bytes": self._load_peak_bytes,
            "weight_bytes": weight_bytes,
            "read_bytes": weight_bytes - (0 if tied else embedding.nbytes),
            "kernel": "torch.compile, static cache" if self._compiled else "eager",
            "fallbacks": [],
        }

    def check(self, batch: int) -> dict[str, Any]:
        """Nothing to check it against: it is what others are checked against."""
        return {"correct": None, "check": NOT_CHECKED}

    def measure(self, setting: Setting, effort: Effort, seed: int) -> tuple[list[Run], dict[str, Any]]:
        """Warm up, send the prompts as often as the effort allows; returns the runs and further keys of the row."""
        prompts = random_prompts(setting, self.model.config.vocab_size, seed)
        self._memory.clear()
        warmup, tokens = effort.warmup, min(setting.output_len, _WARM_UP_TOKENS)
        if self._compiled:
            tokens = setting.output_len
            warmup = max(warmup, 1 if tokens > _STEPS_TO_COMPILE else _STEPS_TO_COMPILE)
        for _ in range(warmup):
            self._send(prompts[: setting.batch], setting.batch, tokens)
        self._memory.reset()
        runs = effort.measure(lambda: self._send(prompts, setting.batch, setting.output_len))
        return runs, self._memory.to_dict()

    def _send(self, prompts: list[list[int]], batch: int, output_len: int) -> Run:
        token_s: list[tuple[float, ...]] = []
        options = {"cache_implementation": "static"} if self._compiled else {}
        start = time.perf_counter()
        for begin in range(0, len(prompts), batch):
            ids = torch.tensor(prompts[begin : begin + batch], device=self._device)
            clock = _TokenClock(start)
            self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=output_len,
                do_sample=False,
                streamer=clock,
                **options,
            )
            token_s += [tuple(clock.token_s)] * ids.shape[0]
        return Run(tuple(token_s), time.perf_counter() - start)


class _TokenClock:
    """A streamer of transformers that notes when tokens come; the prompt, which comes first, is left out."""

    def __init__(self, start: float) -> None:
        self.token_s: list[float] = []
        self._start = start
        self._prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        if self._prompt_seen:
            self.token_s.append(time.perf_counter() - self._start)
        self._prompt_seen = True

    def end(self) -> None:
        """Nothing is held back."""
