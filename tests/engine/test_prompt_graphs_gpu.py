"""Short prefills as CUDA graphs, in bf16: as exact as without padding, replayed without waiting, in bounded memory."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_families import make_model, prune_blocks_
from tiny_llama import random_prompts, save
from torch import Tensor

from sparsert.checkpoint import open_checkpoint
from sparsert.engine.graphs import StepGraphs
from sparsert.engine.runner import Runner
from sparsert.models import DecoderModel, load_model
from sparsert.schedule import LayerPlan

pytestmark = pytest.mark.gpu

#: With the most tokens that are captured: all; 64, by a window of 100; none, because of soft caps.
FAMILIES: dict[str, tuple[str, dict[str, Any], int]] = {
    "plain": ("Llama", {}, 512),
    "head norms": ("Qwen3", {"num_key_value_heads": 1}, 512),
    "window": ("Mistral", {"sliding_window": 100}, 64),
    "soft caps": ("Gemma2", {"attn_logit_softcapping": 3.0, "sliding_window": 100}, 0),
}
BLOCKS = 6

Models = tuple[DecoderModel, DecoderModel, int]


def make(family: str, changes: dict[str, Any], directory: Path) -> tuple[DecoderModel, DecoderModel]:
    """One model in bf16 on the GPU, and in fp32 on the CPU; some of its layers are large enough for wgmma.sp."""
    sizes = {
        "hidden_size": 768, "intermediate_size": 1536, "head_dim": 64, "num_hidden_layers": BLOCKS,
        "initializer_range": 0.05, "max_position_embeddings": 4096,
    }  # fmt: skip
    reference = make_model(family, **{**sizes, **changes}).bfloat16()
    prune_blocks_(reference)
    checkpoint = open_checkpoint(save(reference, directory))
    return load_model(checkpoint, device="cuda", dtype="bfloat16"), load_model(checkpoint, device="cpu")


@pytest.fixture(scope="module", params=FAMILIES)
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Models:
    family, changes, tokens = FAMILIES[request.param]
    return (*make(family, changes, tmp_path_factory.mktemp("model")), tokens)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> DecoderModel:
    return make("Llama", {}, tmp_path_factory.mktemp("llama"))[0]


def eager(model: DecoderModel, max_length: int = 1000) -> Runner:
    """A runner whose prefills are neither padded nor captured."""
    runner = Runner(model, max_length)
    runner._workspace.prompt_graph_tokens = 0
    return runner


def prompt_graphs(runner: Runner) -> list[tuple[int, int]]:
    """(texts, tokens) of the prefills that were captured."""
    graphs = runner._workspace.graphs
    assert graphs is not None
    return [key[2:] for key in graphs._graphs if key[1] == "prompt"]  # type: ignore[index,misc]


def run(runner: Runner, prompts: list[list[int]], following: Tensor) -> Tensor:
    """Logits of a prefill and of decode steps on given tokens, ``[1 + steps, batch, vocabulary]``."""
    longest = max(map(len, prompts))
    logits = [runner.prefill(prompts, longest + len(following))]
    for step, tokens in enumerate(following):
        logits.append(runner.decode(tokens.to(logits[0].device), longest + step).clone())
    assert runner.lengths.tolist() == [len(prompt) + len(following) for prompt in prompts]
    return torch.stack(logits)


def rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


@pytest.mark.parametrize(
    "lengths",
    [
        [1], [32], [33], [2, 3, 1], [20, 1, 43], [128], [129], [1] * 16, [30] * 15 + [31], [250, 1, 9], [5, 500], [512],
    ],
)  # fmt: skip
def test_as_exact_as_without_padding(models: Models, lengths: list[int]) -> None:
    model, exact_model, most_tokens = models
    prompts, following = random_prompts(lengths), torch.randint(3, 200, (3, len(lengths)))
    exact = run(Runner(exact_model, 1000), prompts, following)
    plain = run(eager(model), prompts, following).float().cpu()
    runner = Runner(model, 1000)
    graphs = run(runner, prompts, following).float().cpu()
    assert bool(prompt_graphs(runner)) is (sum(lengths) <= most_tokens)
    allowed = rms(plain - exact)
    assert 0 < allowed < 0.1 * rms(exact)
    for step in range(len(exact)):
        for row in range(len(lengths)):  # each row, so that one wrong row among sixteen is not averaged away
            error = rms(graphs[step, row] - exact[step, row])
            assert error <= max(2 * allowed, 2 * rms(plain[step, row] - exact[step, row])), (step, row)


def test_replays_serve_other_prompts_and_plans(llama: DecoderModel) -> None:
    """Prompts of one bucket in turn, over what longer ones left; a prompt that comes again gives the same bits."""
    draw = random.Random(2)
    runner = Runner(llama, 1000)
    plans = [llama.plan, LayerPlan.remove(BLOCKS, "1,3", force=True)]
    runner.prefill(random_prompts([500] * 16), 600)  # the cache is as large as it gets
    seen: dict[tuple[Any, ...], Tensor] = {}
    for turn in range(40):
        plan = plans[turn % 2]
        texts = draw.choice((1, 3, 4, 9, 16))
        lengths = [draw.randint(1, 500 // texts) for _ in range(texts)]
        if turn >= 30:
            plan, *given = draw.choice(list(seen))
            lengths = list(given)
        prompts = random_prompts(lengths, seed=sum(lengths))
        following = torch.tensor([[9] * len(lengths)] * 2)
        logits = run(runner.with_plan(plan), prompts, following)
        expected = run(eager(llama).with_plan(plan), prompts, following)
        assert max(rms(row) for row in (logits - expected).flatten(0, 1)) < 0.2 * rms(expected)
        key = (plan, *lengths)
        if key in seen:
            assert torch.equal(logits, seen[key])
        seen[key] = logits
    held, capture_s = runner.graph_count, runner.capture_s
    assert capture_s > 0 and len(prompt_graphs(runner)) > 10
    run(runner.with_plan(plan), prompts, following)
    assert (runner.graph_count, runner.capture_s) == (held, capture_s)


def test_a_replayed_prefill_does_not_wait(llama: DecoderModel) -> None:
    runner = Runner(llama, 1000)
    expected = [runner.prefill(random_prompts([30, 70]), 200), runner.prefill(random_prompts([9, 71], seed=2), 200)]
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        # one behind the other: the second one's inputs must not reach the first one's replay
        again = [runner.prefill(random_prompts([30, 70]), 200), runner.prefill(random_prompts([9, 71], seed=2), 200)]
    finally:
        torch.cuda.set_sync_debug_mode(before)
    assert prompt_graphs(runner) == [(2, 128)]
    assert torch.equal(torch.stack(again), torch.stack(expected))


def test_inputs_of_prefills_that_wait_for_their_turn(llama: DecoderModel) -> None:
    """The host is many prefills ahead of a busy GPU."""
    runner = Runner(llama, 1000)
    prompts = [random_prompts([40, 20, 3], seed=seed) for seed in range(20)]
    expected = [runner.prefill(texts, 100) for texts in prompts]
    torch.cuda.synchronize()
    torch.cuda._sleep(200_000_000)
    ahead = [runner.prefill(texts, 100) for texts in prompts]
    assert torch.equal(torch.stack(ahead), torch.stack(expected))


def test_longer_rotary_tables_elsewhere_are_noticed(llama: DecoderModel) -> None:
    """A plain forward of a longer text frees the tables that captured steps read."""
    runner, prompts = Runner(llama, 200), random_prompts([60])
    following = torch.full((2, 1), 9)
    expected = run(runner, prompts, following)
    length = max(rotary.length for rotary in llama.rotaries)
    with torch.inference_mode():
        llama(torch.ones(1, length + 1, dtype=torch.int64, device="cuda"))
    junk = [torch.full((length, 64), 1e4, dtype=torch.bfloat16, device="cuda") for _ in range(64)]
    assert torch.equal(run(runner, prompts, following), expected)
    assert len(junk) == 64


def test_random_lengths_take_no_memory(llama: DecoderModel) -> None:
    draw = random.Random(8)
    runner = Runner(llama, 1000)
    runner.prefill(random_prompts([300] * 16), 600)
    for texts in (1, 2, 4, 8, 16):
        for tokens in (32, 64, 128, 256, 384, 512):
            runner.prefill(random_prompts([tokens // texts] * texts), 600)
    assert len(prompt_graphs(runner)) == 30
    torch.cuda.synchronize()
    held, before, reserved = runner.graph_count, torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    for _ in range(300):
        texts = draw.randint(1, 16)
        runner.prefill(random_prompts([draw.randint(1, 512 // texts) for _ in range(texts)]), 600)
    torch.cuda.synchronize()
    assert runner.graph_count == held
    assert torch.cuda.memory_allocated() <= before + (1 << 20)
    assert torch.cuda.memory_reserved() <= reserved + (4 << 20)


def test_captures_are_counted(llama: DecoderModel, monkeypatch: pytest.MonkeyPatch) -> None:
    captured: list[int] = []
    capture = StepGraphs._capture
    monkeypatch.setattr(StepGraphs, "_capture", lambda self, step: (captured.append(1), capture(self, step))[1])
    runner = Runner(llama, 1000)
    for lengths in ([5], [30], [31, 1], [32], [40], [600], [600]):
        runner.prefill(random_prompts(lengths), 700)
    assert len(captured) == 4, "the second text needed a larger cache, which makes graphs anew"
    assert sorted(prompt_graphs(runner)) == [(1, 32), (1, 64), (2, 32)]
    assert runner.graph_count == 3 and runner.capture_s > 0
