"""Plans over one loaded model: the same texts as a model loaded that way, and one cache for all of them."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from tiny_chat_model import save_chat_model
from tiny_llama import random_prompts

from sparsert.checkpoint import open_checkpoint, prune_checkpoint
from sparsert.engine import LLM, Completion, SamplingParams
from sparsert.errors import InputError
from sparsert.schedule import LayerPlan

PLANS = [
    LayerPlan.full(8),
    LayerPlan.remove(8, "4-5"),
    LayerPlan.remove(8, "2", skip_attention="0,4", skip_mlp="3,7", force=True),
    LayerPlan(8, (6,), without_mlp=(6,)),
    LayerPlan(8, (1, 6), without_attention=(1, 6)),
]

PARAMS = SamplingParams(max_new_tokens=20, ignore_eos=True)
PROMPTS = random_prompts([5, 1, 33])

pytestmark = pytest.mark.filterwarnings("ignore:no linear layer is 2.4")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chat_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def llm(directory: Path) -> LLM:
    return LLM(directory, device="cpu")


def tokens(completions: list[Completion]) -> list[tuple[int, ...]]:
    return [completion.token_ids for completion in completions]


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_a_view_gives_what_a_model_loaded_that_way_gives(directory: Path, llm: LLM, plan: LayerPlan) -> None:
    loaded = LLM(directory, device="cpu", plan=plan)
    view = llm.with_plan(plan)
    assert tokens(view.generate(PROMPTS, PARAMS)) == tokens(loaded.generate(PROMPTS, PARAMS))
    attentions = sum(plan.runs_attention(block) for block in range(8))
    assert loaded.runner.cache_nbytes == 4 * 256 * attentions * 2 * 2 * 24 * 4, "skipped attention has no cache"
    assert loaded.runner.kv_bytes_per_token == view.runner.kv_bytes_per_token == attentions * 2 * 2 * 24 * 4
    assert sum(p.nbytes for p in loaded.model.blocks.parameters()) == resident_bytes(llm, plan)
    assert view.runner.cache_nbytes == llm.runner.cache_nbytes, "a view has no cache of its own"
    assert view.model is llm.model and view.tokenizer is llm.tokenizer


def resident_bytes(llm: LLM, plan: LayerPlan) -> int:
    """Bytes of what a plan runs, counted in a model that has everything."""
    total = 0
    for index, block in enumerate(llm.model.blocks):
        for name, parameter in block.named_parameters():
            attention = name.startswith(("self_attn", "input_layernorm", "attention_norm"))
            total += parameter.nbytes * (plan.runs_attention(index) if attention else plan.runs_mlp(index))
    return total


def test_switching_back_and_forth(llm: LLM) -> None:
    """Whatever another plan left in the shared cache changes nothing."""
    views = [llm.with_plan(plan) for plan in PLANS]
    expected = [tokens(view.generate(PROMPTS, PARAMS)) for view in views]
    assert len({str(entry) for entry in expected}) == len(PLANS), "the comparison must not be trivial"
    draw = random.Random(0)
    for _ in range(12):
        chosen = draw.randrange(len(PLANS))
        assert tokens(views[chosen].generate(PROMPTS, PARAMS)) == expected[chosen]
    assert tokens(views[3].with_plan(PLANS[0]).generate(PROMPTS, PARAMS)) == expected[0], "a view can go back to more"


def test_what_is_not_loaded_is_refused(directory: Path) -> None:
    shorter = LLM(directory, device="cpu", remove_blocks="4", skip_mlp="5")
    assert str(shorter.plan) == "7 of 8 blocks: 0-3,5-7 (removed: 4), without mlp in 5"
    with pytest.raises(InputError, match="attention of block 4 and mlp of block 4-5, but the loaded model runs 7 of 8"):
        shorter.with_plan(LayerPlan.full(8))
    with pytest.raises(InputError, match="attention of block 4"):
        shorter.model(torch.tensor([[3]]), plan=LayerPlan.remove(8, "5"))
    with pytest.raises(InputError, match="plan already says which blocks run"):
        LLM(directory, device="cpu", plan=PLANS[1], skip_mlp="5")


def test_summary_names_the_plan(directory: Path, llm: LLM) -> None:
    summary = llm.with_plan(PLANS[2]).summary()
    assert summary["blocks_removed"] == [2] and summary["blocks_kept"] == [0, 1, 3, 4, 5, 6, 7]
    assert summary["without_attention"] == [0, 4] and summary["without_mlp"] == [3, 7]
    assert summary["plan"] == str(PLANS[2]) and summary["blocks"] == 8
    assert llm.summary()["plan"] == "all 8 blocks", "the view changed nothing"


@pytest.mark.parametrize("plan", PLANS[1:], ids=str)
def test_a_checkpoint_saved_without_what_is_skipped(directory: Path, llm: LLM, plan: LayerPlan, tmp_path: Path) -> None:
    source = open_checkpoint(directory)
    prune_checkpoint(source, tmp_path / "short", method="none", mask_maker=None, base_model="tiny", plan=plan)
    loaded = LLM(tmp_path / "short", device="cpu")
    assert loaded.checkpoint.total_nbytes == source.total_nbytes - resident_bytes(llm, PLANS[0]) + resident_bytes(
        llm, plan
    )
    assert tokens(loaded.generate(PROMPTS, PARAMS)) == tokens(llm.with_plan(plan).generate(PROMPTS, PARAMS))
    assert loaded.summary()["plan"] == str(plan), "in the numbering of the model it was made from"
    assert loaded.plan.num_blocks == len(plan.kept)


def test_one_text_at_a_time(llm: LLM) -> None:
    view = llm.with_plan(PLANS[1])

    def again(index: int, text: str, ids: list[int]) -> None:
        view.generate(PROMPTS, PARAMS)

    with pytest.raises(InputError, match="in the middle of another call of generate, and its plans share one cache"):
        llm.generate(PROMPTS, PARAMS, stream=again)
    assert tokens(llm.generate(PROMPTS, PARAMS)), "the failed call gave the cache back"


@pytest.mark.gpu
def test_switching_on_a_gpu_captures_nothing_twice(directory: Path) -> None:
    """In fp32, where views and models loaded that way take the same tokens."""
    options = {"device": "cuda", "dtype": "float32"}
    llm = LLM(directory, **options)  # type: ignore[arg-type]
    views = [llm.with_plan(plan) for plan in PLANS]
    expected = [tokens(LLM(directory, plan=plan, **options).generate(PROMPTS, PARAMS)) for plan in PLANS]  # type: ignore[arg-type]
    assert [tokens(view.generate(PROMPTS, PARAMS)) for view in views] == expected
    held, capture_s = llm.runner.graph_count, llm.runner.capture_s
    assert held == len(PLANS) and capture_s > 0
    for chosen in (3, 0, 4, 1, 2, 0):
        completions = views[chosen].generate(PROMPTS, PARAMS)
        assert tokens(completions) == expected[chosen] and completions[0].timings.capture_ms == 0
    assert (llm.runner.graph_count, llm.runner.capture_s) == (held, capture_s)
