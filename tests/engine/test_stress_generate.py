"""Many generations in one process: random prompts, lengths, batches, plans, drafts and ways to choose tokens.

Every token is held against one plain causal pass over its text, without a cache, and memory must not grow.

    SPARSERT_STRESS_GENERATIONS=10000 pytest tests/engine/test_stress_generate.py

runs on the GPU if there is one, else in fp32 on the CPU; 200 and 60 generations unless said otherwise.
"""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
import torch
from tiny_llama import VOCABULARY, magnitude_prune_, make_llama, save

from sparsert.engine import LLM, Completion, SamplingParams
from sparsert.schedule import LayerPlan

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GENERATIONS = int(os.environ.get("SPARSERT_STRESS_GENERATIONS", "200" if DEVICE == "cuda" else "60"))

#: How far below the last score that may be chosen a token's own may lie, as a share of the largest score.
TOLERANCE = 0.03 if DEVICE == "cuda" else 1e-4

#: Bytes that the process may grow by between a quarter of the way and the end: allocators keep some slack.
ALLOWED_GROWTH = 48 << 20

BLOCKS = 5


def random_plan(draw: random.Random) -> LayerPlan:
    halves = [draw.choice(("whole", "whole", "attention", "mlp", "none")) for _ in range(BLOCKS)]
    kept = [block for block in range(BLOCKS) if halves[block] != "none"] or [draw.randrange(BLOCKS)]
    return LayerPlan(
        BLOCKS,
        tuple(kept),
        without_attention=tuple(block for block in kept if halves[block] == "mlp"),
        without_mlp=tuple(block for block in kept if halves[block] == "attention"),
    )


def random_params(draw: random.Random) -> SamplingParams:
    length = draw.randint(1, 24)
    if draw.random() < 0.5:
        return SamplingParams(max_new_tokens=length)
    return SamplingParams(max_new_tokens=length, temperature=draw.uniform(0.3, 2), top_k=draw.randint(1, 5))


def check_tokens(llm: LLM, completions: list[Completion], params: SamplingParams) -> None:
    """Every token is among the ``top_k`` likeliest of a plain causal pass over what precedes it (greedy: the first)."""
    texts = [[*completion.prompt_token_ids, *completion.token_ids] for completion in completions]
    padded = torch.zeros(len(texts), max(map(len, texts)), dtype=torch.int64)
    for row, text in enumerate(texts):
        padded[row, : len(text)] = torch.tensor(text)
    with torch.inference_mode():
        logits = llm.model(padded.to(llm.model.device), plan=llm.plan).float().cpu()
    count = 1 if params.greedy else params.top_k
    for row, completion in enumerate(completions):
        prompt = len(completion.prompt_token_ids)
        scores = logits[row, prompt - 1 : prompt - 1 + len(completion.token_ids)]
        chosen = scores.gather(1, torch.tensor(completion.token_ids).unsqueeze(1)).squeeze(1)
        least = scores.topk(count).values[:, -1] - TOLERANCE * scores.abs().amax(1)
        assert bool((chosen >= least).all()), f"{llm.plan}, {params}, row {row} of {len(texts)}: {completion}"


def used_bytes() -> tuple[int, int]:
    """Memory of the process, and of the GPU's allocator."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    device = torch.cuda.memory_allocated() if DEVICE == "cuda" else 0
    return pages * os.sysconf("SC_PAGE_SIZE"), device


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads memory as Linux tells it")
def test_many_generations(tmp_path: Path) -> None:
    model = make_llama(
        hidden_size=128, intermediate_size=192, num_hidden_layers=BLOCKS, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, initializer_range=0.08,
    )  # fmt: skip
    magnitude_prune_(model)
    llm = LLM(save(model, tmp_path), device=DEVICE, dtype="float32" if DEVICE == "cpu" else "bfloat16")
    draw = random.Random(0)
    plans = [LayerPlan.full(BLOCKS), *(random_plan(draw) for _ in range(7))]
    seen: set[str] = set()
    for number in range(GENERATIONS):
        if number == GENERATIONS // 4:
            before = used_bytes()
        target, draft = draw.choice(plans), draw.choice([None, *plans])
        lengths = [draw.randint(1, 300 if draw.random() < 0.05 else 40) for _ in range(draw.randint(1, 16))]
        prompts = [[draw.randrange(3, VOCABULARY) for _ in range(length)] for length in lengths]
        params, view = random_params(draw), llm.with_plan(target)
        if draft is not None and draft.intersect(target) == draft:
            completions = view.generate(prompts, params, draft_plan=draft, draft_tokens=draw.choice((1, 3)))
            seen.add("drafted")
        else:
            completions = view.generate(prompts, params)
        check_tokens(view, completions, params)
        seen.update(completion.finish_reason for completion in completions)
    assert seen == {"drafted", "stop", "length"}
    after = used_bytes()
    assert after[0] - before[0] < ALLOWED_GROWTH, f"the process grew by {(after[0] - before[0]) / 1e6:.1f} MB"
    # a cache that grew to its largest size late, and the logits of as many graphs as may be held
    assert after[1] - before[1] < ALLOWED_GROWTH, f"GPU memory grew by {(after[1] - before[1]) / 1e6:.1f} MB"
    assert llm.runner.graph_count <= 256
