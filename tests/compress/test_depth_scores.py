"""Block importance: each criterion against its formula, and skipping against removal."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_families import VARIANTS, make_variant
from tiny_llama import delete_blocks_, make_llama
from torch import Tensor

from sparsert.compress.anatomy import anatomy_of
from sparsert.compress.block_scores import CRITERIA, score_blocks
from sparsert.compress.skipping import skipping
from sparsert.errors import InputError

BLOCKS = 5


def _windows(count: int = 4, length: int = 11) -> Tensor:
    return torch.randint(0, 211, (count, length))


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name.endswith(("tied", "group 3", "cap", "fused"))])
def test_a_skipped_block_is_a_removed_one(variant: str) -> None:
    model = make_variant(variant)
    tokens = _windows()
    with torch.no_grad():
        whole = model(tokens, use_cache=False).logits
        with skipping(anatomy_of(model), [1]):
            skipped = model(tokens, use_cache=False).logits
        again = model(tokens, use_cache=False).logits
        types = getattr(model.config, "layer_types", None)
        delete_blocks_(model, (1,))
        if types is not None:
            model.config.layer_types = [types[0], *types[2:]]
        removed = model(tokens, use_cache=False).logits
    assert torch.equal(skipped, removed)
    assert torch.equal(whole, again)
    assert not torch.equal(whole, skipped)


def test_nested_skips_come_undone_in_order() -> None:
    anatomy = anatomy_of(make_llama(num_hidden_layers=BLOCKS))
    with skipping(anatomy, [1, 2]):
        with skipping(anatomy, [2, 3]):
            assert [name for name in range(BLOCKS) if "forward" in vars(anatomy.blocks[name])] == [1, 2, 3]
        assert [name for name in range(BLOCKS) if "forward" in vars(anatomy.blocks[name])] == [1, 2]
    assert not any("forward" in vars(block) for block in anatomy.blocks)
    with pytest.raises(InputError, match="cannot skip block 5"), skipping(anatomy, [5]):
        pass


def test_magnitude_is_the_sum_of_absolute_weights() -> None:
    model = make_llama(num_hidden_layers=BLOCKS, attention_bias=True)
    scores = score_blocks(anatomy_of(model), "magnitude", skipped=[2])
    assert list(scores) == [0, 1, 3, 4]
    for block, score in scores.items():
        named = model.model.layers[block].named_parameters()
        expected = sum(float(p.double().abs().sum()) for name, p in named if not name.endswith("bias"))
        assert score == pytest.approx(expected, rel=1e-6)


def test_taylor_is_weight_times_gradient_whatever_the_batch() -> None:
    model = make_llama(num_hidden_layers=BLOCKS)
    marker = torch.ones(3)
    model.model.norm.weight.grad = torch.ones_like(model.model.norm.weight)
    windows = _windows(5)
    scores = score_blocks(anatomy_of(model), "taylor", windows, batch_size=2)
    assert torch.equal(model.model.norm.weight.grad[:3], marker)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    model.requires_grad_(True)
    model.zero_grad()
    model(windows, labels=windows).loss.backward()
    for block, score in scores.items():
        expected = sum(float((p * p.grad).detach().abs().sum()) for p in model.model.layers[block].parameters())
        assert score == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(("count", "length", "gradients"), [(5, 11, 1), (13, 300, 2), (4, 1024, 3)])
def test_taylor_is_the_mean_of_gradients_of_short_texts(count: int, length: int, gradients: int) -> None:
    model = make_llama(num_hidden_layers=2, max_position_embeddings=2048)
    windows = _windows(count, length)
    done: list[tuple[int, int]] = []
    scores = score_blocks(
        anatomy_of(model), "taylor", windows, batch_size=3, progress=lambda number, of: done.append((number, of))
    )
    assert done == [(number, gradients) for number in range(1, gradients + 1)]
    model.requires_grad_(True)
    texts = windows[:, : length // 128 * 128].reshape(-1, 128) if length >= 128 else windows
    expected = [0.0, 0.0]
    for first in range(gradients):
        texts_of_one = texts[first::gradients]
        assert gradients == 1 or len(texts_of_one) >= 10
        model.zero_grad()
        model(texts_of_one, labels=texts_of_one).loss.backward()
        for block in range(2):
            parameters = list(model.model.layers[block].parameters())
            expected[block] += sum(float((p * p.grad).detach().abs().sum()) for p in parameters) / gradients
    assert list(scores.values()) == pytest.approx(expected, rel=1e-3)


def test_perplexity_is_that_of_the_model_without_the_block() -> None:
    model = make_llama(num_hidden_layers=BLOCKS)
    windows = _windows()
    scores = score_blocks(anatomy_of(model), "perplexity", windows, skipped=[3], batch_size=3)
    delete_blocks_(model, (1, 3))
    with torch.no_grad():
        assert scores[1] == pytest.approx(math.exp(model(windows, labels=windows).loss), rel=1e-4)


def test_influence_is_one_minus_the_mean_cosine() -> None:
    model = make_llama(num_hidden_layers=BLOCKS)
    windows = _windows()
    scores = score_blocks(anatomy_of(model), "influence", windows, batch_size=1)
    with torch.no_grad():
        states = model(windows, output_hidden_states=True).hidden_states
    for block in range(BLOCKS - 1):  # the last state of transformers is the normed one
        cosine = torch.nn.functional.cosine_similarity(states[block].double(), states[block + 1].double(), dim=-1)
        assert scores[block] == pytest.approx(1 - float(cosine.mean()), abs=1e-6)
    assert len(scores) == BLOCKS


def test_text_is_asked_for_by_name() -> None:
    anatomy = anatomy_of(make_llama())
    for criterion in CRITERIA[1:]:
        with pytest.raises(InputError, match=f"criterion {criterion} needs calibration text"):
            score_blocks(anatomy, criterion)
    with pytest.raises(InputError, match="'cosine' is not known; choose one of magnitude, taylor, perplexity"):
        score_blocks(anatomy, "cosine")
    with pytest.raises(InputError, match="batch_size is 0"):
        score_blocks(anatomy, "influence", _windows(), batch_size=0)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_broken_weights_make_no_order(criterion: str) -> None:
    model = make_llama()
    model.model.layers[1].mlp.up_proj.weight[3, 4] = float("nan")
    with pytest.raises(InputError, match="nan"):
        score_blocks(anatomy_of(model), criterion, _windows())
