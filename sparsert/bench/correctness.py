"""The check that stands beside every speed-up: does the engine compute what the weights say?

A few random texts go through the engine as they are measured, prompt first and then token by token, with
the packed kernels and CUDA graphs of that batch. The logits are held against a forward that is written out
here in plain torch operations over unpacked weights, once in fp64 and once in the model's own dtype:

    error        rms(engine - fp64) / rms(fp64)
    torch_error  rms(plain torch in the same dtype - fp64) / rms(fp64)
    correct      error <= 2 x torch_error

The plain forward takes one block at a time to fp64, so that a model needs one block's memory beside itself.
What it gives up: some two dozen tokens say nothing about contexts of thousands.

Source: the rule of twice the error is that of flash-attention's tests.
"""

from __future__ import annotations

import dataclasses
import random
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from sparsert import ops
from sparsert.engine.runner import Runner
from sparsert.models.linears import LinearGroup
from sparsert.models.rope import inverse_frequencies
from sparsert.nn import SparseLinear

if TYPE_CHECKING:
    from sparsert.models import DecoderConfig, DecoderModel

_PROMPT_TOKENS = 16
_DECODE_STEPS = 8

#: How much larger than torch's own error ours may be.
ERROR_FACTOR = 2.0

HOW_CHECKED = (
    f"logits of {_PROMPT_TOKENS} prompt tokens and {_DECODE_STEPS} decode steps against the same weights unpacked in "
    f"fp64; rms error at most {ERROR_FACTOR:g} x that of plain torch in the same dtype"
)


@dataclasses.dataclass(frozen=True)
class LogitsCheck:
    """How far the engine's logits are from those in fp64.

    Attributes:
        error, torch_error: rms error of the engine, and of plain torch in the same dtype, relative to the
            logits' rms.
    """

    error: float
    torch_error: float

    @property
    def correct(self) -> bool:
        """Whether the engine is as exact as the rule asks for; never for an error that is not finite."""
        return self.error <= ERROR_FACTOR * self.torch_error

    def to_dict(self) -> dict[str, Any]:
        """As a row of a record holds it."""
        return {"correct": self.correct, "error": self.error, "torch_error": self.torch_error, "check": HOW_CHECKED}


class LogitsReference:
    """Logits of some random texts in fp64 and in the model's dtype, made once for all batch sizes."""

    def __init__(self, model: DecoderModel, rows: int, seed: int = 0) -> None:
        """Run the plain forwards.

        Args:
            model: whose weights are used; packed ones are unpacked a layer at a time.
            rows: texts, at least the largest batch to be checked.
            seed: of the texts.
        """
        draw = random.Random(seed)
        tokens = _PROMPT_TOKENS + _DECODE_STEPS
        self._model = model
        self._tokens = [[draw.randrange(model.config.vocab_size) for _ in range(tokens)] for _ in range(rows)]
        there = torch.tensor(self._tokens, device=model.device)
        # on the host: what is measured between two checks must not find them on the device
        self._exact = plain_logits(model, there, torch.float64)[:, _PROMPT_TOKENS - 1 :].cpu()
        self._torch = plain_logits(model, there, model.dtype)[:, _PROMPT_TOKENS - 1 :].double().cpu()

    def check(self, batch: int) -> LogitsCheck:
        """Run the first ``batch`` texts through the engine and compare."""
        model = self._model
        runner = Runner(model, _PROMPT_TOKENS + _DECODE_STEPS)
        rows = self._tokens[:batch]
        logits = [runner.prefill([row[:_PROMPT_TOKENS] for row in rows], len(rows[0])).double().cpu()]
        for step in range(_PROMPT_TOKENS, len(rows[0])):
            tokens = torch.tensor([row[step] for row in rows], device=model.device)
            logits.append(runner.decode(tokens, step).double().cpu())  # a copy: the next step overwrites it
        exact = self._exact[:batch]
        scale = _rms(exact)
        return LogitsCheck(
            error=_rms(torch.stack(logits, dim=1) - exact) / scale,
            torch_error=_rms(self._torch[:batch] - exact) / scale,
        )


@torch.inference_mode()
def plain_logits(model: DecoderModel, tokens: Tensor, dtype: torch.dtype) -> Tensor:
    """Logits by plain torch operations over unpacked weights, without the engine and the model's own forward.

    Args:
        model: whose weights and configuration are used.
        tokens: int64 ``[batch, tokens]`` on the model's device.
        dtype: of all weights and activations; norms are in fp32, or in fp64 if this is it.

    Returns:
        ``[batch, tokens, vocabulary]`` in ``dtype``.
    """
    config = model.config
    cosine, sine = _rotary_tables(config, tokens.shape[1], model.device, dtype)
    x = functional.embedding(tokens, model.embed_tokens.weight).to(dtype)
    for module in model.blocks:
        block: Any = module
        normed = _norm(x, block.input_layernorm.weight, config.rms_norm_eps)
        q, k, v = (
            _linear(block.self_attn.qkv_proj, normed)
            .unflatten(-1, (-1, config.head_dim))
            .split([config.num_heads, config.num_kv_heads, config.num_kv_heads], dim=2)
        )
        attended = functional.scaled_dot_product_attention(
            _turn(q, cosine, sine).transpose(1, 2),
            _repeat(_turn(k, cosine, sine), config).transpose(1, 2),
            _repeat(v, config).transpose(1, 2),
            is_causal=True,
        )
        x = x + _linear(block.self_attn.o_proj, attended.transpose(1, 2).flatten(-2))
        gate, up = _linear(
            block.mlp.gate_up_proj, _norm(x, block.post_attention_layernorm.weight, config.rms_norm_eps)
        ).chunk(2, dim=-1)
        x = x + _linear(block.mlp.down_proj, functional.silu(gate) * up)
    return _linear(model.lm_head, _norm(x, model.norm.weight, config.rms_norm_eps))


def _linear(module: nn.Module, x: Tensor) -> Tensor:
    if isinstance(module, LinearGroup):
        parts = [module.joined] if module.joined is not None else list(module.parts.values())
        y = torch.cat([_linear(part, x) for part in parts], dim=-1)
        return y.unflatten(-1, (-1, 2, 16)).transpose(-2, -3).flatten(-3) if module.interleaved else y
    layer: Any = module
    weight = ops.unpack(module.packed()) if isinstance(module, SparseLinear) else layer.weight
    bias = layer.bias.to(x.dtype) if layer.bias is not None else None
    return functional.linear(x, weight.to(x.dtype), bias)


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x if x.dtype == torch.float64 else x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight.to(x.dtype) * wide.to(x.dtype)


def _rotary_tables(
    config: DecoderConfig, length: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosines and sines ``[length, 1, head_dim / 2]``, computed in fp32 at least."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    frequencies = inverse_frequencies(config.rope, config.head_dim).to(wide)
    angles = torch.outer(torch.arange(length, dtype=wide), frequencies).unsqueeze(1)
    return angles.cos().to(device, dtype), angles.sin().to(device, dtype)


def _turn(heads: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    first, second = heads.chunk(2, dim=-1)
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1)


def _repeat(heads: Tensor, config: DecoderConfig) -> Tensor:
    return heads.repeat_interleave(config.num_heads // config.num_kv_heads, dim=2)


def _rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())
