"""Models that can be measured by name, with random weights: what stands in their ``config.json``.

Sizes of blocks are those of :mod:`sparsert.bench.shapes`; here stands what a whole model needs beside them.
``tiny`` is no real model: it has the shape of one and runs in milliseconds on a CPU, for tests.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from sparsert.bench.shapes import SIZES
from sparsert.errors import InputError
from sparsert.schedule import LayerPlan, guarded_blocks, parse_block_list


@dataclasses.dataclass(frozen=True)
class _Body:
    """What a model has beside the linear layers of its blocks."""

    num_blocks: int
    vocab_size: int
    max_position_embeddings: int
    rope_theta: float = 10000.0
    tied: bool = False
    llama3_rope_factor: float | None = None


#: Source: each model's config.json.
_BODIES = {
    "llama-2-7b": _Body(32, 32000, 4096),
    "llama-2-13b": _Body(40, 32000, 4096),
    "llama-3.1-8b": _Body(32, 128256, 131072, 500000.0, llama3_rope_factor=8.0),
    "llama-3.2-1b": _Body(16, 128256, 131072, 500000.0, tied=True, llama3_rope_factor=32.0),
    "smollm2-135m": _Body(30, 49152, 8192, 100000.0, tied=True),
    "tiny": _Body(8, 512, 4096),
}

ARCHITECTURES = tuple(_BODIES)


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
    if name not in _BODIES:
        raise InputError(f"--arch {name}: known are {', '.join(ARCHITECTURES)}; give other models with --model")
    sizes, body = SIZES[name], _BODIES[name]
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": body.rope_theta}
    if body.llama3_rope_factor is not None:
        rope |= {
            "rope_type": "llama3",
            "factor": body.llama3_rope_factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.intermediate,
        "num_hidden_layers": body.num_blocks,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "head_dim": sizes.head_dim,
        "vocab_size": body.vocab_size,
        "max_position_embeddings": body.max_position_embeddings,
        "rms_norm_eps": 1e-5,
        "rope_parameters": rope,
        "tie_word_embeddings": body.tied,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


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
