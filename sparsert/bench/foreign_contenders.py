"""Other people's engines: transformers, as it is and compiled, and vLLM.

Each runs the unpruned architecture the way its documentation says, on the same token ids. A checkpoint is
loaded from its directory; otherwise the same configuration gets random weights, made on the device (vLLM
calls that a dummy load). transformers says when each token comes through its streamer. vLLM's offline
interface does not, so its TTFT is the time of a request for one token, and gaps between tokens are not known.

Source: ``transformers`` text generation guide (static cache); vLLM ``benchmarks/latency.py``.
"""

from __future__ import annotations

import importlib.util
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from sparsert.bench.memory import PeakMemory
from sparsert.bench.metrics import Run
from sparsert.bench.subject import Subject
from sparsert.bench.workload import Setting, random_prompts
from sparsert.errors import UnsupportedError

#: Eager transformers needs no more than this many tokens to be warm; a compiled one has to see the full length.
_WARM_UP_TOKENS = 8

_NO_CHECK = "not checked: another engine on weights of its own"

#: Share of the GPU's memory that vLLM may take for weights and cache.
_VLLM_MEMORY_SHARE = 0.85


def why_absent(peer: str, device: torch.device) -> str | None:
    """Why a peer cannot run here, as far as that can be told without starting it; None if it may."""
    package = {"hf": "transformers", "hf-compile": "transformers", "vllm": "vllm"}.get(peer)
    if package is not None and importlib.util.find_spec(package) is None:
        return f"{package} is not installed"
    if peer in ("hf-compile", "torch-sparse", "vllm") and device.type != "cuda":
        what = {"hf-compile": "transformers compiles its decode step", "torch-sparse": "torch.sparse runs 2:4 weights"}
        return f"{what.get(peer, 'vLLM runs here')} on a GPU only, and this is the {device.type.upper()}"
    return None


class HuggingFaceContender:
    """``generate`` of transformers: eager with a growing cache, or compiled with a static one.

    Attributes:
        load_s: seconds to load the model, or to make it.
    """

    def __init__(self, subject: Subject, device: torch.device, *, compiled: bool) -> None:
        from transformers import AutoModelForCausalLM, LlamaConfig
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        start = time.perf_counter()
        if subject.checkpoint is not None:
            self.model: Any = AutoModelForCausalLM.from_pretrained(subject.checkpoint, dtype=subject.torch_dtype)
            self.model.to(device)
        else:
            torch.manual_seed(subject.seed)
            with torch.device(device):
                config = LlamaConfig(**subject.hf_config)
                self.model = AutoModelForCausalLM.from_config(config, dtype=subject.torch_dtype)
        self.model.eval()
        self.load_s = time.perf_counter() - start
        # nothing ends a text early
        self.model.generation_config.eos_token_id = None
        self.model.generation_config.pad_token_id = 0
        self._device, self._compiled, self._seed = device, compiled, subject.seed
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
        return {"correct": None, "check": _NO_CHECK}

    def measure(self, setting: Setting, *, warmup: int, runs: int, seed: int) -> tuple[list[Run], dict[str, Any]]:
        """Send the prompts ``warmup + runs`` times; returns the later runs and further keys of the row."""
        prompts = random_prompts(setting, self.model.config.vocab_size, seed)
        self._memory.clear()
        # compilation happens in the first call and CUDA graphs are recorded in the second
        for _ in range(max(warmup, 2) if self._compiled else warmup):
            tokens = setting.output_len if self._compiled else min(setting.output_len, _WARM_UP_TOKENS)
            self._send(prompts[: setting.batch], setting.batch, tokens)
        self._memory.reset()
        results = [self._send(prompts, setting.batch, setting.output_len) for _ in range(runs)]
        return results, self._memory.to_dict()

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


class VllmContender:
    """vLLM's offline interface, prefix caching off.

    Attributes:
        load_s: seconds until it takes requests, compilation and graph capture included.
    """

    def __init__(self, subject: Subject, device: torch.device, *, batch: int, length: int) -> None:
        """Start the engine.

        Args:
            batch: most texts at once.
            length: most tokens of a text.
        """
        if (device.index or 0) != 0:
            raise UnsupportedError(f"vLLM takes the first GPU and this is {device}; choose it by CUDA_VISIBLE_DEVICES")
        vllm: Any = importlib.import_module("vllm")
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            if subject.checkpoint is None:
                config = {**subject.hf_config, "torch_dtype": subject.dtype}
                Path(folder, "config.json").write_text(json.dumps(config), encoding="utf-8")
            self._llm = vllm.LLM(
                model=subject.checkpoint or folder,
                load_format="dummy" if subject.checkpoint is None else "auto",
                dtype=subject.dtype,
                max_model_len=length + 1,
                max_num_seqs=batch,
                gpu_memory_utilization=_VLLM_MEMORY_SHARE,
                skip_tokenizer_init=True,
                enable_prefix_caching=False,
            )
        self.load_s = time.perf_counter() - start
        self._vllm, self._vocab_size = vllm, subject.config.vocab_size
        self._card = subject.card()

    def facts(self) -> dict[str, Any]:
        """What is loaded; bytes are those of the architecture, since vLLM keeps its own to itself."""
        return {
            "load_s": self.load_s,
            "load_peak_bytes": None,
            "weight_bytes": self._card.weight_bytes,
            "read_bytes": self._card.read_bytes,
            "kernel": f"vLLM {self._vllm.__version__}",
            "fallbacks": [],
        }

    def check(self, batch: int) -> dict[str, Any]:
        """Its logits are not to be had."""
        return {"correct": None, "check": _NO_CHECK}

    def measure(self, setting: Setting, *, warmup: int, runs: int, seed: int) -> tuple[list[Run], dict[str, Any]]:
        """Send the prompts ``warmup + runs`` times; returns the later runs and further keys of the row."""
        prompts = random_prompts(setting, self._vocab_size, seed)
        for _ in range(max(1, warmup)):
            self._seconds(prompts, _WARM_UP_TOKENS)
        results = []
        for _ in range(runs):
            first = self._seconds(prompts[: setting.batch], 1)
            last = self._seconds(prompts, setting.output_len)
            token_s = (first, last) if setting.output_len > 1 else (last,)
            results.append(Run((token_s,) * len(prompts), last, streamed=False))
        # it takes a fixed share of the memory whatever the work, so a peak would say nothing
        return results, {"peak_bytes": None, "peak_reserved_bytes": None, "peak_of": "not known"}

    def _seconds(self, prompts: list[list[int]], output_len: int) -> float:
        params = self._vllm.SamplingParams(max_tokens=output_len, temperature=0.0, ignore_eos=True, detokenize=False)
        start = time.perf_counter()
        self._llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
        return time.perf_counter() - start
