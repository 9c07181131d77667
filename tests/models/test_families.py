"""Every architecture against transformers' own class: prefill, decode through the engine, generation, 2:4."""

from __future__ import annotations

import contextlib
import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from padded_prefill import PaddedPrefillAttention
from tiny_families import VARIANTS, assert_logits_close, make_variant, prune_blocks_
from tiny_llama import VOCABULARY, greedy_reference, random_prompts, save

from sparsert.bench.plain_forward import plain_logits
from sparsert.checkpoint import open_checkpoint
from sparsert.engine import LLM, SamplingParams
from sparsert.engine.cache import KVCache
from sparsert.engine.runner import Runner
from sparsert.models import DecoderModel, load_model

#: Shorter and longer than the windows of the variants.
LENGTHS = [19, 3, 11]


@pytest.fixture(scope="module", params=[(v, s) for v in VARIANTS for s in (False, True)], ids=str)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, DecoderModel, Path]:
    """The model of transformers, ours, and their directory; dense and pruned 2:4."""
    variant, sparse = request.param
    reference = make_variant(variant)
    if sparse:
        prune_blocks_(reference)
    directory = save(reference, tmp_path_factory.mktemp("model"))
    with contextlib.nullcontext() if sparse else pytest.warns(UserWarning, match="no linear layer is 2:4"):
        model = load_model(open_checkpoint(directory), device="cpu")
    linears = sum(len(model.config.block_linears(block)) for block in range(3))
    assert model.report.count("2:4" if sparse else "dense") == linears
    return reference, model, directory


def test_prefill(pair: tuple[Any, DecoderModel, Path]) -> None:
    reference, model, _ = pair
    tokens = torch.randint(3, VOCABULARY, (2, 41), generator=torch.Generator().manual_seed(3))
    assert_logits_close(model(tokens), reference(tokens).logits)
    rows = torch.tensor([7, 40])
    assert_logits_close(model(tokens, rows=rows), reference(tokens).logits[torch.arange(2), rows])
    assert_logits_close(plain_logits(model, tokens, torch.float64), reference(tokens).logits)


def test_decode_of_a_ragged_batch(pair: tuple[Any, DecoderModel, Path]) -> None:
    reference, model, _ = pair
    texts = random_prompts(LENGTHS)
    runner = Runner(model, 64)
    logits = runner.prefill(texts, room=40)
    draw = torch.Generator().manual_seed(5)
    for _ in range(12):
        expected = torch.stack([reference(torch.tensor([text])).logits[0, -1] for text in texts])
        assert_logits_close(logits, expected)
        tokens = torch.randint(3, VOCABULARY, (len(texts),), generator=draw)
        longest = max(map(len, texts))
        logits = runner.decode(tokens, longest)
        for text, token in zip(texts, tokens.tolist(), strict=True):
            text.append(token)


def test_packed_prefill_equals_padded(pair: tuple[Any, DecoderModel, Path]) -> None:
    """Logits and the cache, whole and in chunks that split texts and hold several."""
    _, model, _ = pair
    texts = random_prompts(LENGTHS)
    padded = torch.zeros(len(texts), max(LENGTHS), dtype=torch.int64)
    for row, text in enumerate(texts):
        padded[row, : len(text)] = torch.tensor(text)
    model.reserve_positions_(64)
    cache = KVCache(model.attention_shapes, len(texts), 64, model.device, model.dtype)
    with torch.inference_mode():
        expected = model(padded, PaddedPrefillAttention(cache), rows=torch.tensor(LENGTHS) - 1)
    for chunk_tokens in (100, 33, 32, 20, 7, 1):
        runner = Runner(model, 64)
        assert_logits_close(runner.prefill(texts, room=40, chunk_tokens=chunk_tokens), expected)
        assert runner.lengths.tolist() == LENGTHS
        filled = runner._workspace.cache
        for ours, theirs in zip([*filled.keys, *filled.values], [*cache.keys, *cache.values], strict=True):
            for row, length in enumerate(LENGTHS):
                torch.testing.assert_close(ours[row, :, :length], theirs[row, :, :length], atol=1e-5, rtol=1e-5)
                assert not ours[row, :, length:].any(), "nothing is written behind a text"


