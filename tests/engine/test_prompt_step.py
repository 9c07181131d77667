"""Short prefills in padded buckets, run as they would be captured, against the same prompts without padding."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Hashable
from pathlib import Path

import pytest
import torch
from tiny_families import make_model, prune_blocks_
from tiny_llama import magnitude_prune_, make_llama, random_prompts, save
from torch import Tensor

from sparsert import ops
from sparsert.checkpoint import open_checkpoint
from sparsert.engine.generate import generate_batch
from sparsert.engine.growing_text import GrowingText
from sparsert.engine.params import SamplingParams
from sparsert.engine.prompt_step import (
    PROMPT_GRAPH_TOKENS,
    PromptBucket,
    PromptInputs,
    find_bucket,
    prompt_graph_tokens,
)
from sparsert.engine.runner import Runner
from sparsert.models import DecoderModel, load_model
from sparsert.ops import AttentionShape
from sparsert.schedule import LayerPlan

CPU, GPU = torch.device("cpu"), torch.device("cuda")


class FrozenSteps:
    """Stands for captured graphs: a key's first step runs whenever the key comes; what the last one gave is lost."""

    def __init__(self) -> None:
        self.last: Tensor | None = None
        self.steps: dict[Hashable, Callable[[], Tensor]] = {}
        self.cleared = 0
        self.capture_s = 0.0

    def __len__(self) -> int:
        return len(self.steps)

    def clear(self) -> None:
        self.steps.clear()
        self.cleared += 1

    def run(self, key: Hashable, step: Callable[[], Tensor]) -> Tensor:
        if self.last is not None and self.last.is_floating_point():
            self.last.fill_(math.nan)
        if key not in self.steps:
            self.capture_s += 1000
        self.last = self.steps.setdefault(key, step)()
        return self.last


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> DecoderModel:
    reference = make_llama(num_hidden_layers=8, max_position_embeddings=1000)
    magnitude_prune_(reference)
    directory: Path = save(reference, tmp_path_factory.mktemp("model"))
    return load_model(open_checkpoint(directory), device="cpu")


def bucketed(model: DecoderModel, max_length: int = 1000) -> tuple[Runner, FrozenSteps]:
    """A runner on a CPU that pads and "captures" as one on a GPU does."""
    runner, steps = Runner(model, max_length), FrozenSteps()
    runner._workspace.prompt_graph_tokens = PROMPT_GRAPH_TOKENS
    runner._workspace.graphs = steps  # type: ignore[assignment]
    return runner, steps


def prompt_keys(steps: FrozenSteps) -> list[tuple[int, int]]:
    """(texts, tokens) of the prefills that were captured."""
    return [key[2:] for key in steps.steps if key[1] == "prompt"]  # type: ignore[index,misc]


