"""Tiny GGUF files: a Llama with fp32 and 8-bit weights, byte-level tokenizer and chat template; a Gemma 3."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

gguf: Any = pytest.importorskip("gguf")  # a GPU machine without a network may lack it

HIDDEN, FFN, BLOCKS, HEADS, KV_HEADS, HEAD_DIM, CONTEXT = 32, 64, 2, 4, 2, 8, 128
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"

_NAMES = {
    "attn_norm": ("input_layernorm", (HIDDEN,)),
    "attn_q": ("self_attn.q_proj", (HEADS * HEAD_DIM, HIDDEN)),
    "attn_k": ("self_attn.k_proj", (KV_HEADS * HEAD_DIM, HIDDEN)),
    "attn_v": ("self_attn.v_proj", (KV_HEADS * HEAD_DIM, HIDDEN)),
    "attn_output": ("self_attn.o_proj", (HIDDEN, HEADS * HEAD_DIM)),
    "ffn_norm": ("post_attention_layernorm", (HIDDEN,)),
    "ffn_gate": ("mlp.gate_proj", (FFN, HIDDEN)),
    "ffn_up": ("mlp.up_proj", (FFN, HIDDEN)),
    "ffn_down": ("mlp.down_proj", (HIDDEN, FFN)),
}


def vocabulary() -> list[str]:
    """The three special tokens, the 256 printable stand-ins of byte-level BPE, and three merges."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    return [*SPECIAL, *map(chr, plain), *(chr(256 + place) for place in range(len(others))), "he", "ll", "ĠĠ"]


def interleave_heads(weight: np.ndarray, heads: int) -> np.ndarray:
    """Hugging Face's order of query and key rows -> that of GGUF, as its writers do it."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def write_tiny_gguf(file: Path, *, architecture: str = "llama", extra: str | None = None) -> dict[str, torch.Tensor]:
    """Write the file; return the weights in Hugging Face's names and order, as fp32."""
    generator = np.random.default_rng(0)
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_block_count(BLOCKS)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(5000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(HEAD_DIM)
    tokens = vocabulary()
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL)))
    writer.add_token_merges(["h e", "l l", "Ġ Ġ"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)

    expected: dict[str, torch.Tensor] = {}

    def add(name: str, new_name: str, shape: tuple[int, ...]) -> None:
        weight = generator.standard_normal(shape, dtype=np.float32)
        if "ffn" in name and len(shape) == 2:
            blocks = gguf.quantize(weight, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(name, blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
            weight = gguf.dequantize(blocks, gguf.GGMLQuantizationType.Q8_0)
        elif "attn_q" in name or "attn_k" in name:
            writer.add_tensor(name, interleave_heads(weight, HEADS if "attn_q" in name else KV_HEADS))
        else:
            writer.add_tensor(name, weight)
        expected[new_name] = torch.from_numpy(weight)

    add("token_embd.weight", "model.embed_tokens.weight", (len(tokens), HIDDEN))
    add("output_norm.weight", "model.norm.weight", (HIDDEN,))
    for block in range(BLOCKS):
        for name, (new_name, shape) in _NAMES.items():
            add(f"blk.{block}.{name}.weight", f"model.layers.{block}.{new_name}.weight", shape)
    if extra is not None:
        writer.add_tensor(extra, np.ones(4, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


_GEMMA3_NAMES = {
    **{name: place for name, place in _NAMES.items() if name != "ffn_norm"},
    "attn_q_norm": ("self_attn.q_norm", (HEAD_DIM,)),
    "attn_k_norm": ("self_attn.k_norm", (HEAD_DIM,)),
    "post_attention_norm": ("post_attention_layernorm", (HIDDEN,)),
    "ffn_norm": ("pre_feedforward_layernorm", (HIDDEN,)),
    "post_ffw_norm": ("post_feedforward_layernorm", (HIDDEN,)),
}


def write_tiny_gemma3_gguf(file: Path) -> dict[str, torch.Tensor]:
    """A Gemma 3 with a tokenizer of whole words; norms hold one more, rows stand as they are."""
    generator = np.random.default_rng(0)
    writer = gguf.GGUFWriter(file, "gemma3")
    writer.add_block_count(BLOCKS)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(HEAD_DIM)
    writer.add_value_length(HEAD_DIM)
    writer.add_sliding_window(16)
    writer.add_rope_freq_base(1e6)
    writer.add_layer_norm_rms_eps(1e-6)
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "s", "e", "a"]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([float(-place) for place in range(len(tokens))])
    writer.add_token_types([3, 3, 3, 2, *[6] * 256, 1, 1, 1, 1])
    for add_token, token in (
        (writer.add_pad_token_id, 0), (writer.add_eos_token_id, 1), (writer.add_bos_token_id, 2),
        (writer.add_unk_token_id, 3),
    ):  # fmt: skip
        add_token(token)
    expected: dict[str, torch.Tensor] = {}

    def add(name: str, new_name: str, shape: tuple[int, ...]) -> None:
        # quarters: exact in bf16 with and without the one
        weight = np.round(4 * generator.standard_normal(shape, dtype=np.float32)) / 4
        expected[new_name] = torch.from_numpy(weight)
        writer.add_tensor(name, weight + 1 if len(shape) == 1 else weight)

    add("token_embd.weight", "model.embed_tokens.weight", (len(tokens), HIDDEN))
    add("output_norm.weight", "model.norm.weight", (HIDDEN,))
    for block in range(BLOCKS):
        for name, (new_name, shape) in _GEMMA3_NAMES.items():
            add(f"blk.{block}.{name}.weight", f"model.layers.{block}.{new_name}.weight", shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected
