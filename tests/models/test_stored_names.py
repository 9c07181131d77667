"""Tensors under other names: fused projections with masks, other beginnings, what is missing or too much."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_families import assert_logits_close, make_model, make_variant, prune_blocks_
from tiny_llama import VOCABULARY, save

from sparsert.bench.subject import stored_sparsity
from sparsert.checkpoint import open_checkpoint, read_maskllm, write_maskllm
from sparsert.compress import magnitude_mask
from sparsert.errors import CheckpointError, SparsityError
from sparsert.models import load_model

PHI3 = "phi3, group 3, window 6, partial rotary, tied"
QKV = "model.layers.1.self_attn.qkv_proj.weight"


def test_masks_of_fused_tensors(tmp_path: Path) -> None:
    """A mask file has one mask for a fused tensor; each part is packed by its rows of it."""
    reference = make_variant(PHI3)
    checkpoint = open_checkpoint(save(reference, tmp_path / "model"))
    names = checkpoint.block_linears()
    assert QKV in names and len(names) == 4 * 3
    # not by magnitude: the mask must come from the file
    masks = {name: magnitude_mask(torch.randn(checkpoint.shape(name))) for name in names}
    write_maskllm(tmp_path / "masks.npz", masks.items())
    model = load_model(checkpoint, device="cpu", masks=read_maskllm(tmp_path / "masks.npz"))
    assert model.report.count("2:4") == 7 * 3
    assert f"{QKV}[96:128]" in model.report.linears
    state = reference.state_dict()
    for name, mask in masks.items():
        state[name].mul_(mask)
    tokens = torch.randint(3, VOCABULARY, (2, 15))
    assert_logits_close(model(tokens), reference(tokens).logits)


def test_one_bad_part_of_a_fused_tensor(tmp_path: Path) -> None:
    reference = make_variant(PHI3)
    prune_blocks_(reference)
    reference.model.layers[1].self_attn.qkv_proj.weight[100, :4] = 1.0  # inside the keys
    checkpoint = open_checkpoint(save(reference, tmp_path / "model"))
    with pytest.warns(UserWarning, match=r"1 of 21 linear layers are not 2:4.*qkv_proj.weight\[96:128\]"):
        model = load_model(checkpoint, device="cpu")
    tokens = torch.randint(3, VOCABULARY, (2, 15))
    assert_logits_close(model(tokens), reference(tokens).logits)
    assert stored_sparsity(checkpoint, model.config) == "2:4", "judged by the first block"
    checkpoint.config["sparsert"] = {"pattern": "2:4"}
    with pytest.raises(SparsityError, match=r"layers.1.self_attn.qkv_proj.weight\[96:128\]: 1 of"):
        load_model(checkpoint, device="cpu")


@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model."])
def test_gemma3_inside_another_model(prefix: str, tmp_path: Path) -> None:
    reference = make_variant("gemma3, pattern 2, two ropes, tied")
    prune_blocks_(reference)
    directory = save(reference, tmp_path)
    tensors = load_file(directory / "model.safetensors")
    renamed = {prefix + name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    save_file(renamed, directory / "model.safetensors", metadata={"format": "pt"})
    model = load_model(open_checkpoint(directory), device="cpu")
    tokens = torch.randint(3, VOCABULARY, (2, 15))
    assert_logits_close(model(tokens), reference(tokens).logits)
    assert f"{prefix}layers.0.mlp.up_proj.weight" in model.report.linears


@pytest.mark.parametrize(
    ("variant", "name"),
    [
        ("gemma2, soft caps, window 6, tied", "model.layers.2.post_feedforward_layernorm.weight"),
        ("gemma3, pattern 2, two ropes, tied", "model.layers.1.self_attn.k_norm.weight"),
        ("nemotron, tied", "model.layers.0.input_layernorm.bias"),
        ("qwen2, biases, no window", "model.layers.2.self_attn.v_proj.bias"),
        (PHI3, "model.layers.2.mlp.gate_up_proj.weight"),
    ],
)
def test_every_tensor_of_a_family_is_needed(variant: str, name: str, tmp_path: Path) -> None:
    directory = save(make_variant(variant), tmp_path)
    tensors = load_file(directory / "model.safetensors")
    del tensors[name]
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"1 tensors are missing: {name}"):
        load_model(open_checkpoint(directory), device="cpu")


def test_tensors_of_another_family_are_not_ignored(tmp_path: Path) -> None:
    """Qwen 2's biases under Llama's name would be left out of the sum."""
    checkpoint = open_checkpoint(save(make_model("Qwen2"), tmp_path))
    checkpoint.config["architectures"] = ["LlamaForCausalLM"]
    with pytest.raises(CheckpointError, match=r"9 tensors are none of a LlamaForCausalLM.*q_proj.bias"):
        load_model(checkpoint, device="cpu")