@pytest.mark.filterwarnings("ignore:no linear layer is 2.4")
def test_greedy_tokens(pair: tuple[Any, DecoderModel, Path]) -> None:
    reference, _, directory = pair
    prompts = random_prompts(LENGTHS, seed=2)
    llm = LLM(directory, device="cpu", max_length=64)
    for prompt, completion in zip(
        prompts, llm.generate(prompts, SamplingParams(max_new_tokens=16, ignore_eos=True)), strict=True
    ):
        assert list(completion.token_ids) == greedy_reference(reference, prompt, 16, eos_token_id=None)


#: One key of each fact that a variant is there for, changed a little: the comparisons above must be able to see it.
CHANGED_FACTS = {
    "llama, gelu": {"hidden_act": "gelu_pytorch_tanh"},
    "mistral, window 7": {"sliding_window": 8},
    "qwen2, window in the last blocks, tied": {"max_window_layers": 2, "layer_types": None},
    "qwen3, window by layer type, biases, group 6": {"sliding_window": 7},
    "gemma2, soft caps, window 6, tied": {"attn_logit_softcapping": 3.1},
    "gemma2, no caps, biases, group 1, untied": {"query_pre_attn_scalar": 250},
    "gemma3, pattern 2, two ropes, tied": {"sliding_window_pattern": 3, "layer_types": None},
    "gemma3, layer types, stretched, logit cap": {"final_logit_softcapping": 5.1},
    "nemotron, half rotary, group 3": {"norm_eps": 1e-3},
    "phi3, group 3, window 6, partial rotary, tied": {"rope_parameters": {"partial_rotary_factor": 0.75}},
}


@pytest.mark.parametrize("variant", CHANGED_FACTS)
@pytest.mark.filterwarnings("ignore:no linear layer is 2.4")
def test_a_changed_fact_is_seen(variant: str, tmp_path: Path) -> None:
    reference = make_variant(variant)
    checkpoint = open_checkpoint(save(reference, tmp_path))
    checkpoint.config.update(CHANGED_FACTS[variant])
    model = load_model(checkpoint, device="cpu")
    tokens = torch.randint(3, VOCABULARY, (2, 41), generator=torch.Generator().manual_seed(3))
    with pytest.raises(AssertionError, match="of the largest logit"):
        assert_logits_close(model(tokens), reference(tokens).logits)


@pytest.mark.parametrize(
    "variant",
    ["gemma2, soft caps, window 6, tied", "gemma3, pattern 2, two ropes, tied", "nemotron, half rotary, group 3"],
)
def test_error_in_bfloat16_is_at_most_twice_that_of_transformers(variant: str, tmp_path: Path) -> None:
    rounded = make_variant(variant).bfloat16()
    prune_blocks_(rounded)
    exact = copy.deepcopy(rounded).double()
    if exact.config.model_type.startswith("gemma"):
        # part of the model, not an error: transformers rounds this factor to the dtype of the weights
        exact.model.embed_tokens.embed_scale.copy_(rounded.model.embed_tokens.embed_scale.bfloat16())
    model = load_model(open_checkpoint(save(rounded, tmp_path)), device="cpu", dtype="bfloat16")
    tokens = torch.randint(0, VOCABULARY, (4, 96), generator=torch.Generator().manual_seed(5))
    expected = exact(tokens).logits
    theirs, ours = (
        (m(tokens).logits.double() if m is rounded else m(tokens).double()) - expected for m in (rounded, model)
    )
    assert theirs.abs().max() > 1e-4, "the comparison must not be trivial"
    assert ours.abs().max() <= 2 * theirs.abs().max()
    assert ours.pow(2).mean().sqrt() <= 1.25 * theirs.pow(2).mean().sqrt()
