"""Tiny random Llama checkpoints and the transformers model they were saved from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY = 211

#: llama3 stretching whose three ranges all fall inside a short sequence.
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

BLOCK_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


#: Of a tiny model unless a test says otherwise: group 3, head_dim != hidden / heads, odd vocabulary.
SIZES: dict[str, Any] = {
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.12,
}


def make_llama(*, seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """A random model in fp32: 6 query heads in groups of 3, head_dim 24 != 96 / 6, odd vocabulary."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**{**SIZES, **changes})).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name:
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def magnitude_prune_(model: nn.Module) -> None:
    """Zero the two smallest of every four inputs in every block linear."""
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in BLOCK_LINEARS:
            groups = module.weight.view(-1, 4)
            groups.scatter_(1, groups.abs().argsort(dim=1)[:, :2], 0.0)


def delete_blocks_(model: LlamaForCausalLM, removed: tuple[int, ...]) -> None:
    """Delete blocks and renumber the rest, as depth pruning in transformers does."""
    layers = [layer for index, layer in enumerate(model.model.layers) if index not in removed]
    for index, layer in enumerate(layers):
        layer.self_attn.layer_idx = index
    model.model.layers = nn.ModuleList(layers)
    model.config.num_hidden_layers = len(layers)


def save(model: LlamaForCausalLM, directory: Path, **options: Any) -> Path:
    """Save as an ordinary checkpoint."""
    model.save_pretrained(directory, **options)
    return directory


def random_prompts(lengths: list[int], seed: int = 1) -> list[list[int]]:
    """Random token ids without special tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


def greedy_reference(model: LlamaForCausalLM, prompt: list[int], max_new_tokens: int, **options: Any) -> list[int]:
    """New tokens of ``transformers.generate`` for one prompt alone."""
    ids = torch.tensor([prompt])
    output: Tensor = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, do_sample=False, **options
    )
    return output[0, len(prompt) :].tolist()
