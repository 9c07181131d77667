"""Checkpoints whose layers differ in width, or lack a layer: against transformers' modules put together by hand."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_families import assert_logits_close, make_model, prune_blocks_
from tiny_llama import VOCABULARY, random_prompts
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP

from sparsert.bench.card import predict_card, stored_bytes
from sparsert.bench.correctness import LogitsReference
from sparsert.checkpoint import open_checkpoint, prune_checkpoint
from sparsert.compress import magnitude_mask
from sparsert.engine.cache import KVCache, kv_bytes_per_token
from sparsert.engine.runner import Runner
from sparsert.errors import CheckpointError, UnsupportedError
from sparsert.models import DecoderConfig, load_model
from sparsert.models.random import random_model
from sparsert.schedule import LayerPlan

BLOCKS = 7

#: Widths, heads and key/value heads of single layers; head_dim stays.
OVERRIDES: dict[int, dict[str, Any]] = {
    1: {"intermediate_size": 48},
    2: {"num_attention_heads": 3, "num_key_value_heads": 1},
    3: {"skip": ["attention"]},
    4: {"skip": ["mlp"], "num_key_value_heads": 6},
    5: {"intermediate_size": 212, "num_attention_heads": 12},
}


def _rebuild(module: type, config: Any, index: int) -> Any:
    layer = module(config, index) if module is LlamaAttention else module(config)
    for parameter in layer.parameters():
        parameter.normal_(std=0.12)
    return layer.eval().requires_grad_(False)


@torch.no_grad()
def make_pair(directory: Path, *, sparse: bool = False) -> tuple[Any, Path]:
    """A model of transformers whose layers were exchanged, and a checkpoint of it."""
    model = make_model("Llama", num_hidden_layers=BLOCKS)
    for index, overrides in OVERRIDES.items():
        own = copy.deepcopy(model.config)
        for key, value in overrides.items():
            if key != "skip":
                setattr(own, key, value)
        layer = model.model.layers[index]
        if {"num_attention_heads", "num_key_value_heads"} & set(overrides):
            layer.self_attn = _rebuild(LlamaAttention, own, index)
        if "intermediate_size" in overrides:
            layer.mlp = _rebuild(LlamaMLP, own, index)
    if sparse:
        prune_blocks_(model)
    gone = ("model.layers.3.self_attn.", "model.layers.4.mlp.")
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items() if not name.startswith(gone)}
    model.model.layers[3].self_attn.o_proj.weight.zero_()
    model.model.layers[4].mlp.down_proj.weight.zero_()
    directory.mkdir()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = model.config.to_dict() | {
        "architectures": ["LlamaForCausalLM"],
        "per_layer_config": {str(index): overrides for index, overrides in OVERRIDES.items()},
    }
    (directory / "config.json").write_text(json.dumps(config))
    return model, directory


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "2:4"])
@pytest.mark.filterwarnings("ignore:no linear layer is 2.4")
def test_layers_of_other_widths(sparse: bool, tmp_path: Path) -> None:
    reference, directory = make_pair(tmp_path / "model", sparse=sparse)
    model = load_model(open_checkpoint(directory), device="cpu")
    assert model.report.count("2:4") == (7 * 7 - 4 - 3 if sparse else 0)
    assert [(s.num_heads, s.num_kv_heads) for s in model.attention_shapes] == [
        (6, 2), (6, 2), (3, 1), (6, 6), (12, 2), (6, 2),
    ]  # fmt: skip
    tokens = torch.randint(3, VOCABULARY, (2, 21))
    assert_logits_close(model(tokens), reference(tokens).logits)
    runner = Runner(model, 48)
    texts = random_prompts([13, 2, 8])
    logits = runner.prefill(texts, room=30)
    for _ in range(6):
        assert_logits_close(logits, torch.stack([reference(torch.tensor([text])).logits[0, -1] for text in texts]))
        chosen = logits.argmax(-1)
        logits = runner.decode(chosen, max(map(len, texts)))
        for text, token in zip(texts, chosen.tolist(), strict=True):
            text.append(token)


def test_a_list_says_the_same_as_overrides(tmp_path: Path) -> None:
    config = json.loads((make_pair(tmp_path / "model")[1] / "config.json").read_text())
    by_override = DecoderConfig.from_hf(config)
    lists = {
        key: [OVERRIDES.get(block, {}).get(key, config[key]) for block in range(BLOCKS)]
        for key in ("intermediate_size", "num_attention_heads", "num_key_value_heads")
    }
    skips = {key: {"skip": value["skip"]} for key, value in config["per_layer_config"].items() if "skip" in value}
    assert DecoderConfig.from_hf(config | lists | {"per_layer_config": skips}) == by_override
    assert by_override.intermediate_size == 212 and by_override.num_heads == 12


def test_what_a_checkpoint_holds_of_a_skipped_layer_is_left_alone(tmp_path: Path) -> None:
    """The norm in front of it is in the file above; here the layer itself is, too."""
    reference, directory = make_pair(tmp_path / "model")
    tensors = {
        name: torch.full_like(t, torch.nan)
        for name, t in reference.state_dict().items()
        if ".layers.3.self_attn" in name
    }
    checkpoint = open_checkpoint(directory)
    kept = {name: checkpoint.read(name).clone() for name in checkpoint.names}
    save_file(kept | tensors, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.warns(UserWarning, match="runs dense"):
        model = load_model(open_checkpoint(directory), device="cpu")
    tokens = torch.randint(3, VOCABULARY, (1, 9))
    assert_logits_close(model(tokens), reference(tokens).logits)


def test_cache_card_and_check_follow(tmp_path: Path) -> None:
    config = DecoderConfig.from_hf(json.loads((make_pair(tmp_path / "model")[1] / "config.json").read_text()))
    plan = LayerPlan(BLOCKS, (0, 1, 2, 3, 5, 6), without_mlp=(6,))
    model = random_model(config, device="cpu", dtype=torch.float32, plan=plan)
    card = predict_card("x", config, plan=plan, sparse=True, dtype=torch.float32)
    assert (card.weight_bytes, card.read_bytes) == stored_bytes(model)
    assert card.kv_bytes_per_token == 2 * 4 * 24 * (2 + 2 + 1 + 2 + 2)
    cache = KVCache(model.attention_shapes, 3, 16, torch.device("cpu"), torch.float32)
    assert cache.nbytes == 3 * 16 * card.kv_bytes_per_token
    assert kv_bytes_per_token(model.attention_shapes, torch.float32) == card.kv_bytes_per_token
    assert LogitsReference(model, 2).check(2).correct


def test_pruned_and_shortened_checkpoint_keeps_its_layers(tmp_path: Path) -> None:
    reference, directory = make_pair(tmp_path / "model")
    source = open_checkpoint(directory)
    prune_checkpoint(
        source, tmp_path / "pruned", method="magnitude", mask_maker=lambda name, weight: magnitude_mask(weight),
        base_model="x", plan=LayerPlan.remove(BLOCKS, [3], force=True),
    )  # fmt: skip
    pruned = load_model(open_checkpoint(tmp_path / "pruned"), device="cpu")
    assert pruned.report.count("dense") == 0
    whole = load_model(source, device="cpu", mask_maker=magnitude_mask, plan=LayerPlan.remove(BLOCKS, [3], force=True))
    tokens = torch.randint(3, VOCABULARY, (1, 9))
    assert_logits_close(pruned(tokens), whole(tokens), 1e-6)
    del reference


CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "vocab_size": 50,
}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"intermediate_size": [96, 48]}, CheckpointError, "intermediate_size lists 2 layers, num_hidden_layers is 3"),
        ({"intermediate_size": [96, 0, 9]}, CheckpointError, "block 1: intermediate_size is 0; a positive number"),
        ({"num_attention_heads": [4, 2, 1]}, CheckpointError, "head_dim is missing"),
        ({"per_layer_config": {"3": {}}}, CheckpointError, "names layer '3' of 3"),
        ({"per_layer_config": {"x": {}}}, CheckpointError, "names layer 'x' of 3"),
        ({"per_layer_config": [1]}, CheckpointError, r"need \{layer index: \{key: value\}\}"),
        ({"per_layer_config": {"1": {"skip": "mlp"}}}, CheckpointError, "skip is 'mlp'; need a list"),
        ({"per_layer_config": {"1": {"skip": ["experts"]}}}, UnsupportedError, "block 1: skip experts.*attention"),
        (
            {"per_layer_config": {"1": {"hidden_size": 32}}},
            UnsupportedError,
            "layer 1 changes hidden_size; supported: intermediate_size, num_attention_heads",
        ),
        (
            {"per_layer_config": {"2": {"num_key_value_heads": 3}}},
            CheckpointError,
            "block 2: num_attention_heads 4 is no multiple of num_key_value_heads 3",
        ),
        ({"block_configs": [{}]}, UnsupportedError, "block_configs .* cannot be run with LlamaForCausalLM"),
    ],
)
def test_refusals_name_the_layer(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        DecoderConfig.from_hf(CONFIG | changes)
