"""Opening model directories: all layouts read alike, and what is not whole is refused with one sentence."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_files import BLOCKS, tiny_config, tiny_tensors

from sparsert.checkpoint import block_of, open_checkpoint, rename_block
from sparsert.errors import CheckpointError

Make = Callable[..., Path]
LAYOUTS = ("single", "sharded", "bin", "bin-old", "bin-sharded")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_reads_alike(make_directory: Make, layout: str) -> None:
    tensors = tiny_tensors()
    checkpoint = open_checkpoint(make_directory(tensors, layout=layout))
    assert sorted(checkpoint.names) == sorted(tensors)
    assert checkpoint.config["num_hidden_layers"] == checkpoint.num_blocks == BLOCKS
    assert checkpoint.total_nbytes == sum(tensor.nbytes for tensor in tensors.values())
    for name, tensor in tensors.items():
        assert name in checkpoint
        assert checkpoint.shape(name) == tuple(tensor.shape)
        assert checkpoint.dtype(name) == tensor.dtype
        assert checkpoint.nbytes(name) == tensor.nbytes
        assert torch.equal(checkpoint.read(name), tensor)


def test_block_linears_are_the_matrices_inside_blocks(make_directory: Make) -> None:
    checkpoint = open_checkpoint(make_directory())
    assert len(checkpoint.block_linears()) == 4 * BLOCKS
    some = checkpoint.block_linears([1, 5])
    assert {block_of(name) for name in some} == {1, 5} and len(some) == 8
    assert not any("norm" in name or "embed" in name for name in checkpoint.block_linears())


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("model.layers.0.mlp.up_proj.weight", 0),
        ("layers.31.x", 31),
        ("language_model.model.layers.12.y.bias", 12),
        ("model.norm.weight", None),
        ("lm_head.weight", None),
        ("model.layers.weight", None),
        ("model.mylayers.3.weight", None),
    ],
)
def test_block_names(name: str, block: int | None) -> None:
    assert block_of(name) == block
    if block is not None:
        assert block_of(rename_block(name, 77)) == 77
        assert rename_block(rename_block(name, 77), block) == name


def test_unknown_tensor(make_directory: Make) -> None:
    checkpoint = open_checkpoint(make_directory())
    for call in (checkpoint.read, checkpoint.shape, checkpoint.dtype, checkpoint.nbytes):
        with pytest.raises(CheckpointError, match=r"no tensor 'lm_head.weight'.*`sparsert inspect`"):
            call("lm_head.weight")


def test_missing_and_truncated_shards(make_directory: Make) -> None:
    directory = make_directory(layout="sharded")
    shard = directory / "model-00002-of-00003.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[:-10])
    with pytest.raises(CheckpointError, match=r"model-00002-of-00003\.safetensors: truncated"):
        open_checkpoint(directory)
    shard.unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00003\.safetensors: missing.*among 3 shards"):
        open_checkpoint(directory)


def test_truncated_bin(make_directory: Make) -> None:
    for layout in ("bin", "bin-old"):
        file = make_directory(layout=layout) / "pytorch_model.bin"
        file.write_bytes(file.read_bytes()[:-2000])
        with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: (truncated|this pickle)"):
            open_checkpoint(file.parent)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "is no JSON"),
        ("[]", "holds a JSON list"),
        ("{}", "has no weight_map"),
        ('{"weight_map": {"w": 3}}', "has no weight_map"),
        ('{"weight_map": {"w": "../secret.safetensors"}}', "no weight file beside it"),
        ('{"weight_map": {"w": "config.json"}}', "no weight file beside it"),
        ('{"weight_map": {"w": "model-00001-of-00003.safetensors"}}', "holds no tensor 'w'"),
    ],
)
def test_damaged_index(make_directory: Make, index: str, message: str) -> None:
    directory = make_directory(layout="sharded")
    (directory / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(directory)


def test_directories_that_are_none(make_directory: Make, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such directory"):
        open_checkpoint(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="is a file; give the model directory"):
        open_checkpoint(make_directory() / "config.json")
    with pytest.raises(CheckpointError, match=r"config\.json: no such file"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json: is no JSON"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.gguf").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"holds none of model\.safetensors.*found: .*model\.gguf"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("count", [None, "8", 0, -1, 2.0, True])
def test_number_of_blocks(make_directory: Make, count: object) -> None:
    checkpoint = open_checkpoint(make_directory(config=tiny_config(num_hidden_layers=count)))
    with pytest.raises(CheckpointError, match="num_hidden_layers is"):
        _ = checkpoint.num_blocks


class _RunsCode:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (self.command,)


@pytest.mark.parametrize("zipped", [True, False, None])
def test_a_pickle_that_wants_code_is_refused_and_runs_nothing(
    make_directory: Make, tmp_path: Path, zipped: bool | None
) -> None:
    directory = make_directory(layout="bin")
    evidence = tmp_path / "evidence"
    content = {"w": torch.zeros(4), "evil": _RunsCode(f"touch {evidence}")}
    file = directory / "pytorch_model.bin"
    if zipped is None:
        file.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: this pickle asks for .*nothing was run") as caught:
        open_checkpoint(directory)
    assert "safetensors" in str(caught.value) and "\n" not in str(caught.value)
    assert not evidence.exists()


def test_a_pickle_with_other_things_than_tensors(make_directory: Make) -> None:
    directory = make_directory(layout="bin")
    for content in ({"model": {"w": torch.zeros(4)}}, [torch.zeros(4)], {3: torch.zeros(4)}):
        torch.save(content, directory / "pytorch_model.bin")
        with pytest.raises(CheckpointError, match="plain mapping of parameter names to tensors"):
            open_checkpoint(directory)


def test_claims(make_directory: Make) -> None:
    up, norm = "model.layers.3.mlp.up_proj.weight", "model.layers.3.input_layernorm.weight"
    q = "model.layers.3.self_attn.q_proj.weight"

    def claims(**changes: object) -> list[bool]:
        checkpoint = open_checkpoint(make_directory(config=tiny_config(**changes)))
        names = (up, q, norm, "model.embed_tokens.weight")
        return [checkpoint.claims_two_of_four(name) for name in names]

    assert claims() == [False] * 4
    assert claims(sparsert={"pattern": "2:4"}) == [True, True, False, False]
    assert claims(sparsert={"pattern": "2:4", "dense_linears": [up]}) == [False, True, False, False]
    assert claims(sparsert={"pattern": None}) == [False] * 4
    sparsity = {"format": "dense", "sparsity_structure": "2:4", "ignore": ["lm_head", "re:.*q_proj"]}
    assert claims(quantization_config={"sparsity_config": sparsity}) == [True, False, False, False]
    assert claims(compression_config={"sparsity_config": {**sparsity, "ignore": [up.removesuffix(".weight")]}}) == [
        False,
        True,
        False,
        False,
    ]
    assert claims(sparsity_config={"sparsity_structure": "unstructured"}) == [False] * 4
    with pytest.raises(CheckpointError, match=r"ignores 're:\[', which is no regular expression .*mend it"):
        claims(sparsity_config={**sparsity, "ignore": ["re:["]})


def test_config_must_be_an_object(make_directory: Make) -> None:
    directory = make_directory()
    (directory / "config.json").write_text(json.dumps([1]))
    with pytest.raises(CheckpointError, match="holds a JSON list, need an object"):
        open_checkpoint(directory)
