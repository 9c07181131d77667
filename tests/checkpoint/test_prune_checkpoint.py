"""Pruned checkpoints: what is zero, what is recorded, and that transformers opens them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_files import BLOCKS, tiny_tensors

from sparsert import __version__
from sparsert.checkpoint import Checkpoint, PruneSummary, inspect_checkpoint, open_checkpoint, prune_checkpoint
from sparsert.checkpoint.prune import base_plan
from sparsert.compress import magnitude_mask
from sparsert.errors import CheckpointError, InputError
from sparsert.schedule import LayerPlan

Make = Callable[..., Path]


def prune(source: Checkpoint, output: Path, **options: object) -> PruneSummary:
    settings = {"method": "magnitude", "base_model": "owner/base", "mask_maker": lambda n, w: magnitude_mask(w, name=n)}
    return prune_checkpoint(source, output, **{**settings, **options})  # type: ignore[arg-type]


def test_block_linears_are_masked_and_nothing_else(make_directory: Make, tmp_path: Path) -> None:
    tensors = tiny_tensors()
    summary = prune(open_checkpoint(make_directory(tensors)), tmp_path / "out")
    pruned = open_checkpoint(tmp_path / "out")
    for name, tensor in tensors.items():
        expected = tensor * magnitude_mask(tensor) if name.endswith("_proj.weight") else tensor
        assert torch.equal(pruned.read(name), expected), name
    assert summary.masked_linears == 4 * BLOCKS and summary.dense_linears == ()
    assert summary.zero_share == 0.5 and summary.total_bytes == pruned.total_nbytes
    assert summary.to_dict()["output"] == str(tmp_path / "out")
    assert pruned.config["sparsert"] == {
        "version": __version__,
        "method": "magnitude",
        "pattern": "2:4",
        "base_model": "owner/base",
        "base_num_blocks": BLOCKS,
        "kept_blocks": list(range(BLOCKS)),
        "removed_blocks": [],
        "without_attention": [],
        "without_mlp": [],
        "dense_linears": [],
    }
    assert all(pruned.claims_two_of_four(name) for name in pruned.block_linears())


def test_blocks_removed_twice_keep_the_numbering_of_the_base(make_directory: Make, tmp_path: Path) -> None:
    tensors = tiny_tensors()
    prune(open_checkpoint(make_directory(tensors)), tmp_path / "one", plan=LayerPlan.remove(BLOCKS, [4]))
    summary = prune(
        open_checkpoint(tmp_path / "one"),
        tmp_path / "two",
        method="none",
        mask_maker=None,
        plan=LayerPlan.remove(7, [4]),
        base_model="one",
    )
    assert summary.removed_blocks == (4,) and summary.masked_linears == 0 and summary.method == "none"
    two = open_checkpoint(tmp_path / "two")
    record = two.config["sparsert"]
    assert record["kept_blocks"] == [0, 1, 2, 3, 6, 7] and record["removed_blocks"] == [4, 5]
    assert record["base_model"] == "owner/base" and record["base_num_blocks"] == BLOCKS
    assert record["method"] == "magnitude" and record["pattern"] == "2:4"
    name = "mlp.up_proj.weight"
    original = tensors[f"model.layers.7.{name}"]
    assert torch.equal(two.read(f"model.layers.5.{name}"), original * magnitude_mask(original))


def test_what_was_removed_is_read_back_in_the_numbering_of_the_base(make_directory: Make, tmp_path: Path) -> None:
    first = LayerPlan.remove(BLOCKS, [1], skip_mlp=[4], force=True)
    prune(open_checkpoint(make_directory()), tmp_path / "one", plan=first)
    one = open_checkpoint(tmp_path / "one")
    assert LayerPlan.from_record(one.config["sparsert"]) == first
    assert "runs 7 of 8 blocks: 0,2-7 (removed: 1), without mlp in 4" in inspect_checkpoint(one).to_text()
    # blocks 4 and 5 of the base are now 3 and 4; losing its attention as well, the first of them goes as a whole
    again = LayerPlan.remove(7, skip_attention=[3, 4], force=True)
    summary = prune(one, tmp_path / "two", plan=again, mask_maker=None)
    assert (summary.removed_blocks, summary.without_attention, summary.without_mlp) == ((3,), (4,), ())
    two = open_checkpoint(tmp_path / "two")
    assert LayerPlan.from_record(two.config["sparsert"]) == LayerPlan(8, (0, 2, 3, 5, 6, 7), without_attention=(5,))
    assert base_plan(two.config, LayerPlan.remove(6, [0], force=True)).removed == (0, 1, 4)
    with pytest.raises(CheckpointError, match="num_hidden_layers is 5, but the sparsert record names 6 kept blocks"):
        base_plan(two.config, LayerPlan.full(5))
    with pytest.raises(CheckpointError, match=r"sparsert record .* is damaged .*base_num_blocks"):
        base_plan({"sparsert": {"kept_blocks": [0]}}, LayerPlan.full(1))


def test_only_removing_blocks_claims_nothing(make_directory: Make, tmp_path: Path) -> None:
    tensors = tiny_tensors()
    prune(
        open_checkpoint(make_directory(tensors)),
        tmp_path / "out",
        mask_maker=None,
        plan=LayerPlan.remove(BLOCKS, [4, 5]),
    )
    out = open_checkpoint(tmp_path / "out")
    assert out.config["sparsert"]["pattern"] is None and out.config["sparsert"]["method"] == "none"
    assert not any(out.claims_two_of_four(name) for name in out.names)
    name = "model.layers.{}.mlp.down_proj.weight"
    assert torch.equal(out.read(name.format(4)), tensors[name.format(6)])


def test_widths_that_have_no_groups_stay_dense(make_directory: Make, tmp_path: Path) -> None:
    tensors = tiny_tensors()
    tensors["model.layers.6.mlp.up_proj.weight"] = torch.randn(8, 22)
    summary = prune(open_checkpoint(make_directory(tensors)), tmp_path / "out", plan=LayerPlan.remove(BLOCKS, [4, 5]))
    out = open_checkpoint(tmp_path / "out")
    odd = "model.layers.4.mlp.up_proj.weight"
    assert summary.dense_linears == (odd,) and out.config["sparsert"]["dense_linears"] == [odd]
    assert not out.claims_two_of_four(odd)
    assert torch.equal(out.read(odd), tensors["model.layers.6.mlp.up_proj.weight"])


def test_nan_names_the_tensor_and_leaves_nothing(make_directory: Make, tmp_path: Path) -> None:
    tensors = tiny_tensors()
    tensors["model.layers.6.mlp.up_proj.weight"][3, 3] = float("nan")
    with pytest.raises(InputError, match=r"model\.layers\.6\.mlp\.up_proj\.weight: 1 of 960 values are NaN"):
        prune(open_checkpoint(make_directory(tensors)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_transformers_opens_the_result(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=24, intermediate_size=40, num_hidden_layers=8, num_attention_heads=3, num_key_value_heads=1,
        vocab_size=52, head_dim=8,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    source = open_checkpoint(tmp_path / "base")
    prune(source, tmp_path / "out", plan=LayerPlan.remove(BLOCKS, [4, 5]), shard_bytes=20_000)
    model = LlamaForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.num_hidden_layers == 6 and model.config.sparsert["removed_blocks"] == [4, 5]
    ours = open_checkpoint(tmp_path / "out")
    state = model.state_dict()
    assert set(ours.names) <= set(state)
    assert all(torch.equal(ours.read(name), state[name].to(ours.dtype(name))) for name in ours.names)
