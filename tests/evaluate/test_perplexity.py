"""Scores of tokens and perplexity of texts, against transformers on the same model."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from tiny_chat_model import save_tokenizer
from tiny_llama import magnitude_prune_, make_llama, random_prompts, save

from sparsert import LLM, InputError
from sparsert.evaluate import PerplexityProtocol, measure_perplexity, score_sequences


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[LLM, Any]:
    """A pruned model in our engine and in transformers."""
    directory = tmp_path_factory.mktemp("model")
    dense = make_llama(vocab_size=save_tokenizer(directory), max_position_embeddings=96)
    magnitude_prune_(dense)
    return LLM(save(dense, directory), device="cpu"), dense


def text(length: int) -> str:
    """Printable letters: a byte is a token."""
    return "".join(random.Random(5).choices("abcdefghij klmnop\n", k=length))


def reference_losses(dense: Any, sequence: list[int]) -> torch.Tensor:
    logits = dense(torch.tensor([sequence])).logits[0, :-1].double()
    return torch.nn.functional.cross_entropy(logits, torch.tensor(sequence[1:]), reduction="none")


def test_scores_are_those_of_transformers(model: tuple[LLM, Any]) -> None:
    llm, dense = model
    sequences = random_prompts([5, 2, 96, 31, 30])
    for batch_size in (1, 2, 5):
        results = list(score_sequences(llm, sequences, batch_size=batch_size))
        assert len(results) == 5
        for sequence, result in zip(sequences, results, strict=True):
            expected = -reference_losses(dense, sequence).float()
            torch.testing.assert_close(result.log_likelihoods, expected, rtol=1e-4, atol=1e-4)
            best = dense(torch.tensor([sequence])).logits[0, :-1].argmax(-1)
            assert torch.equal(result.greedy, best == torch.tensor(sequence[1:]))


def test_long_windows_are_normalised_in_chunks(model: tuple[LLM, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    llm, _ = model
    sequences = random_prompts([96, 40])
    whole = list(score_sequences(llm, sequences, batch_size=2))
    monkeypatch.setattr("sparsert.evaluate.scoring._CHUNK", 7)
    for one, other in zip(whole, score_sequences(llm, sequences, batch_size=2), strict=True):
        torch.testing.assert_close(one.log_likelihoods, other.log_likelihoods)
        assert torch.equal(one.greedy, other.greedy)


def test_scores_of_a_shorter_plan(model: tuple[LLM, Any]) -> None:
    from sparsert import LayerPlan

    llm, _ = model
    sequence = random_prompts([40])
    shorter = llm.with_plan(LayerPlan.remove(3, [1], force=True))
    one, other = (next(iter(score_sequences(view, sequence))) for view in (llm, shorter))
    assert not torch.allclose(one.log_likelihoods, other.log_likelihoods)


def papers_perplexity(dense: Any, tokens: list[int], window: int) -> float:
    """Written as the papers' scripts are: the mean loss of a window times its length."""
    count = len(tokens) // window
    losses = [
        dense(torch.tensor([piece]), labels=torch.tensor([piece])).loss.double() * window
        for piece in (tokens[index * window : (index + 1) * window] for index in range(count))
    ]
    return math.exp(sum(losses) / (count * window))


