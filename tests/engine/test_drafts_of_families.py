"""Drafts, views and shortened checkpoints for every architecture: windows, soft caps, sandwiched norms, biases."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_families import VARIANTS, make_variant
from tiny_llama import random_prompts, save

from sparsert.checkpoint import open_checkpoint, prune_checkpoint
from sparsert.engine import LLM, SamplingParams
from sparsert.schedule import LayerPlan

HALVES = LayerPlan(3, (0, 1, 2), without_attention=(1,), without_mlp=(2,))

PARAMS = SamplingParams(max_new_tokens=24, ignore_eos=True)


@pytest.mark.filterwarnings("ignore:no linear layer is 2.4")
@pytest.mark.parametrize("variant", VARIANTS)
def test_drafts_views_and_shortened_checkpoints(variant: str, tmp_path: Path) -> None:
    directory = save(make_variant(variant), tmp_path / "model")
    llm, prompts = LLM(directory, device="cpu"), random_prompts([19, 3, 11])
    plain = [completion.token_ids for completion in llm.generate(prompts, PARAMS)]
    for plan in (LayerPlan(3, (0, 2)), HALVES, llm.plan):
        drafted = llm.generate(prompts, PARAMS, draft_plan=plan, draft_tokens=4)
        assert [completion.token_ids for completion in drafted] == plain
    view = [completion.token_ids for completion in llm.with_plan(HALVES).generate(prompts, PARAMS)]
    source = open_checkpoint(directory)
    prune_checkpoint(source, tmp_path / "short", method="none", mask_maker=None, base_model="x", plan=HALVES)
    short = LLM(tmp_path / "short", device="cpu")
    assert [completion.token_ids for completion in short.generate(prompts, PARAMS)] == view
    assert short.summary()["plan"] == str(HALVES)
