"""Small hand-made checkpoints: the file readers need no model, only names, shapes and bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

HIDDEN, FFN, VOCAB, BLOCKS = 24, 40, 52, 8


def tiny_config(**changes: Any) -> dict[str, Any]:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": BLOCKS,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "vocab_size": VOCAB,
        "eos_token_id": 2,
    }
    return {**config, **changes}


def tiny_tensors(dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        # the offset keeps exact zeros out
        return (torch.rand(*shape, generator=generator) + 0.01).to(dtype)

    tensors = {"model.embed_tokens.weight": random(VOCAB, HIDDEN), "model.norm.weight": random(HIDDEN)}
    for block in range(BLOCKS):
        prefix = f"model.layers.{block}."
        tensors[prefix + "input_layernorm.weight"] = random(HIDDEN)
        tensors[prefix + "self_attn.q_proj.weight"] = random(HIDDEN, HIDDEN)
        tensors[prefix + "self_attn.k_proj.weight"] = random(8, HIDDEN)
        tensors[prefix + "mlp.up_proj.weight"] = random(FFN, HIDDEN)
        tensors[prefix + "mlp.down_proj.weight"] = random(HIDDEN, FFN)
    return tensors


def write_sharded(directory: Path, tensors: dict[str, torch.Tensor], shards: int, kind: str = "safetensors") -> None:
    stem = "model" if kind == "safetensors" else "pytorch_model"
    names = list(tensors)
    weight_map: dict[str, str] = {}
    for number in range(shards):
        part = {name: tensors[name] for name in names[number::shards]}
        file = f"{stem}-{number + 1:05d}-of-{shards:05d}.{kind}"
        save_file(part, directory / file) if kind == "safetensors" else torch.save(part, directory / file)
        weight_map.update(dict.fromkeys(part, file))
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / f"{stem}.{kind}.index.json").write_text(json.dumps(index))
