"""vLLM as a contender: its offline interface, prefix caching off.

A checkpoint is loaded from its directory; otherwise the same configuration gets random weights, which vLLM calls
a dummy load. The offline interface does not say when tokens come, so TTFT is the time of a request for one token,
and gaps between tokens are not known.

Source: vLLM ``benchmarks/latency.py``.
"""

from __future__ import annotations

import importlib
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from sparsert.bench.effort import Effort
from sparsert.bench.metrics import Run
from sparsert.bench.peers import NOT_CHECKED
from sparsert.bench.subject import Subject
from sparsert.bench.workload import Setting, random_prompts
from sparsert.errors import UnsupportedError

#: Tokens of a warm-up run.
_WARM_UP_TOKENS = 8

#: Share of the GPU's memory that vLLM may take for weights and cache.
_MEMORY_SHARE = 0.85


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
                gpu_memory_utilization=_MEMORY_SHARE,
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
        return {"correct": None, "check": NOT_CHECKED}

    def measure(self, setting: Setting, effort: Effort, seed: int) -> tuple[list[Run], dict[str, Any]]:
        """Warm up, send the prompts as often as the effort allows; returns the runs and further keys of the row."""
        prompts = random_prompts(setting, self._vocab_size, seed)
        for _ in range(max(1, effort.warmup)):
            self._seconds(prompts, _WARM_UP_TOKENS)

        def send() -> Run:
            first = self._seconds(prompts[: setting.batch], 1)
            last = self._seconds(prompts, setting.output_len)
            token_s = (first, last) if setting.output_len > 1 else (last,)
            return Run((token_s,) * len(prompts), last, streamed=False)

        # it takes a fixed share of the memory whatever the work, so a peak would say nothing
        return effort.measure(send), {"peak_bytes": None, "peak_reserved_bytes": None, "peak_of": "not known"}

    def _seconds(self, prompts: list[list[int]], output_len: int) -> float:
        params = self._vllm.SamplingParams(max_tokens=output_len, temperature=0.0, ignore_eos=True, detokenize=False)
        start = time.perf_counter()
        self._llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
        return time.perf_counter() - start
