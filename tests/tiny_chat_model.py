"""A tiny Llama checkpoint with a byte-level tokenizer and a chat template, for the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny_llama import make_llama, save

BLOCKS = 8
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"


def save_tokenizer(directory: Path) -> int:
    """Write a tokenizer of three special tokens and one token a byte; return the size of its vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {token: index for index, token in enumerate([*special, *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    fast.chat_template = TEMPLATE
    fast.save_pretrained(directory)
    return len(vocabulary)


def save_chat_model(directory: Path, *, seed: int = 0, tokenizer: bool = True, **changes: Any) -> Path:
    """Write a random model of eight blocks; of these, 4 and 5 may be removed."""
    directory.mkdir(parents=True, exist_ok=True)
    vocabulary = save_tokenizer(directory) if tokenizer else 259
    model = make_llama(seed=seed, num_hidden_layers=BLOCKS, vocab_size=vocabulary, **changes)
    return save(model.to(torch.float32), directory)
