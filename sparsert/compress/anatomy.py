"""The parts of a plain transformers model that pruning touches: blocks, their linear layers, embedding, norms, head.

Everything in this room works on models of transformers as they are, so that whatever else is built on those (peft,
accelerate, a trainer) goes on working. The families that sparsert runs are built alike: ``model.model`` holds
``embed_tokens``, ``layers`` and ``norm``, and the head is a linear layer beside it. This file finds the parts once and
says by name what is missing, instead of an ``AttributeError`` somewhere in the middle of a run.

What it gives up: models of other shapes (encoder and decoder, several embeddings, mixtures of experts, scaled logits).
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from torch import Tensor, nn

from sparsert.errors import UnsupportedError

#: Keys of a configuration that scale logits or the stream in ways the losses here do not compute.
_REFUSED_KEYS = ("logits_scaling", "logit_scale", "residual_multiplier", "num_experts", "num_local_experts")

_BLOCK_NAME = re.compile(r"(?:^|\.)layers\.(\d+)\.")


@dataclasses.dataclass(frozen=True)
class Anatomy:
    """Where the parts of a model are; nothing is copied.

    Attributes:
        model: the causal language model.
        body: what turns token ids into normed hidden states.
        body_name: name of the body inside the model, ``"model"`` as a rule.
        blocks: the transformer blocks in order.
        embedding: the token embedding ``[vocabulary, hidden]``.
        final_norm: the norm in front of the head.
        head: the linear layer ``[vocabulary, hidden]`` that makes logits; may share the embedding's weight.
        logit_softcap: logits become ``softcap * tanh(logit / softcap)``; None: they stay.
    """

    model: nn.Module
    body: nn.Module
    body_name: str
    blocks: nn.ModuleList
    embedding: nn.Embedding
    final_norm: nn.Module
    head: nn.Linear
    logit_softcap: float | None

    @property
    def num_blocks(self) -> int:
        """How many blocks the model has."""
        return len(self.blocks)

    @property
    def config(self) -> Any:
        """The model's configuration object."""
        return self.model.config

    @property
    def tied(self) -> bool:
        """Whether the head uses the embedding's matrix."""
        return self.head.weight is self.embedding.weight

    def block_linears(self) -> dict[str, nn.Linear]:
        """Linear layers of the blocks by their name in the model, block by block, in the order of definition."""
        prefix = f"{self.body_name}.layers"
        return {
            f"{prefix}.{index}.{name}": module
            for index, block in enumerate(self.blocks)
            for name, module in block.named_modules()
            if isinstance(module, nn.Linear)
        }

    def hidden(self, tokens: Tensor) -> Tensor:
        """Normed hidden states in front of the head: ``[batch, length, hidden]`` of ids ``[batch, length]``."""
        states: Tensor = self.body(input_ids=tokens, use_cache=False).last_hidden_state
        return states


def anatomy_of(model: nn.Module) -> Anatomy:
    """Find the parts of a causal language model of transformers.

    Args:
        model: an ``...ForCausalLM`` of a family that sparsert runs.

    Returns:
        Its parts.

    Raises:
        UnsupportedError: a part is missing or of another kind; the message names it.
    """
    name = type(model).__name__
    config: Any = getattr(model, "config", None)
    for key in _REFUSED_KEYS:
        if getattr(config, key, None):
            raise UnsupportedError(f"{name}: {key} is {getattr(config, key)!r}, which pruning here does not know")
    body_name = str(getattr(model, "base_model_prefix", "model") or "model")
    body: Any = getattr(model, body_name, None)
    found = {part: getattr(body, part, None) for part in ("layers", "embed_tokens", "norm")}
    found["head"] = getattr(model, "get_output_embeddings", lambda: None)()
    kinds = {"layers": nn.ModuleList, "embed_tokens": nn.Embedding, "norm": nn.Module, "head": nn.Linear}
    for part, kind in kinds.items():
        if not isinstance(found[part], kind):
            raise UnsupportedError(
                f"{name}: its {part} is {type(found[part]).__name__}, not {kind.__name__}; pruning works on "
                f"decoder-only models built like Llama (Mistral, Qwen 2 and 3, Gemma 2 and 3 text, Nemotron, Phi-3)"
            )
    parts: dict[str, Any] = dict(found)
    if parts["head"].bias is not None:
        raise UnsupportedError(f"{name}: its head adds a bias, which no family that sparsert runs has")
    softcap = getattr(config, "final_logit_softcapping", None)
    return Anatomy(
        model, body, body_name, parts["layers"], parts["embed_tokens"], parts["norm"], parts["head"], softcap
    )


def block_of(name: str) -> int | None:
    """Index of the block that a parameter or module of this name lies in; None if in none.

    Example:
        >>> block_of("model.layers.12.mlp.up_proj"), block_of("lm_head.weight")
        (12, None)
    """
    match = _BLOCK_NAME.search(name)
    return None if match is None else int(match[1])
