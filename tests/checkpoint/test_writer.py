"""Writing checkpoints: byte-equal copies, removed blocks, streaming, and no half-written directory."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_files import BLOCKS, tiny_config, tiny_tensors

from sparsert.checkpoint import block_of, open_checkpoint, pruned_config, write_checkpoint
from sparsert.checkpoint.writer import stored_plan
from sparsert.errors import CheckpointError, InputError
from sparsert.schedule import LayerPlan

Make = Callable[..., Path]


@pytest.mark.parametrize("shard_bytes", [10**9, 9000, 1])
@pytest.mark.parametrize("layout", ["single", "bin-sharded"])
def test_plain_copy_is_equal(make_directory: Make, tmp_path: Path, layout: str, shard_bytes: int) -> None:
    tensors = tiny_tensors()
    source = open_checkpoint(make_directory(tensors, layout=layout))
    written = write_checkpoint(source, tmp_path / "copy", shard_bytes=shard_bytes)
    copy = open_checkpoint(tmp_path / "copy")
    assert copy.names == source.names and copy.config == source.config
    assert written == copy.total_nbytes == source.total_nbytes
    assert all(torch.equal(copy.read(name), tensor) for name, tensor in tensors.items())
    files = sorted(file.name for file in (tmp_path / "copy").glob("*.safetensors"))
    if shard_bytes > 10**6:
        assert files == ["model.safetensors"]
    else:
        assert len(files) == (len(tensors) if shard_bytes == 1 else len(files)) and len(files) > 1
        assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
        assert max(map(copy.nbytes, copy.names)) <= 9000 or shard_bytes == 1


def test_removed_blocks_are_left_out_and_the_rest_renumbered(make_directory: Make, tmp_path: Path) -> None:
    tensors = tiny_tensors()
    config = tiny_config(layer_types=[f"kind{block}" for block in range(BLOCKS)])
    source = open_checkpoint(make_directory(tensors, config))
    kept = (0, 1, 4, 7)
    write_checkpoint(source, tmp_path / "short", plan=LayerPlan(BLOCKS, kept))
    short = open_checkpoint(tmp_path / "short")
    assert short.num_blocks == 4
    assert short.config["layer_types"] == ["kind0", "kind1", "kind4", "kind7"]
    assert {block_of(name) for name in short.names} == {0, 1, 2, 3, None}
    for new, old in enumerate(kept):
        name = "mlp.up_proj.weight"
        assert torch.equal(short.read(f"model.layers.{new}.{name}"), tensors[f"model.layers.{old}.{name}"])


def test_config_lists_are_cut() -> None:
    config = {
        "num_hidden_layers": 4,
        "layer_types": ["a", "b", "c", "d"],
        "no_rope_layers": [1, 0, 1, 1],
        "mlp_only_layers": [0, 2, 3],
        "eos_token_id": [1, 2, 3, 4],
        "architectures": ["A", "B", "C", "D"],
        "per_layer_config": {"1": {"x": 1}, "3": {"x": 3}},
        "other": [1, 2],
        "rope_scaling": {"long_factor": [1, 2, 3, 4]},
    }
    pruned = pruned_config(config, LayerPlan(4, (0, 1, 3), without_mlp=(3,)))
    assert pruned == {
        **config,
        "num_hidden_layers": 3,
        "layer_types": ["a", "b", "d"],
        "no_rope_layers": [1, 0, 1],
        "mlp_only_layers": [0, 2],
        "per_layer_config": {"1": {"x": 1}, "2": {"x": 3, "skip": ["mlp"]}},
    }
    assert config["num_hidden_layers"] == 4
    halved = pruned_config({"num_hidden_layers": 2, "per_layer_config": None}, LayerPlan(2, (0, 1), without_mlp=(1,)))
    assert halved["per_layer_config"] == {"1": {"skip": ["mlp"]}}


def test_small_files_are_copied_and_configuration_is_not(make_directory: Make, tmp_path: Path) -> None:
    directory = make_directory(layout="sharded")
    for name in ("tokenizer.json", "generation_config.json", "chat_template.jinja", "tokenizer.model", "LICENSE"):
        (directory / name).write_text(name)
    for name in ("optimizer.pt", "README.md", "adapter_config.json"):
        (directory / name).write_text(name)
    (directory / "original").mkdir()
    write_checkpoint(open_checkpoint(directory), tmp_path / "copy")
    assert sorted(file.name for file in (tmp_path / "copy").iterdir()) == [
        "LICENSE",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer.model",
    ]
    assert (tmp_path / "copy" / "LICENSE").read_text() == "LICENSE"


def test_one_tensor_at_a_time(make_directory: Make, tmp_path: Path) -> None:
    living: list[weakref.ref[torch.Tensor]] = []

    def double(name: str, tensor: torch.Tensor) -> torch.Tensor:
        assert all(reference() is None for reference in living), "an earlier tensor is still held"
        living.append(weakref.ref(tensor))
        result = tensor * 2
        living.append(weakref.ref(result))
        return result

    tensors = tiny_tensors()
    write_checkpoint(open_checkpoint(make_directory(tensors)), tmp_path / "out", transform=double)
    copy = open_checkpoint(tmp_path / "out")
    assert len(living) == 2 * len(tensors)
    assert all(torch.equal(copy.read(name), tensor * 2) for name, tensor in tensors.items())


def test_a_failure_on_the_way_leaves_nothing(make_directory: Make, tmp_path: Path) -> None:
    source = open_checkpoint(make_directory())
    target = tmp_path / "place" / "out"
    target.parent.mkdir()

    def fail(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if block_of(name) == 5:
            raise InputError("no")
        return tensor

    with pytest.raises(InputError, match="no"):
        write_checkpoint(source, target, transform=fail)
    assert list(target.parent.iterdir()) == []


def test_a_full_disk_is_one_sentence(make_directory: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_checkpoint(make_directory())
    (tmp_path / "place").mkdir()

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(CheckpointError, match=r"cannot be written \(No space left on device\); check permissions"):
        write_checkpoint(source, tmp_path / "place" / "out")
    assert list((tmp_path / "place").iterdir()) == []


def test_targets(make_directory: Make, tmp_path: Path) -> None:
    source = open_checkpoint(make_directory())
    empty = tmp_path / "empty"
    empty.mkdir()
    write_checkpoint(source, empty)
    assert open_checkpoint(empty).names == source.names
    with pytest.raises(InputError, match="exists and is not an empty directory; choose a new directory"):
        write_checkpoint(source, empty)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="exists and is not an empty directory"):
        write_checkpoint(source, tmp_path / "file")
    with pytest.raises(CheckpointError, match="the parent directory does not exist"):
        write_checkpoint(source, tmp_path / "absent" / "out")
    with pytest.raises(InputError, match="layer plan is for 9 blocks, the model has 8"):
        write_checkpoint(source, tmp_path / "new", plan=LayerPlan.full(BLOCKS + 1))


def test_skipped_halves_lose_their_tensors(make_directory: Make, tmp_path: Path) -> None:
    tensors = tiny_tensors()
    for block in range(BLOCKS):
        tensors[f"model.layers.{block}.post_attention_layernorm.weight"] = torch.randn(24)
    plan = LayerPlan.remove(BLOCKS, [0], skip_attention=[4], skip_mlp=[5], force=True)
    write_checkpoint(open_checkpoint(make_directory(tensors)), tmp_path / "out", plan=plan)
    out = open_checkpoint(tmp_path / "out")
    assert out.config["per_layer_config"] == {"3": {"skip": ["attention"]}, "4": {"skip": ["mlp"]}}
    assert out.num_blocks == 7 and stored_plan(out.config, 7) == LayerPlan(7, tuple(range(7)), (3,), (4,))
    inside = {
        block: sorted(n.partition(f"layers.{block}.")[2] for n in out.names if block_of(n) == block) for block in (3, 4)
    }
    assert inside == {
        3: ["mlp.down_proj.weight", "mlp.up_proj.weight", "post_attention_layernorm.weight"],
        4: ["input_layernorm.weight", "self_attn.k_proj.weight", "self_attn.q_proj.weight"],
    }
    # again, from what was written: what is gone stays gone
    write_checkpoint(out, tmp_path / "again", plan=LayerPlan.remove(7, [2], force=True))
    again = open_checkpoint(tmp_path / "again")
    assert again.config["per_layer_config"] == {"2": {"skip": ["attention"]}, "3": {"skip": ["mlp"]}}
    assert torch.equal(again.read("model.layers.2.mlp.up_proj.weight"), tensors["model.layers.4.mlp.up_proj.weight"])


def test_norms_around_each_half_go_with_it(make_directory: Make, tmp_path: Path) -> None:
    """With norms before and behind each half (Gemma 2 and 3), post_attention_layernorm belongs to attention."""
    tensors = tiny_tensors()
    names = ("post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
    for block in range(BLOCKS):
        tensors |= {f"model.layers.{block}.{name}.weight": torch.randn(24) for name in names}
    plan = LayerPlan(BLOCKS, tuple(range(BLOCKS)), without_attention=(4,), without_mlp=(5,))
    write_checkpoint(open_checkpoint(make_directory(tensors)), tmp_path / "out", plan=plan)
    written = open_checkpoint(tmp_path / "out").names
    norms = {block: {n.split(".")[3] for n in written if block_of(n) == block and "norm" in n} for block in (4, 5)}
    assert norms == {4: {*names[1:]}, 5: {"input_layernorm", "post_attention_layernorm"}}


def test_config_of_another_depth(make_directory: Make, tmp_path: Path) -> None:
    source = open_checkpoint(make_directory(config=tiny_config(num_hidden_layers=5)))
    with pytest.raises(CheckpointError, match=r"belongs to block 5, but config.json says there are 5"):
        write_checkpoint(source, tmp_path / "out")


def test_index_names_every_tensor(make_directory: Make, tmp_path: Path) -> None:
    source = open_checkpoint(make_directory())
    write_checkpoint(source, tmp_path / "out", shard_bytes=9000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert list(index["weight_map"]) == source.names
    assert index["metadata"]["total_size"] == source.total_nbytes