@pytest.mark.parametrize("window", [None, 17, 96])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_papers_protocol(model: tuple[LLM, Any], window: int | None, batch_size: int) -> None:
    llm, dense = model
    result = measure_perplexity(llm, text(500), PerplexityProtocol(window=window), batch_size=batch_size)
    used = window or 96
    assert result.perplexity == pytest.approx(papers_perplexity(dense, llm.tokenizer.encode(text(500)), used), rel=1e-4)
    assert (result.window, result.stride, result.bos, result.windows) == (used, used, "text", 500 // used)
    assert result.text_tokens == 500 and result.left_out_tokens == 500 % used
    assert result.scored_tokens == (500 // used) * (used - 1)
    assert result.loss == pytest.approx(math.log(result.perplexity)) and result.to_dict()["windows"] == result.windows


def test_a_bos_in_front_of_every_window(model: tuple[LLM, Any]) -> None:
    llm, dense = model
    tokens, bos = llm.tokenizer.encode(text(130)), llm.tokenizer.bos_token_id
    result = measure_perplexity(llm, text(130), PerplexityProtocol(window=21, bos="window"))
    losses = torch.cat([reference_losses(dense, [bos, *tokens[begin : begin + 20]]) for begin in range(0, 120, 20)])
    assert result.loss == pytest.approx(float(losses.mean()), rel=1e-4)
    assert (result.scored_tokens, result.windows, result.stride, result.left_out_tokens) == (120, 6, 20, 10)


def test_overlapping_windows_score_each_token_once(model: tuple[LLM, Any]) -> None:
    llm, dense = model
    tokens = llm.tokenizer.encode(text(100), add_special_tokens=False)
    protocol = PerplexityProtocol(window=32, stride=10, keep_tail=True, bos="none")
    result = measure_perplexity(llm, text(100), protocol)
    losses = [reference_losses(dense, tokens[:32])]
    for done in range(32, 100, 10):
        end = min(done + 10, 100)
        losses.append(reference_losses(dense, tokens[done - 22 : end])[-(end - done) :])
    assert result.loss == pytest.approx(float(torch.cat(losses).mean()), rel=1e-4)
    assert result.scored_tokens == 99 and result.left_out_tokens == 0
    whole_windows = measure_perplexity(llm, text(100), PerplexityProtocol(window=32, stride=10, bos="none"))
    assert whole_windows.scored_tokens == 91 and whole_windows.left_out_tokens == 8


def test_short_texts_tails_and_limits(model: tuple[LLM, Any]) -> None:
    llm, dense = model
    short = measure_perplexity(llm, text(9))
    assert short.windows == 1 and short.scored_tokens == 8 and short.left_out_tokens == 0
    assert short.loss == pytest.approx(float(reference_losses(dense, llm.tokenizer.encode(text(9))).mean()), rel=1e-4)
    tail = measure_perplexity(llm, text(50), PerplexityProtocol(window=20, keep_tail=True))
    assert tail.windows == 3 and tail.scored_tokens == 19 + 19 + 9
    limited = measure_perplexity(llm, text(500), PerplexityProtocol(window=20, max_windows=4))
    assert limited.windows == 4 and limited.left_out_tokens == 420


def test_errors(model: tuple[LLM, Any]) -> None:
    llm, _ = model
    with pytest.raises(InputError, match="bos is 'always'; choose one of text, window, none"):
        PerplexityProtocol(bos="always")
    with pytest.raises(InputError, match="window is 1; it must be at least 2"):
        PerplexityProtocol(window=1)
    with pytest.raises(InputError, match="window is 97; this model was made for 96"):
        measure_perplexity(llm, text(300), PerplexityProtocol(window=97))
    with pytest.raises(InputError, match="stride is 30, longer than the 29 tokens"):
        measure_perplexity(llm, text(300), PerplexityProtocol(window=30, stride=30, bos="window"))
    with pytest.raises(InputError, match="has 1 tokens, so there is nothing to predict; give a longer one"):
        measure_perplexity(llm, "a")
    with pytest.raises(InputError, match="has 0 tokens"):
        measure_perplexity(llm, "", PerplexityProtocol(bos="window"))
    with pytest.raises(InputError, match="sequence 1 has 1 tokens; this model scores 2-97"):
        list(score_sequences(llm, [[1, 2], [3]]))
    with pytest.raises(InputError, match="sequence 0 has 98 tokens"):
        list(score_sequences(llm, [[1] * 98]))
    with pytest.raises(InputError, match="sequence 0 has token ids outside the vocabulary, 0-258"):
        list(score_sequences(llm, [[1, 259]]))
    with pytest.raises(InputError, match="batch_size is 0"):
        list(score_sequences(llm, [[1, 2]], batch_size=0))
    broken = LLM(llm.checkpoint.directory, device="cpu")
    broken.model.norm.weight.data.fill_(float("inf"))
    with pytest.raises(InputError, match=r"the mean loss is nan: the model overflows in torch.float32"):
        measure_perplexity(broken, text(200))


@pytest.mark.gpu
def test_on_a_gpu(model: tuple[LLM, Any]) -> None:
    llm, _ = model
    here = LLM(llm.checkpoint.directory, device="cuda", dtype="bfloat16")
    result = measure_perplexity(here, text(500), batch_size=4)
    assert result.loss == pytest.approx(measure_perplexity(llm, text(500)).loss, rel=2e-2)
