"""Checkpoints of compressed-tensors run in the engine as transformers runs their dense weights."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_llama import greedy_reference, magnitude_prune_, make_llama, random_prompts, save
from torch import Tensor

from sparsert.engine import LLM, SamplingParams
from sparsert.formats import bitmask_from_dense

SAMPLES = Path(__file__).resolve().parents[1] / "checkpoint" / "samples"
Encode = Callable[[str, Tensor], dict[str, Tensor]]


def sparse_bitmask(name: str, weight: Tensor) -> dict[str, Tensor]:
    """compressed-tensors' unstructured form: kept values of all rows, where each row begins, bits by numpy's order."""
    mask = weight != 0
    bits = torch.nn.functional.pad(mask, (0, -weight.shape[1] % 8)).view(weight.shape[0], -1, 8)
    bitmask = (bits * (1 << torch.arange(8))).sum(-1).to(torch.uint8)
    counts = mask.sum(1).cumsum(0)
    return {
        f"{name}.weight.compressed": weight[mask],
        f"{name}.weight.bitmask": bitmask,
        f"{name}.weight.shape": torch.tensor(weight.shape),
        f"{name}.weight.row_offsets": torch.cat([torch.zeros(1, dtype=torch.int64), counts[:-1]]),
    }


def sparse_24_bitmask(name: str, weight: Tensor) -> dict[str, Tensor]:
    return {f"{name}.{part}": tensor for part, tensor in bitmask_from_dense(weight).items()}


@pytest.mark.parametrize("encode", [sparse_bitmask, sparse_24_bitmask])
def test_a_whole_model(tmp_path: Path, encode: Encode) -> None:
    model = make_llama()
    magnitude_prune_(model)
    directory = save(model, tmp_path)
    tensors = load_file(directory / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        tensors |= encode(name.removesuffix(".weight"), tensors.pop(name))
    save_file(tensors, directory / "model.safetensors")
    config = json.loads((directory / "config.json").read_text())
    form = encode.__name__.replace("_", "-")
    sparsity = {"format": form, "sparsity_structure": "unstructured" if encode is sparse_bitmask else "2:4"}
    config["quantization_config"] = {"quant_method": "compressed-tensors", "sparsity_config": sparsity}
    (directory / "config.json").write_text(json.dumps(config))
    llm = LLM(directory, device="cpu", dtype="float32")
    assert llm.model.report.count("2:4") == 21 and llm.model.report.count("dense") == 0
    assert_same_tokens(llm, model)


@pytest.mark.parametrize(
    ("sample", "size"),
    [("marlin24-int4-channel", (96, 128)), ("marlin24-int8-channel", (64, 64)), ("marlin24-int4-group", (384, 64))],
)
def test_layers_of_marlin_24(tmp_path: Path, sample: str, size: tuple[int, int]) -> None:
    """One layer of a block as release 0.9.4 wrote it; the others dense."""
    hidden, intermediate = size
    heads = 4 if hidden == 64 else 6
    model = make_llama(hidden_size=hidden, intermediate_size=intermediate, num_attention_heads=heads)
    layer = "model.layers.1.mlp.up_proj"
    stored = load_file(SAMPLES / f"{sample}.safetensors")
    model.get_submodule(layer).weight.copy_(stored.pop("expected"))
    directory = save(model, tmp_path)
    tensors = load_file(directory / "model.safetensors")
    del tensors[f"{layer}.weight"]
    tensors |= {name.replace("layer.", f"{layer}."): tensor for name, tensor in stored.items()}
    save_file(tensors, directory / "model.safetensors")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="20 of 21 linear layers are not 2:4")
        llm = LLM(directory, device="cpu", dtype="float32")
    assert llm.model.report.linears[f"{layer}.weight"].kind == "2:4" and llm.model.report.count("dense") == 20
    assert_same_tokens(llm, model)


def assert_same_tokens(llm: LLM, model: torch.nn.Module) -> None:
    prompt = random_prompts([11])[0]
    tokens = llm.generate([prompt], SamplingParams(max_new_tokens=12, ignore_eos=True))[0].token_ids
    assert list(tokens) == greedy_reference(model, prompt, 12, eos_token_id=None)
