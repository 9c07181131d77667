"""Tiny checkpoints in our format, written tensor by tensor, without the code under test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tiny_llama import BLOCK_LINEARS, magnitude_prune_, make_llama
from torch import Tensor

from sparsert.formats import pack_reference, to_bitmask

RECORD = {
    "quant_method": "sparsert",
    "format": "sparse-24-bitmask",
    "version": 1,
    "sparsity_structure": "2:4",
    "targets": ["Linear"],
    "ignore": ["lm_head"],
    "provenance": {"method": "of another tool", "date": "2026-01-01"},
}


def pruned_llama(dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A tiny random Llama with 2:4 zeros in its block linears."""
    model = make_llama(**changes)
    magnitude_prune_(model)
    return model.to(dtype)


def write_packed(model: Any, directory: Path, *, shards: int = 1) -> dict[str, Tensor]:
    """Write ``model`` in our format; return the tensors written."""
    model.save_pretrained(directory)
    (directory / "model.safetensors").unlink()
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        layer = name.removesuffix(".weight")
        if layer.rpartition(".")[2] in BLOCK_LINEARS:
            tensors.update({f"{layer}.{part}": value for part, value in to_bitmask(pack_reference(tensor)).items()})
        elif name not in tied:
            tensors[name] = tensor.clone()
    if shards == 1:
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    else:
        # dealt in turn, so that the three tensors of a layer lie in different files
        files = {
            name: f"model-{1 + index % shards:05}-of-{shards:05}.safetensors" for index, name in enumerate(tensors)
        }
        for file in set(files.values()):
            part = {name: tensor for name, tensor in tensors.items() if files[name] == file}
            save_file(part, directory / file, metadata={"format": "pt"})
        (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "quantization_config": RECORD}))
    return tensors
