"""Prefill and decode against a plain causal pass, and the shapes they run in."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from tiny_llama import magnitude_prune_, make_llama, random_prompts, save

from sparsert.checkpoint import open_checkpoint
from sparsert.engine.runner import MAX_BATCH_SIZE, Runner, window_for
from sparsert.errors import InputError
from sparsert.models import DecoderModel, load_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> DecoderModel:
    reference = make_llama(num_hidden_layers=2, max_position_embeddings=1000)
    magnitude_prune_(reference)
    directory: Path = save(reference, tmp_path_factory.mktemp("model"))
    return load_model(open_checkpoint(directory), device="cpu")


def test_windows() -> None:
    assert [window_for(n, 4096) for n in (1, 256, 257, 1024, 1025, 4000)] == [256, 256, 512, 1024, 2048, 4096]
    assert window_for(300, 400) == 400 and window_for(10, 100) == 100


def test_ragged_batch_equals_each_text_alone(model: DecoderModel) -> None:
    prompts = random_prompts([3, 40, 1, 17])
    runner = Runner(model, 1000)
    logits = runner.prefill(prompts, room=60)
    texts = [list(prompt) for prompt in prompts]
    for _ in range(8):
        for row, text in enumerate(texts):
            alone = model(torch.tensor([text]))[0, -1]
            torch.testing.assert_close(logits[row], alone, atol=1e-5, rtol=1e-5)
        tokens = logits.argmax(-1)
        longest = max(map(len, texts))
        for text, token in zip(texts, tokens.tolist(), strict=True):
            text.append(token)
        logits = runner.decode(tokens, longest)


def test_pads_cost_nothing(model: DecoderModel) -> None:
    """Two texts of 990 and 10 tokens are 1,000 rows of a layer, and two of the head."""
    seen: dict[str, list[int]] = {"layer": [], "head": []}
    hooks = [
        module.register_forward_pre_hook(lambda _, inputs, name=name: seen[name].append(inputs[0].shape[:-1].numel()))
        for name, module in (("layer", model.blocks[1].self_attn.qkv_proj), ("head", model.lm_head))
    ]
    try:
        Runner(model, 1000).prefill(random_prompts([990, 10]), room=1000)
        assert seen == {"layer": [1000], "head": [2]}
        seen["layer"].clear()
        seen["head"].clear()
        logits = Runner(model, 1000).prefill(random_prompts([1, 200, 40]), room=300, chunk_tokens=90)
        assert seen == {"layer": [90, 90, 61], "head": [1, 2]}, "no head where no text ends"
        assert logits.shape == (3, model.config.vocab_size)
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("chunk_tokens", [1, 13, 40, 57])
def test_prompts_in_chunks(model: DecoderModel, chunk_tokens: int) -> None:
    """And decoding goes on from them, also over what a longer batch left in the cache."""
    prompts = random_prompts([3, 40, 1, 17])
    whole, runner = Runner(model, 1000), Runner(model, 1000)
    runner.prefill(random_prompts([100] * 4, seed=7), room=120)
    expected = whole.prefill(prompts, room=60)
    logits = runner.prefill(prompts, room=60, chunk_tokens=chunk_tokens)
    for step in range(6):
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
        tokens = expected.argmax(-1)
        expected, logits = whole.decode(tokens, 40 + step), runner.decode(tokens, 40 + step)


def test_a_step_does_not_depend_on_the_window(model: DecoderModel) -> None:
    """The same token read through 256 and through 512 positions."""
    prompt = random_prompts([200])
    results = []
    for longest in (200, 300):
        runner = Runner(model, 1000)
        tokens = runner.prefill(prompt, room=400).argmax(-1)
        results.append(runner.decode(tokens, longest))
    torch.testing.assert_close(results[0], results[1], atol=1e-5, rtol=1e-5)


def test_generation_crosses_a_window(model: DecoderModel) -> None:
    prompt = random_prompts([252])[0]
    runner = Runner(model, 1000)
    logits = runner.prefill([prompt], room=270)
    for _ in range(10):
        torch.testing.assert_close(logits[0], model(torch.tensor([prompt]))[0, -1], atol=1e-5, rtol=1e-5)
        tokens = logits.argmax(-1)
        logits = runner.decode(tokens, len(prompt))
        prompt.append(int(tokens))


def test_cache_grows_and_is_kept(model: DecoderModel) -> None:
    runner = Runner(model, 1000)
    assert runner.cache_nbytes == 0
    per_token = 2 * 2 * 2 * 24 * 4
    runner.prefill(random_prompts([5, 5, 5]), room=20)
    assert runner.cache_nbytes == 4 * 256 * per_token, "rows and lengths in powers of two"
    runner.prefill(random_prompts([5]), room=300)
    assert runner.cache_nbytes == 4 * 512 * per_token, "it never shrinks in the other direction"
    runner.prefill(random_prompts([9]), room=30)
    assert runner.cache_nbytes == 4 * 512 * per_token
    runner.prefill(random_prompts([5]), room=1000)
    assert runner.cache_nbytes == 4 * 1008 * per_token, "max_length, rounded up to 16"
    assert all(rotary.length >= 1000 for rotary in model.rotaries)


def test_ended_rows_run_along_at_the_end_of_the_cache(model: DecoderModel) -> None:
    """A full row must not write past the cache or disturb its neighbour."""
    prompts = random_prompts([16, 2])
    runner = Runner(model, 16)
    logits = runner.prefill(prompts, room=16)
    text = list(prompts[1])
    for _ in range(10):
        tokens = logits.argmax(-1)
        logits = runner.decode(tokens, len(text))
        text.append(int(tokens[1]))
        torch.testing.assert_close(logits[1], model(torch.tensor([text]))[0, -1], atol=1e-4, rtol=1e-4)
    assert bool(logits.isfinite().all())


def test_a_greedy_step_is_a_step_and_its_maximum(model: DecoderModel) -> None:
    prompts = random_prompts([9, 2, 30])
    chosen = []
    for greedy in (False, True):
        runner = Runner(model, 1000)
        tokens = runner.prefill(prompts, room=60).argmax(-1)
        chosen.append([tokens.tolist()])
        for step in range(12):
            tokens = runner.decode_greedy(tokens, 30 + step) if greedy else runner.decode(tokens, 30 + step).argmax(-1)
            chosen[-1].append(tokens.tolist())
        assert runner.lengths.tolist() == [21, 14, 42]
    assert chosen[0] == chosen[1]


def test_several_tokens_at_once_equal_as_many_steps(model: DecoderModel) -> None:
    """And those that do not count leave nothing behind."""
    prompts, new = random_prompts([9, 1, 30]), torch.randint(3, 200, (3, 6))
    runner = Runner(model, 1000)
    runner.prefill(prompts, room=60)
    one_by_one = torch.stack([runner.decode(new[:, step], 30 + step) for step in range(6)], dim=1)
    runner.prefill(prompts, room=60)
    torch.testing.assert_close(runner.extend(new, 30), one_by_one, atol=1e-4, rtol=1e-4)
    assert runner.lengths.tolist() == [9, 1, 30], "lengths stay"
    runner.place_(torch.tensor([9 + 2, 1, 30 + 6]))
    following = runner.decode(new[:, 0], 36)
    for row, count in enumerate((2, 0, 6)):
        text = [*prompts[row], *new[row, :count].tolist(), int(new[row, 0])]
        torch.testing.assert_close(following[row], model(torch.tensor([text]))[0, -1], atol=1e-4, rtol=1e-4)


def test_a_row_behind_the_window_leaves_no_nan(model: DecoderModel) -> None:
    """With sliding attention a row that has ended, far behind the window of the others, would see nothing at all."""
    shapes = [block.self_attn.shape for block in model.blocks]
    try:
        for block, shape in zip(model.blocks, shapes, strict=True):
            block.self_attn.shape = dataclasses.replace(shape, sliding_window=20)
        runner = Runner(model, 1000)
        logits = runner.prefill(random_prompts([600, 5]), room=700)
        for step in range(3):
            logits = runner.decode(logits.argmax(-1), 5 + step)  # the first row has ended: the window is 256
        assert bool(logits.isfinite().all())
        assert all(bool(keys.isfinite().all()) for keys in runner._workspace.cache.keys)
    finally:
        for block, shape in zip(model.blocks, shapes, strict=True):
            block.self_attn.shape = shape


def test_refusals(model: DecoderModel) -> None:
    runner = Runner(model, 50)
    with pytest.raises(InputError, match="51 tokens do not fit into max_length 50"):
        runner.prefill(random_prompts([5]), room=51)
    with pytest.raises(InputError, match="got 17 prompts"):
        runner.prefill(random_prompts([1] * (MAX_BATCH_SIZE + 1)), room=5)
    with pytest.raises(InputError, match="none empty"):
        runner.prefill([[1], []], room=5)


@pytest.mark.gpu
def test_graphs_equal_the_cpu(model: DecoderModel, tmp_path: Path) -> None:
    """Decode under CUDA graphs, over two windows and two batch sizes, against fp32 on the CPU."""
    reference = make_llama(num_hidden_layers=2, max_position_embeddings=1000)
    magnitude_prune_(reference)
    checkpoint = open_checkpoint(save(reference.bfloat16(), tmp_path))
    exact = load_model(checkpoint, device="cpu", dtype="float32")
    runner = Runner(load_model(checkpoint, device="cuda", dtype="bfloat16"), 1000)
    for lengths in ([250, 3, 40], [250], [250, 3, 40]):
        texts = random_prompts(lengths)
        logits = runner.prefill(texts, room=300)
        for _ in range(12):
            for row, text in enumerate(texts):
                expected = exact(torch.tensor([text]))[0, -1]
                assert (logits[row].float().cpu() - expected).abs().max() < 0.03 * expected.abs().max()
            tokens = logits.argmax(-1)
            longest = max(map(len, texts))
            for text, token in zip(texts, tokens.tolist(), strict=True):
                text.append(token)
            logits = runner.decode(tokens, longest)
    assert runner.capture_s > 0
