"""Checkpoints as the methods that prune leave them, built here layer by layer, run as transformers runs them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_families import make_model, prune_blocks_
from tiny_llama import delete_blocks_, greedy_reference, magnitude_prune_, make_llama, random_prompts, save
from torch import Tensor

from sparsert.checkpoint import inspect_checkpoint, open_checkpoint, read_maskllm
from sparsert.cli import main
from sparsert.engine import LLM, SamplingParams
from sparsert.errors import CheckpointError

UP = "model.layers.1.mlp.up_proj.weight"


def linears_of(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if name.endswith("_proj.weight")}


def random_masks(model: torch.nn.Module, kept: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    masks = {}
    for name, weight in linears_of(model).items():
        order = torch.rand(weight.shape[0], weight.shape[1] // 4, 4, generator=generator).argsort(-1)
        masks[name] = (order < kept).view(weight.shape)
    return masks


def apply_(model: torch.nn.Module, masks: dict[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        if name in masks:
            parameter.mul_(masks[name])


def assert_same_text(directory: Path, model: Any, **options: Any) -> LLM:
    """The engine's greedy tokens are those of transformers' own model, in fp32."""
    llm = LLM(directory, device="cpu", dtype="float32", **options)
    prompt = random_prompts([11])[0]
    tokens = llm.generate([prompt], SamplingParams(max_new_tokens=12, ignore_eos=True))[0].token_ids
    assert list(tokens) == greedy_reference(model, prompt, 12, eos_token_id=None)
    return llm


@pytest.mark.parametrize("dtype", [torch.float16, torch.bool, torch.int64])
def test_maskllm_raw_masks_with_layers_left_dense(tmp_path: Path, dtype: torch.dtype) -> None:
    model = make_llama()
    save(model, tmp_path / "base")
    masks = random_masks(model)
    masks.pop(UP)
    torch.save({f"{name}.mask": mask.to(dtype) for name, mask in masks.items()}, tmp_path / "mask.pt")
    apply_(model, masks)
    with pytest.warns(UserWarning, match="1 of 21 linear layers are not 2:4"):
        llm = assert_same_text(tmp_path / "base", model, masks=tmp_path / "mask.pt")
    assert llm.model.report.count("2:4") == 20 and llm.model.report.linears[UP].kind == "dense"


def test_maskllm_masks_of_one_in_four(tmp_path: Path) -> None:
    """1:4 masks run as 2:4 with one padded slot; the value at the padded position must not come back."""
    model = make_llama()
    save(model, tmp_path / "base")
    masks = random_masks(model, kept=1)
    bits = {f"{name}.mask": np.packbits(mask.numpy()) for name, mask in masks.items()}
    np.savez_compressed(tmp_path / "mask_compressed.npz", **bits)
    apply_(model, masks)
    llm = assert_same_text(tmp_path / "base", model, masks=tmp_path / "mask_compressed.npz")
    assert llm.model.report.count("2:4") == 21


def test_masks_are_written_into_a_packed_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = make_llama()
    save(model, tmp_path / "base")
    masks = random_masks(model)
    masks.pop(UP)
    torch.save({f"{name}.mask": mask for name, mask in masks.items()}, tmp_path / "mask.pt")
    options = ["prune", "--model", str(tmp_path / "base"), "--masks", str(tmp_path / "mask.pt"), "--output"]
    assert main([*options, str(tmp_path / "packed"), "--to", "sparsert"]) == 0
    assert "20 linear weights 2:4" in capsys.readouterr().out
    packed = open_checkpoint(tmp_path / "packed")
    assert packed.storage(UP) == "dense" and not packed.claims_two_of_four(UP)
    assert packed.config["quantization_config"]["ignore"] == ["lm_head", UP.removesuffix(".weight")]
    apply_(model, masks)
    with pytest.warns(UserWarning, match="1 of 21 linear layers are not 2:4"):
        assert_same_text(tmp_path / "packed", model)
    assert main([*options, str(tmp_path / "again"), "--method", "magnitude"]) == 2
    assert "--masks and --method both say how to prune" in capsys.readouterr().err


def test_raw_masks_that_do_not_fit(tmp_path: Path) -> None:
    file = tmp_path / "mask.pt"

    def saved(content: object) -> Path:
        torch.save(content, file)
        return file

    good = torch.ones(160, 96, dtype=torch.bool)
    shapes = {UP: (160, 96)}
    with pytest.raises(CheckpointError, match="key 'lm_head' is none of the form"):
        read_maskllm(saved({"lm_head": good}))
    with pytest.raises(CheckpointError, match="holds no masks"):
        read_maskllm(saved({}))
    with pytest.raises(CheckpointError, match="more than named tensors"):
        read_maskllm(saved([good]))
    with pytest.raises(CheckpointError, match=r"truncated or damaged|asks for"):
        file.write_bytes(b"\x80\x02nonsense")
        read_maskllm(file)
    masks = read_maskllm(saved({f"{UP}.mask": good[:, :92]}))
    with pytest.raises(CheckpointError, match=r"has shape \[160, 92\], the weight \[160, 96\]; the masks belong"):
        masks.check(shapes)
    with pytest.raises(CheckpointError, match="1 of 1 masks are for parameters this model does not have"):
        masks.check({"other.weight": (160, 92)})
    with pytest.raises(CheckpointError, match="values beside 0 and 1"):
        read_maskllm(saved({f"{UP}.mask": good * 0.5})).mask(UP, (160, 96))
    with pytest.raises(CheckpointError, match="has no mask for 'x'"):
        masks.mask("x", (160, 96))
    renamed = tmp_path / "masks.npz"
    renamed.write_bytes(saved({f"{UP}.mask": good}).read_bytes())
    assert torch.equal(read_maskllm(renamed).mask(UP, (160, 96)), good), "told by what it holds, not by its name"


@pytest.mark.parametrize("safe", [True, False])
def test_wanda_and_sparsegpt_write_zeros(tmp_path: Path, safe: bool) -> None:
    """Both call save_pretrained on a model with zeros, in shards; some layers may stay dense, the head always does."""
    model = make_llama()
    magnitude_prune_(model)
    for name, parameter in model.named_parameters():
        if name.startswith("model.layers.2.self_attn") and name.endswith("weight"):
            parameter.add_(0.01)
    if safe:
        save(model, tmp_path / "pruned", max_shard_size="200KB")
    else:
        save(model, tmp_path / "pruned")
        (tmp_path / "pruned" / "model.safetensors").unlink()
        torch.save(model.state_dict(), tmp_path / "pruned" / "pytorch_model.bin")
    with pytest.warns(UserWarning, match="4 of 21 linear layers are not 2:4"):
        llm = assert_same_text(tmp_path / "pruned", model)
    assert llm.model.report.count("2:4") == 17
    assert inspect_checkpoint(open_checkpoint(tmp_path / "pruned")).totals()["sparse_linears"] == 17


@pytest.mark.parametrize(("weight", "mask"), [("weight", "_weight_mask"), ("weight_orig", "weight_mask")])
def test_weights_beside_their_masks(tmp_path: Path, weight: str, mask: str) -> None:
    """ModelOpt keeps ``_weight_mask`` beside an unmasked weight until it exports; torch.nn.utils.prune likewise."""
    model = make_llama()
    file = save(model, tmp_path / "model") / "model.safetensors"
    masks = random_masks(model)
    tensors = load_file(file)
    for name in masks:
        prefix = name.removesuffix("weight")
        tensors[prefix + weight] = tensors.pop(name)
        tensors[prefix + mask] = masks[name] if mask == "_weight_mask" else masks[name].float()
    save_file(tensors, file)
    apply_(model, masks)
    llm = assert_same_text(tmp_path / "model", model)
    assert llm.model.report.count("2:4") == 21
    tensors[UP.removesuffix("weight") + mask] = torch.ones(3, 3)
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"the mask of .*up_proj.weight' has shape \[3, 3\], the weight"):
        open_checkpoint(tmp_path / "model")


def test_shortened_llama_directories(tmp_path: Path) -> None:
    """Blocks removed and the rest renumbered, fp16, nothing recorded: an ordinary shorter Llama."""
    model = make_llama(num_hidden_layers=8, pad_token_id=0)
    delete_blocks_(model, (3, 4))
    model.half()
    directory = save(model, tmp_path / "st-llama", max_shard_size="300KB")
    assert json.loads((directory / "config.json").read_text())["num_hidden_layers"] == 6
    with pytest.warns(UserWarning, match="no linear layer is 2:4"):
        llm = assert_same_text(directory, model.float())
    assert llm.summary()["blocks_removed"] == [] and llm.plan.num_blocks == 6
    assert inspect_checkpoint(open_checkpoint(directory)).record is None


@pytest.mark.parametrize("pruned", [False, True])
def test_minitron_in_one_pickle(tmp_path: Path, pruned: bool) -> None:
    """Minitron-4B-Base: Nemotron blocks, one pytorch_model.bin, names of the configuration from before transformers."""
    model = make_model("Nemotron")
    if pruned:
        prune_blocks_(model)
    directory = save(model, tmp_path / "minitron")
    (directory / "model.safetensors").unlink()
    torch.save(model.state_dict(), directory / "pytorch_model.bin")
    config = json.loads((directory / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config |= {"rope_theta": rope["rope_theta"], "rope_percent": rope["partial_rotary_factor"], "kv_channels": 24}
    config.pop("head_dim")
    (directory / "config.json").write_text(json.dumps(config))
    if not pruned:
        with pytest.warns(UserWarning, match="no linear layer is 2:4"):
            assert_same_text(directory, model)
    else:
        assert assert_same_text(directory, model).model.report.count("dense") == 0


def test_minitron_of_another_width_than_its_heads(tmp_path: Path) -> None:
    """Llama-3.1-Minitron-4B-Width: hidden size 3072 under 32 heads of 128, in two shards."""
    model = make_llama(hidden_size=72, num_attention_heads=6, head_dim=24, intermediate_size=152)
    directory = save(model, tmp_path / "width", max_shard_size="400KB")
    assert len(list(directory.glob("*.safetensors"))) >= 2
    with pytest.warns(UserWarning, match="no linear layer is 2:4"):
        assert_same_text(directory, model)