def compare_steps(runner: Runner, plain: Runner, lengths: list[int], *, steps: int, seed: int = 1) -> None:
    """The same prompts through both, then the same tokens."""
    prompts = random_prompts(lengths, seed)
    room = max(lengths) + steps
    logits, expected = runner.prefill(prompts, room), plain.prefill(prompts, room)
    assert runner.lengths.tolist() == lengths
    for step in range(steps):
        assert logits.shape == expected.shape == (len(lengths), runner.model.config.vocab_size)
        torch.testing.assert_close(logits, expected, atol=2e-5, rtol=2e-5)
        tokens = expected.argmax(-1)
        longest = max(lengths) + step
        logits, expected = runner.decode(tokens, longest), plain.decode(tokens, longest)
    torch.testing.assert_close(logits, expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize(
    ("lengths", "bucket"),
    [
        ([1], (1, 32)),
        ([31], (1, 32)),
        ([32], (1, 32)),
        ([33], (1, 64)),
        ([3, 1], (2, 32)),
        ([40, 1, 22], (4, 64)),
        ([1, 64, 63], (4, 128)),
        ([129], (1, 256)),
        ([1] * 16, (16, 32)),
        ([7, 90, 1, 30, 2], (8, 256)),
        ([250, 1, 9], (4, 384)),
        ([5] * 9 + [340], (16, 512)),
        ([512], (1, 512)),
    ],
)
def test_padding_changes_nothing(model: DecoderModel, lengths: list[int], bucket: tuple[int, int]) -> None:
    runner, steps = bucketed(model)
    compare_steps(runner, Runner(model, 1000), lengths, steps=3)
    assert prompt_keys(steps) == [bucket]


def test_random_prompts_in_one_cache(model: DecoderModel) -> None:
    """Plans, batches and lengths in turn: whatever longer prompts, their padding and other plans left is not seen."""
    draw = random.Random(5)
    runner, steps = bucketed(model)
    plain = Runner(model, 1000)
    plans = [model.plan, LayerPlan.remove(8, "4-5"), LayerPlan(8, (1, 6), without_attention=(1,), without_mlp=(6,))]
    for turn in range(24):
        plan = draw.choice(plans)
        texts = draw.randint(1, 16)
        lengths = [draw.randint(1, draw.choice((3, 30, 600 // texts))) for _ in range(texts)]
        compare_steps(runner.with_plan(plan), plain.with_plan(plan), lengths, steps=2, seed=turn)
    assert len(prompt_keys(steps)) > 6, "the comparison must not be trivial"


def test_the_second_prompt_of_a_bucket_is_a_replay(model: DecoderModel) -> None:
    runner, steps = bucketed(model)
    plain = Runner(model, 1000)
    compare_steps(runner, plain, [9, 4, 30], steps=2)
    captured, steps.capture_s = dict(steps.steps), 0.0
    for lengths in ([50, 2, 11], [1, 1, 31], [20, 40, 3]):
        compare_steps(runner, plain, lengths, steps=2, seed=sum(lengths))
    assert prompt_keys(steps) == [(4, 64)] and steps.steps == captured and steps.capture_s == 0
    compare_steps(runner, plain, [9, 4, 30, 21], steps=1)
    assert steps.steps.keys() - captured.keys() == {(model.plan, "decode", 4, 256, 1)}, "four texts, the same bucket"


def test_the_head_sees_ends_only_and_logits_stay(model: DecoderModel) -> None:
    seen: list[tuple[int, ...]] = []
    hook = model.lm_head.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape)))
    try:
        runner, _ = bucketed(model)
        first = runner.prefill(random_prompts([5, 9, 2]), room=20)
        kept = first.clone()
        runner.prefill(random_prompts([6, 8, 1], seed=3), room=20)
        assert seen == [(1, 4, 96)] * 2 and torch.equal(first, kept)
    finally:
        hook.remove()


@pytest.mark.parametrize(("lengths", "max_length"), [([3, 5], 16), ([250, 2, 3], 260), ([200, 1, 60], 1000)])
def test_padding_stays_inside_the_cache_and_is_finite(model: DecoderModel, lengths: list[int], max_length: int) -> None:
    """Over a cache of NaN: what a prompt and its padding leave is finite, and nothing else is touched."""
    runner, steps = bucketed(model, max_length)
    prompts, room = random_prompts(lengths), max(lengths) + 4
    first = runner.prefill(prompts, room)
    cache = runner._workspace.cache
    assert cache is not None
    for buffer in (*cache.keys, *cache.values):
        buffer.fill_(math.nan)
    assert torch.equal(runner.prefill(prompts, room), first)
    assert runner._workspace.cache is cache and len(prompt_keys(steps)) == 1
    ((_, tokens),) = prompt_keys(steps)
    filled = torch.zeros(cache.batch_size, cache.length, dtype=torch.bool)
    for row, length in enumerate(lengths):
        filled[row, :length] = True
    filled[len(lengths) - 1, : lengths[-1] + tokens - sum(lengths)] = True
    for buffer in (*cache.keys, *cache.values):
        assert torch.equal(buffer.isfinite(), filled[:, None, :, None].expand_as(buffer))
        buffer.nan_to_num_(1e4)  # what decoding may meet in a cache is finite
    plain = Runner(model, max_length)
    plain.prefill(prompts, room)
    for step in range(3):
        chosen = torch.randint(3, 200, (len(lengths),))
        logits, expected = (each.decode(chosen, max(lengths) + step) for each in (runner, plain))
        torch.testing.assert_close(logits, expected, atol=2e-5, rtol=2e-5)


def test_longer_prompts_and_smaller_chunks_are_not_padded(model: DecoderModel) -> None:
    runner, steps = bucketed(model)
    plain = Runner(model, 1000)
    for lengths, chunk_tokens in (([513], 8192), ([500, 13], 8192), ([40, 3], 63), ([100], 64)):
        prompts = random_prompts(lengths)
        logits = runner.prefill(prompts, room=600, chunk_tokens=chunk_tokens)
        assert torch.equal(logits, plain.prefill(prompts, room=600, chunk_tokens=chunk_tokens))
    assert not steps.steps
    runner.prefill(random_prompts([40, 3]), room=600, chunk_tokens=64)
    assert prompt_keys(steps) == [(2, 64)]


def test_steps_are_forgotten_when_their_tables_move(model: DecoderModel) -> None:
    """A plain forward of a longer text makes longer rotary tables; what was captured reads the old ones."""
    runner, steps = bucketed(model)
    runner.prefill(random_prompts([20]), room=40)
    runner.decode(torch.tensor([7]), 20)
    assert len(steps) == 2
    length = max(rotary.length for rotary in model.rotaries)
    cleared = steps.cleared
    model(torch.tensor(random_prompts([length])))
    runner.decode(torch.tensor([7]), 21)
    assert (len(steps), steps.cleared) == (2, cleared), "tables that are long enough stay"
    model(torch.tensor(random_prompts([length + 1])))
    runner.decode(torch.tensor([7]), 22)
    assert (len(steps), steps.cleared) == (1, cleared + 1)


@pytest.mark.parametrize("family", ["Qwen3", "Gemma3", "Phi3"])
def test_families(family: str, tmp_path: Path) -> None:
    reference = make_model(family, max_position_embeddings=600)
    prune_blocks_(reference)
    model = load_model(open_checkpoint(save(reference, tmp_path)), device="cpu")
    runner, _ = bucketed(model, 600)
    plain = Runner(model, 600)
    for lengths in ([3, 60, 1], [17], [2, 2, 2, 2, 40]):
        compare_steps(runner, plain, lengths, steps=3)


def test_times_of_captures_stand_apart(model: DecoderModel) -> None:
    """Captures of the prompt count neither as prefill nor as decode."""
    runner, steps = bucketed(model)
    text = GrowingText(0, random_prompts([9])[0], 3, frozenset(), (), None)
    timings = generate_batch(runner, [text], SamplingParams(max_new_tokens=3))
    # the captures did not really take their 1,000 s, which were subtracted
    assert timings.capture_ms == 2e6 and timings.prefill_ms < 0 == timings.decode_ms
    assert runner.capture_s == 2000 and runner.graph_count == len(steps) == 2


def test_what_a_bucket_holds() -> None:
    inputs = PromptInputs(16, CPU)
    prompts = [[5, 6, 7], [8], [9, 10]]
    bucket = find_bucket([3, 1, 2], 512)
    assert bucket == (4, 32)
    inputs.fill_(random_prompts([32] * 16), PromptBucket(16, 512))
    inputs.fill_(prompts, bucket)
    chunk, lengths = inputs.read(bucket)
    assert chunk.tokens.tolist() == [[5, 6, 7, 8, 9, 10, *[10] * 26]]
    assert chunk.rows.tolist() == [0, 0, 0, 1, *[2] * 28]
    assert chunk.positions.tolist() == [0, 1, 2, 0, *range(28)]
    assert chunk.ends.tolist() == [[2, 3, 5, 5]]
    assert lengths.tolist() == [3, 1, 2, 0]
    assert chunk.texts.query_starts.tolist() == chunk.texts.key_starts.tolist() == [0, 3, 4, 32, 32]
    assert chunk.texts.query_starts.dtype == torch.int32
    assert (chunk.texts.longest_query, chunk.texts.longest_key) == (32, 32)
    assert chunk.texts.query_lengths is chunk.texts.key_lengths is None, "nothing of the prompts is on the host"
    assert all(tensor.is_contiguous() for tensor in (chunk.tokens, chunk.rows, chunk.positions))
    before = [tensor.data_ptr() for tensor in (chunk.tokens, chunk.rows, chunk.positions, chunk.ends, lengths)]
    inputs.fill_(random_prompts([30, 1]), bucket)
    chunk, lengths = inputs.read(bucket)
    assert before == [tensor.data_ptr() for tensor in (chunk.tokens, chunk.rows, chunk.positions, chunk.ends, lengths)]


def test_buckets() -> None:
    assert [find_bucket([n], 512) for n in (1, 32, 33, 257, 384, 512)] == [
        (1, 32), (1, 32), (1, 64), (1, 384), (1, 384), (1, 512)
    ]  # fmt: skip
    assert find_bucket([513], 512) is None and find_bucket([400, 200], 512) is None
    assert find_bucket([60], 63) is None and find_bucket([60], 64) == (1, 64) and find_bucket([1], 0) is None
    assert [find_bucket([1] * n, 512)[0] for n in (1, 2, 3, 5, 8, 9, 16)] == [1, 2, 4, 8, 8, 16, 16]  # type: ignore[index]


def test_which_models_have_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    def shape(**changes: float) -> AttentionShape:
        return AttentionShape(4, 2, 64, 64, 0.125, **changes)  # type: ignore[arg-type]

    monkeypatch.setattr(ops, "explain_packed_attention", lambda shape, *_: "a cap" if shape.softcap else None)
    assert prompt_graph_tokens([shape()], CPU, torch.bfloat16) == 0
    assert prompt_graph_tokens([shape()], GPU, torch.bfloat16) == 512
    assert prompt_graph_tokens([], GPU, torch.bfloat16) == 512
    assert prompt_graph_tokens([shape(), shape(softcap=30.0)], GPU, torch.bfloat16) == 0
    for window, tokens in ((4096, 512), (512, 512), (511, 384), (100, 64), (32, 32), (31, 0)):
        assert prompt_graph_tokens([shape(), shape(sliding_window=window)], GPU, torch.bfloat16) == tokens
