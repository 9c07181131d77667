"""A decoder forward in plain torch operations over unpacked weights: what the engine is held against.

It shares nothing with the engine but weights and configuration: no operator of sparsert, no fused addition and
norm, no cache, attention as a matrix of scores. So it is slow, and it is short enough to be read beside the
formulas. Weights go to the wanted dtype one at a time, a block needs one layer's memory beside the model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from sparsert import ops
from sparsert.models.linears import LinearGroup
from sparsert.models.rope import inverse_frequencies
from sparsert.nn import SparseLinear

if TYPE_CHECKING:
    from sparsert.models import DecoderModel
    from sparsert.models.config import AttentionConfig, MLPConfig


@torch.inference_mode()
def plain_logits(model: DecoderModel, tokens: Tensor, dtype: torch.dtype) -> Tensor:
    """Logits of all tokens.

    Args:
        model: whose weights, configuration and layer plan are used.
        tokens: int64 ``[batch, tokens]`` on the model's device.
        dtype: of all weights and activations; norms and softmax are in fp32, or in fp64 if this is it.

    Returns:
        ``[batch, tokens, vocabulary]`` in ``dtype``.
    """
    config = model.config
    x = functional.embedding(tokens, model.embed_tokens.weight).to(dtype)
    if config.embedding_scale is not None:
        # rounded as the model rounds it: the factor is part of the weights that are compared
        x = x * torch.tensor(config.embedding_scale, dtype=model.dtype).to(x)
    for module in model.blocks:
        block: Any = module
        running = config.running(block.index, model.plan)
        if running.attention is not None:
            attended = _attend(block.self_attn, running.attention, _norm(block.attention_norm, x))
            x = x + (_norm(block.attention_post_norm, attended) if config.post_norms else attended)
        if running.mlp is not None:
            fed = _feed(block.mlp, running.mlp, _norm(block.mlp_norm, x))
            x = x + (_norm(block.mlp_post_norm, fed) if config.post_norms else fed)
    logits = _linear(model.lm_head, _norm(model.norm, x))
    cap = config.logit_softcap
    return logits if cap is None else cap * torch.tanh(logits / cap)


def _attend(layer: Any, config: AttentionConfig, x: Tensor) -> Tensor:
    shape, length = config.shape, x.shape[1]
    wide = _wide(x.dtype)
    heads = _linear(layer.qkv_proj, x).unflatten(-1, (-1, shape.head_dim)).transpose(1, 2)
    q, k, v = heads.split([shape.num_heads, shape.num_kv_heads, shape.num_kv_heads], dim=1)
    if config.head_norms:
        q, k = _rms_norm(q, layer.q_norm, shape.norm_eps), _rms_norm(k, layer.k_norm, shape.norm_eps)
    positions = torch.arange(length, device=x.device)
    angles = torch.outer(positions.to(wide), inverse_frequencies(config.rope, shape.rotary_dim).to(x.device, wide))
    q, k = _turn(q, angles), _turn(k, angles)
    group = shape.num_heads // shape.num_kv_heads
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scores = (q @ k.transpose(-1, -2)).to(wide) * shape.scale
    if shape.softcap is not None:
        scores = shape.softcap * torch.tanh(scores / shape.softcap)
    distance = positions[:, None] - positions
    hidden = distance < 0
    if shape.sliding_window is not None:
        hidden |= distance >= shape.sliding_window
    shares = scores.masked_fill(hidden, -torch.inf).softmax(-1).to(x.dtype)
    return _linear(layer.o_proj, (shares @ v).transpose(1, 2).flatten(-2))


def _feed(layer: Any, config: MLPConfig, x: Tensor) -> Tensor:
    inner = _linear(layer.gate_up_proj, x)
    first, up = inner.chunk(2, dim=-1) if config.gated else (inner, None)
    if config.activation == "silu":
        first = functional.silu(first)
    elif config.activation == "relu2":
        first = functional.relu(first).square()
    else:
        first = functional.gelu(first, approximate="tanh" if config.activation == "gelu_tanh" else "none")
    return _linear(layer.down_proj, first if up is None else first * up)


def _linear(module: nn.Module, x: Tensor) -> Tensor:
    if isinstance(module, LinearGroup):
        parts = [module.joined] if module.joined is not None else list(module.parts.values())
        y = torch.cat([_linear(part, x) for part in parts], dim=-1)
        # gate and up may take turns, 16 outputs each
        return y.unflatten(-1, (-1, 2, 16)).transpose(-2, -3).flatten(-3) if module.interleaved else y
    layer: Any = module
    weight = ops.unpack(module.packed()) if isinstance(module, SparseLinear) else layer.weight
    bias = layer.bias.to(x.dtype) if layer.bias is not None else None
    return functional.linear(x, weight.to(x.dtype), bias)


def _norm(norm: Any, x: Tensor) -> Tensor:
    if not norm.centered:
        return _rms_norm(x, norm.weight, norm.eps)
    wide = _wide(x.dtype)
    return functional.layer_norm(x.to(wide), x.shape[-1:], norm.weight.to(wide), norm.bias.to(wide), norm.eps).to(x)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.to(_wide(x.dtype))
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if weight.dtype == torch.float32:
        return (weight.to(wide) * wide).to(x)
    return weight.to(x) * wide.to(x)


def _turn(heads: Tensor, angles: Tensor) -> Tensor:
    """``heads: [batch, heads, tokens, head_dim]``, ``angles: [tokens, rotary_dim / 2]``; what is beyond stays."""
    cosine, sine = angles.cos().to(heads.dtype), angles.sin().to(heads.dtype)
    half = angles.shape[-1]
    first, second, rest = heads.split([half, half, heads.shape[-1] - 2 * half], dim=-1)
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine, rest], dim=-1)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
