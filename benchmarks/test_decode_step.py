"""One decode step of a whole model with random weights, dense and 2:4, behind a prompt of 128 tokens."""

from __future__ import annotations

import functools

import pytest
import torch
from device_clock import DEVICE, DTYPE, device_seconds, measure
from pytest_benchmark.fixture import BenchmarkFixture

from sparsert.bench.architectures import hf_config
from sparsert.bench.timing import Replay
from sparsert.engine.runner import Runner
from sparsert.models import DecoderConfig, DecoderModel
from sparsert.models.random import random_model

ON_GPU = DEVICE.type == "cuda"
MODEL = "llama-3.2-1b" if ON_GPU else "tiny"
BATCHES = (1, 16) if ON_GPU else (1, 2)
PROMPT_TOKENS = 128 if ON_GPU else 8

#: Logits of a step against those of one pass over the whole text, relative, by dtype.
TOLERANCE = {torch.bfloat16: 3e-2, torch.float32: 1e-4}


@functools.cache
def _model(sparse: bool) -> DecoderModel:
    return random_model(DecoderConfig.from_hf(hf_config(MODEL)), device=DEVICE, dtype=DTYPE, sparse=sparse)


@pytest.mark.benchmark(group="decode step", timer=device_seconds)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("sparsity", ["dense", "2:4"])
def test_decode_step(benchmark: BenchmarkFixture, sparsity: str, batch: int) -> None:
    model = _model(sparsity == "2:4")
    torch.manual_seed(0)
    prompts = torch.randint(3, model.config.vocab_size, (batch, PROMPT_TOKENS))
    runner = Runner(model, 2 * PROMPT_TOKENS)
    tokens = runner.prefill(prompts.tolist(), room=2 * PROMPT_TOKENS).argmax(-1)
    logits = runner.decode(tokens, PROMPT_TOKENS).float()
    with torch.inference_mode():
        texts = torch.cat([prompts.to(DEVICE), tokens[:, None]], dim=1)
        expected = model(texts)[:, -1].float()
    error = float((logits - expected).norm() / expected.norm())
    assert error < TOLERANCE[DTYPE]

    # the step is a CUDA graph of its own
    replay = Replay(lambda: runner.decode(tokens, PROMPT_TOKENS + 1), 1, DEVICE, graph=False)
    weight_bytes = sum(buffer.nbytes for buffer in (*model.parameters(), *model.buffers()))
    measure(benchmark, replay, nbytes=weight_bytes, model=MODEL, error=error)
