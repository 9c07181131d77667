"""Models that can be measured by name, with random weights: what stands in their ``config.json``.

The shapes of single layers follow from the same (:mod:`sparsert.bench.shapes`). ``tiny`` is no real model: it has
the shape of one and runs in milliseconds on a CPU, for tests.
"""

from __future__ import annotations

import copy
from typing import Any

from sparsert.errors import InputError
from sparsert.schedule import LayerPlan, guarded_blocks, parse_block_list

_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def _config(
    family: str,
    depth: int,
    hidden: int,
    intermediate: int,
    heads: tuple[int, int, int],
    vocabulary: int,
    positions: int,
    **more: Any,
) -> dict[str, Any]:
    """Content of a config.json; ``heads``: query heads, key/value heads, width of a head."""
    return {
        "architectures": [f"{family}ForCausalLM"],
        "model_type": "gemma3_text" if family == "Gemma3" else family.lower(),
        "num_hidden_layers": depth,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "head_dim": heads[2],
        "vocab_size": vocabulary,
        "max_position_embeddings": positions,
        "tie_word_embeddings": False,
        **more,
    }


_LLAMA: dict[str, Any] = {"hidden_act": "silu", "rms_norm_eps": 1e-5, "bos_token_id": 1, "eos_token_id": 2}


def _plain_rope(theta: float) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta}


#: Source: each model's config.json; the Minitron sizes also in Muralidharan et al. (2024) and Sreenivas et al. (2024).
_CONFIGS: dict[str, dict[str, Any]] = {
    "llama-2-7b": _config(
        "Llama", 32, 4096, 11008, (32, 32, 128), 32000, 4096, rope_parameters=_plain_rope(1e4), **_LLAMA
    ),
    "llama-2-13b": _config(
        "Llama", 40, 5120, 13824, (40, 40, 128), 32000, 4096, rope_parameters=_plain_rope(1e4), **_LLAMA
    ),
    "llama-3.1-8b": _config(
        "Llama", 32, 4096, 14336, (32, 8, 128), 128256, 131072, rope_parameters=_LLAMA3_ROPE, **_LLAMA
    ),
    "llama-3.2-1b": _config(
        "Llama", 16, 2048, 8192, (32, 8, 64), 128256, 131072,
        rope_parameters=_LLAMA3_ROPE | {"factor": 32.0}, tie_word_embeddings=True, **_LLAMA,
    ),
    "smollm2-135m": _config(
        "Llama", 30, 576, 1536, (9, 3, 64), 49152, 8192,
        rope_parameters=_plain_rope(1e5), tie_word_embeddings=True, **_LLAMA,
    ),
    "tiny": _config("Llama", 8, 64, 128, (2, 1, 32), 512, 4096, rope_parameters=_plain_rope(1e4), **_LLAMA),
    "mistral-7b": _config(
        "Mistral", 32, 4096, 14336, (32, 8, 128), 32000, 32768,
        rms_norm_eps=1e-5, rope_theta=10000.0, sliding_window=4096, bos_token_id=1, eos_token_id=2,
    ),
    "qwen2.5-7b": _config(
        "Qwen2", 28, 3584, 18944, (28, 4, 128), 152064, 131072,
        rms_norm_eps=1e-6, rope_theta=1e6, use_sliding_window=False, bos_token_id=151643, eos_token_id=151643,
    ),
    "qwen3-8b": _config(
        "Qwen3", 36, 4096, 12288, (32, 8, 128), 151936, 40960,
        rms_norm_eps=1e-6, rope_theta=1e6, use_sliding_window=False, bos_token_id=151643, eos_token_id=151645,
    ),
    "gemma-2-9b": _config(
        "Gemma2", 42, 3584, 14336, (16, 8, 256), 256000, 8192,
        rms_norm_eps=1e-6, rope_theta=10000.0, sliding_window=4096, query_pre_attn_scalar=256,
        attn_logit_softcapping=50.0, final_logit_softcapping=30.0, tie_word_embeddings=True,
        bos_token_id=2, eos_token_id=1,
    ),
    "gemma-3-1b": _config(
        "Gemma3", 26, 1152, 6912, (4, 1, 256), 262144, 32768,
        rms_norm_eps=1e-6, rope_theta=1e6, rope_local_base_freq=10000.0, sliding_window=512,
        sliding_window_pattern=6, query_pre_attn_scalar=256, tie_word_embeddings=True, bos_token_id=2, eos_token_id=1,
    ),
    "minitron-4b": _config(
        "Nemotron", 32, 3072, 9216, (24, 8, 128), 256000, 4096,
        norm_eps=1e-5, rope_theta=10000.0, partial_rotary_factor=0.5, bos_token_id=2, eos_token_id=3,
    ),
    "minitron-8b": _config(
        "Nemotron", 32, 4096, 16384, (48, 8, 128), 256000, 4096,
        norm_eps=1e-5, rope_theta=10000.0, partial_rotary_factor=0.5, bos_token_id=2, eos_token_id=3,
    ),
    "llama-3.1-minitron-4b-width": _config(
        "Llama", 32, 3072, 9216, (32, 8, 128), 128256, 131072,
        rms_norm_eps=1e-5, rope_parameters=_LLAMA3_ROPE, bos_token_id=128000, eos_token_id=128001,
    ),
    "llama-3.1-minitron-4b-depth": _config(
        "Llama", 16, 4096, 14336, (32, 8, 128), 128256, 131072,
        rms_norm_eps=1e-5, rope_parameters=_LLAMA3_ROPE, bos_token_id=128000, eos_token_id=128001,
    ),
}  # fmt: skip

ARCHITECTURES = tuple(_CONFIGS)


def hf_config(name: str) -> dict[str, Any]:
    """Content of the ``config.json`` of a named architecture.

    Args:
        name: one of :data:`ARCHITECTURES`.

    Raises:
        InputError: another name.

    Example:
        >>> hf_config("llama-3.1-8b")["num_hidden_layers"]
        32
    """
    if name not in _CONFIGS:
        raise InputError(f"--arch {name}: known are {', '.join(ARCHITECTURES)}; give other models with --model")
    return copy.deepcopy(_CONFIGS[name])


def choose_blocks(text: str | None, num_blocks: int, *, force: bool = False) -> tuple[int, ...]:
    """The blocks that ``--remove-blocks`` names.

    Args:
        text: a lone number is a count: so many blocks, the last ones in front of the guarded last two, where
            depth pruning takes most of its blocks. Anything else is a list such as ``21-25,27``; one block
            alone is written ``8-8``. None removes nothing.
        num_blocks: blocks of the unpruned model.
        force: also allow the guarded blocks (0-3 and the last two) in a list.

    Returns:
        Block numbers, ascending.

    Raises:
        InputError: a list that cannot be read or that names a guarded block, or a count beyond what can go.

    Example:
        >>> choose_blocks("3", 32), choose_blocks("21-22", 32)
        ((27, 28, 29), (21, 22))

    Source: Kim et al., "Shortened LLaMA" (2024), section 3: blocks 0-3 and the last two stay.
    """
    if text is None:
        return ()
    if not text.strip().isdecimal():
        return LayerPlan.remove(num_blocks, parse_block_list(text), force=force).removed
    guarded = guarded_blocks(num_blocks)
    candidates = [block for block in range(num_blocks) if block not in guarded]
    count = int(text)
    if count > len(candidates):
        raise InputError(
            f"--remove-blocks {text}: of {num_blocks} blocks at most {len(candidates)} can go, since 0-3 and the last "
            "two stay; give a smaller count, or a list such as 8-12"
        )
    return tuple(candidates[len(candidates) - count :])
