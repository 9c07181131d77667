"""The generation loop: looking ahead changes nothing, and the runner is asked for no more than is needed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_llama import magnitude_prune_, make_llama, random_prompts, save
from torch import Tensor

from sparsert.checkpoint import open_checkpoint
from sparsert.engine.generate import GrowingText, generate_batch
from sparsert.engine.params import SamplingParams
from sparsert.engine.runner import Runner
from sparsert.errors import CheckpointError
from sparsert.models import load_model


class CountingRunner(Runner):
    """Records (rows that matter, longest) of every step."""

    steps: list[int]

    def decode(self, tokens: Tensor, longest: int) -> Tensor:
        self.steps.append(longest)
        return super().decode(tokens, longest)

    def decode_greedy(self, tokens: Tensor, longest: int) -> Tensor:
        self.steps.append(longest)
        return super().decode_greedy(tokens, longest)


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> CountingRunner:
    model = make_llama(num_hidden_layers=2)
    magnitude_prune_(model)
    directory: Path = save(model, tmp_path_factory.mktemp("model"))
    return CountingRunner(load_model(open_checkpoint(directory), device="cpu"), 100)


def _run(
    runner: CountingRunner, limits: list[int], params: SamplingParams, stop_tokens: list[int], look_ahead: bool
) -> list[GrowingText]:
    runner.steps = []
    prompts = random_prompts([6, 11, 3][: len(limits)])
    texts = [
        GrowingText(index, prompt, limit, frozenset(stop_tokens), (), None)
        for index, (prompt, limit) in enumerate(zip(prompts, limits, strict=True))
    ]
    timings = generate_batch(runner, texts, params, load_s=1.5, look_ahead=look_ahead)
    assert timings.load_s == 1.5 and timings.new_tokens == sum(len(text.token_ids) for text in texts)
    return texts


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("stopping", [False, True])
def test_looking_ahead_gives_the_same_tokens(runner: CountingRunner, temperature: float, stopping: bool) -> None:
    params = SamplingParams(temperature=temperature, seed=3, repetition_penalty=1.2)
    free = _run(runner, [30, 4, 20], params, [], look_ahead=False)
    stop = [text.token_ids[-2] for text in free] if stopping else []
    plain = _run(runner, [30, 4, 20], params, stop, look_ahead=False)
    ahead = _run(runner, [30, 4, 20], params, stop, look_ahead=True)
    assert [text.token_ids for text in ahead] == [text.token_ids for text in plain]
    assert [text.finish_reason for text in ahead] == [text.finish_reason for text in plain]
    assert ("stop" in {text.finish_reason for text in plain}) is stopping


@pytest.mark.parametrize("look_ahead", [False, True])
def test_steps_and_their_longest_row(runner: CountingRunner, look_ahead: bool) -> None:
    # prompts of 6, 11 and 3 tokens: once the second has its 2 tokens, the first is the longest that matters
    _run(runner, [5, 2, 4], SamplingParams(), [], look_ahead)
    assert runner.steps == [11, 7, 8, 9]
    _run(runner, [1, 1, 1], SamplingParams(), [], look_ahead)
    assert runner.steps == [], "the first token comes from prefill"


def test_a_stop_wastes_at_most_one_step(runner: CountingRunner) -> None:
    free = _run(runner, [30], SamplingParams(), [], look_ahead=False)
    token = free[0].token_ids[10]
    needed = free[0].token_ids.index(token)
    _run(runner, [30], SamplingParams(), [token], look_ahead=False)
    assert len(runner.steps) == needed
    _run(runner, [30], SamplingParams(), [token], look_ahead=True)
    assert needed <= len(runner.steps) <= needed + 1


@pytest.mark.gpu
def test_generation_on_a_gpu_equals_its_own_steps(tmp_path: Path) -> None:
    """Graphs, look-ahead and sampling together: a batch gives what its rows give alone."""
    model = make_llama(num_hidden_layers=2)
    magnitude_prune_(model)
    directory = save(model.half(), tmp_path)
    runner = CountingRunner(load_model(open_checkpoint(directory), device="cuda", dtype=torch.float16), 512)
    for params in (SamplingParams(), SamplingParams(temperature=0.8, top_p=0.9, seed=7, repetition_penalty=1.1)):
        ahead = _run(runner, [40, 17, 30], params, [], look_ahead=True)
        plain = _run(runner, [40, 17, 30], params, [], look_ahead=False)
        assert [text.token_ids for text in ahead] == [text.token_ids for text in plain]
    assert runner.capture_s > 0


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_are_an_error(temperature: float, tmp_path: Path) -> None:
    """Not a text: the maximum of NaN is a token like any other."""
    loaded = load_model(open_checkpoint(save(make_llama(num_hidden_layers=1), tmp_path)), device="cpu")
    loaded.norm.weight.data[3] = torch.nan  # loading refuses such a weight
    damaged = CountingRunner(loaded, 100)
    with pytest.raises(CheckpointError, match=r"prompt 0: the model's logits are NaN in torch.float32"):
        _run(damaged, [4, 4], SamplingParams(temperature=temperature, seed=1), [], look_ahead=False)
