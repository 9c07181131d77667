"""GGUF conversion: weights, row order, configuration, tokenizer and template of a tiny Llama."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_gguf import (
    BLOCKS,
    CONTEXT,
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    interleave_heads,
    vocabulary,
    write_tiny_gemma3_gguf,
    write_tiny_gguf,
)

from sparsert.checkpoint import open_checkpoint
from sparsert.checkpoint.gguf_file import convert_gguf, deinterleave_heads
from sparsert.errors import CheckpointError, UnsupportedError


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    directory = tmp_path_factory.mktemp("gguf")
    expected = write_tiny_gguf(directory / "tiny.gguf")
    convert_gguf(directory / "tiny.gguf", directory / "model")
    return directory / "model", expected


@pytest.mark.parametrize(("heads", "head_dim"), [(1, 2), (3, 8), (5, 6)])
def test_row_order_round_trip(heads: int, head_dim: int) -> None:
    weight = torch.randn(heads * head_dim, 7)
    stored = torch.from_numpy(interleave_heads(weight.numpy(), heads).copy())
    assert torch.equal(deinterleave_heads(stored, heads), weight)


def test_weights_are_bf16_of_the_dequantised_ones(converted: tuple[Path, dict[str, torch.Tensor]]) -> None:
    directory, expected = converted
    checkpoint = open_checkpoint(directory)
    assert set(checkpoint.names) == set(expected)
    for name, weight in expected.items():
        assert torch.equal(checkpoint.read(name), weight.to(torch.bfloat16)), name


def test_configuration(converted: tuple[Path, dict[str, torch.Tensor]]) -> None:
    config = open_checkpoint(converted[0]).config
    assert config["architectures"] == ["LlamaForCausalLM"] and config["num_hidden_layers"] == BLOCKS
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (HEADS, KV_HEADS)
    assert config["head_dim"] == HEAD_DIM and config["tie_word_embeddings"] is True and config["dtype"] == "bfloat16"
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, 2, 2)
    assert not {"quantization_config", "_name_or_path"} & set(config)


def test_transformers_loads_it_with_the_same_weights(converted: tuple[Path, dict[str, torch.Tensor]]) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(converted[0])
    assert model.config.rope_parameters["rope_theta"] == 5000.0
    state = model.state_dict()
    assert all(torch.equal(state[name], weight.to(torch.bfloat16)) for name, weight in converted[1].items())
    assert model.generation_config.eos_token_id == 2


def test_tokenizer(converted: tuple[Path, dict[str, torch.Tensor]]) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(converted[0])
    assert len(tokenizer) == len(vocabulary()) and tokenizer.model_max_length == CONTEXT
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    assert tokenizer.decode(tokenizer("Grüße, 123").input_ids) == "Grüße, 123"
    # digits are cut off before the whitespace is split: one token of two spaces, not "space" and "space 1"
    assert tokenizer.convert_ids_to_tokens(tokenizer("a  12").input_ids) == ["a", "ĠĠ", "1", "2"]
    text = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert text == "<|im_start|>user\nhi<|im_end|>\n"
    assert tokenizer(text).input_ids[0] == 1


def test_gemma3(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    expected = write_tiny_gemma3_gguf(tmp_path / "tiny.gguf")
    convert_gguf(tmp_path / "tiny.gguf", tmp_path / "model")
    checkpoint = open_checkpoint(tmp_path / "model")
    assert set(checkpoint.names) == set(expected)
    for name, weight in expected.items():
        assert torch.equal(checkpoint.read(name), weight.to(torch.bfloat16)), name
    config = checkpoint.config
    assert config["architectures"] == ["Gemma3ForCausalLM"] and config["sliding_window"] == 16
    assert config["rope_parameters"]["full_attention"]["rope_theta"] == 1e6
    state = AutoModelForCausalLM.from_pretrained(tmp_path / "model").state_dict()
    assert all(torch.equal(state[name], weight.to(torch.bfloat16)) for name, weight in expected.items())


def test_what_cannot_be_converted(tmp_path: Path) -> None:
    (tmp_path / "no.gguf").write_bytes(b"GGUX" + b"\0" * 100)
    with pytest.raises(CheckpointError, match=r"no\.gguf: is no readable GGUF file"):
        convert_gguf(tmp_path / "no.gguf", tmp_path / "a")
    write_tiny_gguf(tmp_path / "other.gguf", architecture="falcon")
    with pytest.raises(UnsupportedError, match="architecture 'falcon'; only llama, gemma3 can"):
        convert_gguf(tmp_path / "other.gguf", tmp_path / "b")
    write_tiny_gguf(tmp_path / "extra.gguf", extra="blk.0.ssm_in.weight")
    with pytest.raises(UnsupportedError, match=r"'blk\.0\.ssm_in\.weight' has no place in a Llama model"):
        convert_gguf(tmp_path / "extra.gguf", tmp_path / "c")
