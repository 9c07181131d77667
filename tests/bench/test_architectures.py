"""Named architectures, and which blocks go when only their number is given."""

from __future__ import annotations

import pytest
import torch

from sparsert.bench.architectures import ARCHITECTURES, choose_blocks, hf_config
from sparsert.bench.shapes import linear_shapes
from sparsert.bench.subject import Subject
from sparsert.errors import InputError
from sparsert.models import DecoderConfig, DecoderModel
from sparsert.models.decoder import DecoderBlock
from sparsert.schedule import LayerPlan, guarded_blocks

#: Parameters that the models' own cards state, embeddings included (a tied head counts once).
PARAMETERS = {
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.2-1b": 1_235_814_400,
    "smollm2-135m": 134_515_008,
    "mistral-7b": 7_241_732_096,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-8b": 8_190_735_360,
    "gemma-2-9b": 9_241_705_984,
    "gemma-3-1b": 999_885_952,
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_engine_runs_the_shapes_that_are_measured(name: str) -> None:
    config = DecoderConfig.from_hf(hf_config(name))
    separate = {(s.out_features, s.in_features) for s in linear_shapes(name, "separate")}
    assert {(s.out_features, s.in_features) for block in range(config.num_blocks)
            for s in config.block_linears(block).values()} == separate  # fmt: skip
    block = DecoderModel(config, LayerPlan.full(config.num_blocks)).blocks[0]
    assert isinstance(block, DecoderBlock) and block.self_attn is not None and block.mlp is not None
    groups = [list(group.parts.values()) for group in (block.self_attn.qkv_proj, block.mlp.gate_up_proj)]
    fused = {(sum(part.out_features for part in parts), parts[0].in_features) for parts in groups}
    fused |= {(layer.out_features, layer.in_features) for layer in (block.self_attn.o_proj, block.mlp.down_proj)}
    assert {(s.out_features, s.in_features) for s in linear_shapes(name, "fused")} == fused
    assert {(s.out_features, s.in_features) for s in linear_shapes(name)} == separate | fused


def test_a_configuration_can_be_changed_without_harm() -> None:
    hf_config("llama-3.1-8b")["rope_parameters"]["factor"] = 1.0
    assert hf_config("llama-3.1-8b")["rope_parameters"]["factor"] == 8.0


@pytest.mark.parametrize("name", sorted(PARAMETERS))
def test_they_have_the_parameters_of_the_real_models(name: str) -> None:
    card = Subject(name, hf_config(name), "bfloat16", "dense").card()
    assert card.parameters == PARAMETERS[name]
    # Gemma's norms are kept in fp32
    norms = card.parameters - sum(
        shape.out_features * (shape.in_features + shape.bias)
        for block in range(card.blocks)
        for shape in DecoderConfig.from_hf(hf_config(name)).block_linears(block).values()
    )
    assert 0 <= card.weight_bytes - 2 * PARAMETERS[name] <= 2 * norms * name.startswith("gemma")


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("minitron-4b", 4.19),
        ("minitron-8b", 8.27),
        ("llama-3.1-minitron-4b-width", 4.51),
        ("llama-3.1-minitron-4b-depth", 4.54),
    ],
)
def test_minitron_has_the_parameters_of_its_card(name: str, billions: float) -> None:
    card = Subject(name, hf_config(name), "bfloat16", "dense").card()
    assert round(card.parameters / 1e9, 2) == billions


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_transformers_builds_the_same_model(name: str) -> None:
    import transformers

    config = hf_config(name) | {"num_hidden_layers": 2}
    family = config["architectures"][0].removesuffix("ForCausalLM")
    with torch.device("meta"):
        settings = getattr(transformers, "Gemma3TextConfig" if family == "Gemma3" else f"{family}Config")(**config)
        model = getattr(transformers, f"{family}ForCausalLM")(settings)
    card = Subject(name, config, "float32", "dense").card()
    assert sum(parameter.numel() for parameter in model.parameters()) == card.parameters
    ours = DecoderConfig.from_hf(config)
    assert ours == DecoderConfig.from_hf({**settings.to_dict(), "architectures": config["architectures"]})


def test_rope_of_llama_3_is_stretched() -> None:
    attention = DecoderConfig.from_hf(hf_config("llama-3.1-8b")).blocks[31].attention
    assert attention is not None
    rope = attention.rope
    assert (rope.kind, rope.theta, rope.factor, rope.original_max_position_embeddings) == ("llama3", 5e5, 8.0, 8192)


def test_unknown_name() -> None:
    with pytest.raises(InputError, match=r"--arch gpt-2: known are llama-2-7b.*--model"):
        hf_config("gpt-2")


@pytest.mark.parametrize("count", [0, 1, 8, 26])
def test_a_count_takes_blocks_outside_the_guard(count: int) -> None:
    removed = choose_blocks(str(count), 32)
    assert len(removed) == count and list(removed) == sorted(set(removed))
    assert not set(removed) & guarded_blocks(32)
    assert removed == tuple(range(30 - count, 30))


def test_a_list_is_taken_as_it_is() -> None:
    assert choose_blocks(None, 32) == ()
    assert choose_blocks("21-25,27", 32) == (21, 22, 23, 24, 25, 27)
    assert choose_blocks("8-8", 32) == (8,)
    assert choose_blocks("0-1,9", 32, force=True) == (0, 1, 9)


@pytest.mark.parametrize(
    ("text", "message"),
    [("27", "at most 26 can go"), ("0-1,9", "block"), ("x", "neither a block number"), ("40-41", "has 32 blocks")],
)
def test_what_cannot_be_removed(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        choose_blocks(text, 32)
