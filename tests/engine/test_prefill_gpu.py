"""Prefill on a GPU in bf16: packed against padded, no waiting inside a forward, and no memory for each new length."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from padded_prefill import PaddedPrefillAttention
from tiny_families import make_model, prune_blocks_
from tiny_llama import random_prompts, save

from sparsert.checkpoint import open_checkpoint
from sparsert.engine.cache import KVCache, PackedPrefillAttention
from sparsert.engine.prompt_chunks import cut_prompts
from sparsert.engine.runner import Runner
from sparsert.models import DecoderModel, load_model

pytestmark = pytest.mark.gpu

#: Texts that see everything; a window shorter than the texts; soft caps. The last two are attended for one by one.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("Llama", {}),
    "head norms": ("Qwen3", {"num_key_value_heads": 1}),
    "window": ("Mistral", {"sliding_window": 100}),
    "soft caps": ("Gemma2", {"attn_logit_softcapping": 3.0, "sliding_window": 100}),
}
LENGTHS = [900, 3, 260, 1, 77]


@pytest.fixture(scope="module", params=FAMILIES)
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[DecoderModel, ...]:
    """One model in bf16 on the GPU, and in fp32 on the CPU."""
    family, changes = FAMILIES[request.param]
    sizes = {"hidden_size": 384, "intermediate_size": 512, "head_dim": 64, "initializer_range": 0.06}
    reference = make_model(family, max_position_embeddings=4096, **{**sizes, **changes}).bfloat16()
    prune_blocks_(reference)
    checkpoint = open_checkpoint(save(reference, tmp_path_factory.mktemp("model")))
    return load_model(checkpoint, device="cuda", dtype="bfloat16"), load_model(checkpoint, device="cpu")


def test_packed_is_as_exact_as_padded(models: tuple[DecoderModel, ...]) -> None:
    model, exact_model = models
    texts = random_prompts(LENGTHS)
    exact = Runner(exact_model, 1000).prefill(texts, room=950).double()
    padded = torch.zeros(len(texts), max(LENGTHS), dtype=torch.int64)
    for row, text in enumerate(texts):
        padded[row, : len(text)] = torch.tensor(text)
    model.reserve_positions_(1024)
    cache = KVCache(model.attention_shapes, len(texts), 1024, model.device, model.dtype)
    with torch.inference_mode():
        last = torch.tensor(LENGTHS, device="cuda") - 1
        plain = model(padded.cuda(), PaddedPrefillAttention(cache), rows=last)
    allowed = (plain.double().cpu() - exact).pow(2).mean().sqrt()
    assert 0 < allowed < 0.05 * exact.pow(2).mean().sqrt()
    for chunk_tokens in (8192, 500, 129):
        packed = Runner(model, 1000).prefill(texts, room=950, chunk_tokens=chunk_tokens)
        error = (packed.double().cpu() - exact).pow(2).mean().sqrt()
        assert 0 < error <= 1.5 * allowed, f"in chunks of {chunk_tokens}"


def test_nothing_waits_inside_a_forward(models: tuple[DecoderModel, ...]) -> None:
    model, _ = models
    model.reserve_positions_(1024)
    cache = KVCache(model.attention_shapes, len(LENGTHS), 1024, model.device, model.dtype)
    chunks = cut_prompts(random_prompts(LENGTHS), 500, model.device)
    before = torch.cuda.get_sync_debug_mode()
    with torch.inference_mode():
        for mode in ("default", "error"):  # the first time kernels are loaded
            torch.cuda.set_sync_debug_mode(mode)
            try:
                for chunk in chunks:
                    model(chunk.tokens, PackedPrefillAttention(cache, chunk), rows=chunk.ends)
            finally:
                torch.cuda.set_sync_debug_mode(before)


def resident_bytes() -> int:
    """Memory of the process, as Linux tells it."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads memory as Linux tells it")
@pytest.mark.parametrize("way", ["prefill", "plain forward"])
def test_new_lengths_take_no_memory(models: tuple[DecoderModel, ...], way: str) -> None:
    """cuDNN's attention keeps 1.1 MB for each new shape: 220 MB here."""
    model, _ = models
    runner, draw = Runner(model, 4096), random.Random(3)
    before = 0
    for number in range(230):
        lengths = [draw.randint(1, 2000) for _ in range(draw.randint(1, 4))]
        if way == "prefill":
            runner.prefill(random_prompts(lengths), room=2048)
        else:
            with torch.inference_mode():
                tokens = torch.randint(3, 200, (len(lengths), lengths[0]), device="cuda")
                model(tokens, rows=torch.zeros(len(lengths), dtype=torch.int64, device="cuda"))
        if number == 29:  # libraries and kernels are loaded by now
            torch.cuda.synchronize()
            before = resident_bytes()
    torch.cuda.synchronize()
    grown = resident_bytes() - before
    assert grown < 32 << 20, f"the process grew by {grown / 1e6:.0f} MB over 200 lengths"


def test_a_long_prompt_takes_the_memory_of_a_chunk(models: tuple[DecoderModel, ...]) -> None:
    """Activations of 3,500 tokens in chunks of 250 take little more than those of 250."""
    model, _ = models
    runner = Runner(model, 4096)
    peaks = []
    for length in (250, 3500):
        for _ in range(2):  # once for the cache and whatever is loaded
            runner.prefill(random_prompts([length]), room=4000, chunk_tokens=250)
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        runner.prefill(random_prompts([length]), room=4000, chunk_tokens=250)
        peaks.append(torch.cuda.max_memory_allocated() - before)
    shape = max(model.attention_shapes, key=lambda shape: shape.num_kv_heads)
    earlier_bytes = 2 * 2 * 3500 * shape.num_kv_heads * shape.head_dim  # keys and values of the text, for one layer
    # a window or a soft cap has scores or a mask of its queries, at most 250, by all keys
    scores_bytes = 0 if shape.softcap is None and shape.sliding_window is None else 24 * 250 * 3500 * shape.num_heads
    assert peaks[1] <= peaks[0] + 1.5 * earlier_bytes + scores_bytes + (1 << 20)
