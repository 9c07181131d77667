"""Layers that a plan skips: against transformers with their output zeroed, when loading and when running."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from padded_prefill import PaddedPrefillAttention
from tiny_families import assert_logits_close, make_variant, prune_blocks_
from tiny_llama import VOCABULARY, random_prompts, save

from sparsert.bench.plain_forward import plain_logits
from sparsert.checkpoint import Checkpoint, open_checkpoint
from sparsert.engine.cache import DecodeAttention, KVCache
from sparsert.engine.runner import Runner
from sparsert.errors import InputError
from sparsert.models import DecoderModel, load_model
from sparsert.schedule import LayerPlan

BLOCKS = 6
PLAN = LayerPlan(BLOCKS, (0, 1, 2, 4, 5), without_attention=(0, 4), without_mlp=(2,))

#: One of each kind: plain, post norms and windows by layer, LayerNorm without a gate, fused tensors.
KINDS = [
    "llama, llama3 rope, biases, tied",
    "gemma2, no caps, biases, group 1, untied",
    "gemma3, pattern 2, two ropes, tied",
    "nemotron, group 6, biases, quarter rotary",
    "phi3, group 3, window 6, partial rotary, tied",
]


def make(variant: str, directory: Path) -> tuple[Any, Checkpoint]:
    reference = make_variant(variant, num_hidden_layers=BLOCKS)
    prune_blocks_(reference)
    return reference, open_checkpoint(save(reference, directory))


def silence_(reference: Any, plan: LayerPlan) -> None:
    """Make what the plan skips add nothing to the residual stream."""
    for index, layer in enumerate(reference.model.layers):
        silent = [] if plan.runs_attention(index) else [layer.self_attn.o_proj]
        silent += [] if plan.runs_mlp(index) else [layer.mlp.down_proj]
        for linear in silent:
            linear.weight.zero_()
            if linear.bias is not None:
                linear.bias.zero_()


def draw_tokens(length: int = 23) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (2, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("variant", KINDS)
def test_skipped_layers_add_nothing(variant: str, tmp_path: Path) -> None:
    reference, checkpoint = make(variant, tmp_path)
    whole = load_model(checkpoint, device="cpu")
    model = load_model(checkpoint, device="cpu", plan=PLAN)
    silence_(reference, PLAN)
    tokens = draw_tokens()
    expected = reference(tokens).logits
    assert_logits_close(model(tokens), expected)
    assert_logits_close(whole(tokens, plan=PLAN), expected)
    assert_logits_close(plain_logits(model, tokens, torch.float32), expected)
    with pytest.raises(AssertionError):
        assert_logits_close(whole(tokens), expected)
    runner = Runner(model, 32)
    texts = random_prompts([9, 4])
    logits = runner.prefill(texts, room=20)
    for _ in range(5):
        assert_logits_close(logits, torch.stack([reference(torch.tensor([text])).logits[0, -1] for text in texts]))
        chosen = logits.argmax(-1)
        logits = runner.decode(chosen, max(map(len, texts)))
        for text, token in zip(texts, chosen.tolist(), strict=True):
            text.append(token)


def test_what_is_skipped_is_not_there(tmp_path: Path) -> None:
    _, checkpoint = make("gemma3, pattern 2, two ropes, tied", tmp_path)
    model = load_model(checkpoint, device="cpu", plan=PLAN)
    blocks: list[Any] = list(model.blocks)
    assert [block.index for block in blocks] == [0, 1, 2, 4, 5]
    assert [block.self_attn is not None for block in blocks] == [False, True, True, False, True]
    assert [block.mlp is not None for block in blocks] == [True, True, False, True, True]
    assert len(model.attention_shapes) == 3 and [s.sliding_window for s in model.attention_shapes] == [None, 5, None]
    names = {name for name, _ in model.named_parameters()}
    assert "blocks.1.attention_norm.weight" in names and "blocks.1.mlp_post_norm.weight" in names
    assert not any(name.startswith(("blocks.0.attention", "blocks.0.self_attn", "blocks.2.mlp")) for name in names)
    assert all(parameter.device.type == "cpu" for parameter in model.parameters())
    assert "model.layers.2.self_attn.o_proj.weight" in model.report.linears
    assert len(model.report.linears) == 3 * 4 + 4 * 3
    # the blocks that see everything are those of the full model: only their rope's table is needed beside the local one
    assert len(model.rotaries) == 2
    local = load_model(checkpoint, device="cpu", plan=LayerPlan(BLOCKS, (0, 1, 2), without_attention=(1,)))
    assert len(local.rotaries) == 1


def test_one_cache_serves_every_plan(tmp_path: Path) -> None:
    """Prefill with all layers, decode some steps with a part, then all again over the same cache."""
    reference, checkpoint = make("qwen3, group 3", tmp_path)
    del reference
    model = load_model(checkpoint, device="cpu")
    tokens = draw_tokens(12)
    cache = KVCache(model.attention_shapes, 2, 32, model.device, model.dtype)
    model.reserve_positions_(32)
    with torch.inference_mode():
        model(tokens, PaddedPrefillAttention(cache))
        before = [keys.clone() for keys in cache.keys]
        following = torch.tensor([[5], [7]])
        lengths = torch.full((2,), 12)
        partial = model(following, DecodeAttention(cache, lengths, 32), plan=PLAN)
        changed = [not torch.equal(a, b) for a, b in zip(before, cache.keys, strict=True)]
        assert changed == [False, True, True, False, False, True], "slots keep the numbers of the whole model"
        full = model(following, DecodeAttention(cache, lengths, 32))
    text = torch.cat([tokens, following], dim=1)
    assert_logits_close(full, model(text)[:, -1:])
    with pytest.raises(AssertionError):
        assert_logits_close(partial, full)


def test_a_plan_must_be_within_what_is_loaded(tmp_path: Path) -> None:
    _, checkpoint = make("llama, group 3", tmp_path)
    model = load_model(checkpoint, device="cpu", plan=PLAN)
    tokens = draw_tokens()
    model(tokens, plan=PLAN)
    model(tokens, plan=LayerPlan(BLOCKS, (0, 1, 5), without_attention=(0,)))
    with pytest.raises(InputError, match=r"runs the attention of block 0,3-4, which is not loaded.*loaded: 5 of 6"):
        model(tokens, plan=LayerPlan.full(BLOCKS))
    with pytest.raises(InputError, match="runs the mlp of block 2, which is not loaded"):
        model(tokens, plan=LayerPlan(BLOCKS, (1, 2)))
    with pytest.raises(InputError, match="for 7 blocks, the model has 6"):
        model(tokens, plan=LayerPlan.full(7))


def test_many_plans_are_not_remembered_for_ever(tmp_path: Path) -> None:
    _, checkpoint = make("llama, group 3", tmp_path)
    model: DecoderModel = load_model(checkpoint, device="cpu")
    for bits in range(1, 2**BLOCKS):
        kept = tuple(block for block in range(BLOCKS) if bits >> block & 1)
        model._route(LayerPlan(BLOCKS, kept))
        for skipped in kept:
            model._route(LayerPlan(BLOCKS, kept, without_mlp=(skipped,)))
    assert len(model._routes) <= 64


@pytest.mark.parametrize("variant", KINDS)
def test_a_plan_of_everything_changes_nothing(variant: str, tmp_path: Path) -> None:
    _, checkpoint = make(variant, tmp_path)
    model = load_model(checkpoint, device="cpu")
    tokens = draw_tokens()
    assert torch.equal(model(tokens, plan=LayerPlan.full(BLOCKS)), model(tokens))
