"""Rotary position embedding: frequencies, and cosines and sines by position.

Cosines and sines are computed in fp32 once for all positions that a cache can hold and kept in the
model's dtype, so a decode step only gathers rows. The sign of the rotation is folded into the sine
table:

    (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin)  =  x * (cos, cos) + roll(x, D/2) * (-sin, sin)

which makes one roll, one product and one fused multiply-add of what is otherwise five steps.

Source: Su et al., "RoFormer" (2021); pairing of halves, linear and llama3 stretching as in
transformers (``modeling_rope_utils``), whose numbers these are.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from sparsert.models.config import RopeConfig


def inverse_frequencies(rope: RopeConfig, rotary_dim: int) -> Tensor:
    """Radians per position of each pair: fp32 ``[rotary_dim // 2]`` on the CPU."""
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float32, device="cpu") / rotary_dim
    frequencies = 1.0 / (rope.theta**exponents)
    if rope.kind == "default":
        return frequencies
    if rope.kind == "linear":
        return frequencies / rope.factor
    return _stretch_llama3(frequencies, rope)


def _stretch_llama3(frequencies: Tensor, rope: RopeConfig) -> Tensor:
    """Stretch long wavelengths by ``factor``, leave short ones, blend in between."""
    original = rope.original_max_position_embeddings
    wavelengths = 2 * math.pi / frequencies  # in tokens
    share_unchanged = (original / wavelengths - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    stretched = frequencies / rope.factor
    blended = (1 - share_unchanged) * stretched + share_unchanged * frequencies
    result = torch.where(wavelengths > original / rope.low_freq_factor, stretched, blended)
    return torch.where(wavelengths < original / rope.high_freq_factor, frequencies, result)


class RotaryEmbedding(nn.Module):
    """Cosine and sine tables for positions ``0 .. length - 1``.

    Attributes:
        cosine: ``[length, rotary_dim]``, both halves equal.
        signed_sine: ``[length, rotary_dim]``, the first half negated.
    """

    cosine: Tensor
    signed_sine: Tensor

    def __init__(self, rope: RopeConfig, rotary_dim: int) -> None:
        """Make empty tables.

        Args:
            rope: the frequencies.
            rotary_dim: dimensions of a head that are turned; even.
        """
        super().__init__()
        self.rope = rope
        self.rotary_dim = rotary_dim
        self.register_buffer("cosine", torch.empty(0, rotary_dim), persistent=False)
        self.register_buffer("signed_sine", torch.empty(0, rotary_dim), persistent=False)

    @property
    def length(self) -> int:
        """Positions that the tables hold."""
        return self.cosine.shape[0]

    def reserve_(self, length: int, device: torch.device, dtype: torch.dtype) -> None:
        """Make the tables hold at least ``length`` positions; tables that do are left where they are."""
        if length <= self.length and self.cosine.device == device and self.cosine.dtype == dtype:
            return
        positions = torch.arange(length, dtype=torch.float32, device="cpu")
        angles = torch.outer(positions, inverse_frequencies(self.rope, self.rotary_dim))
        cosine, sine = angles.cos(), angles.sin()
        self.cosine = torch.cat([cosine, cosine], dim=-1).to(device=device, dtype=dtype)
        self.signed_sine = torch.cat([-sine, sine], dim=-1).to(device=device, dtype=dtype)

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of the tables.

        Args:
            positions: int64 ``[batch, tokens]``, each below :attr:`length`.

        Returns:
            Cosines and signed sines, each ``[batch, tokens, 1, rotary_dim]``, to broadcast over heads.
        """
        return self.cosine[positions].unsqueeze(2), self.signed_sine[positions].unsqueeze(2)

    def first(self, tokens: int) -> tuple[Tensor, Tensor]:
        """The tables of positions ``0 .. tokens - 1``, each ``[1, tokens, 1, rotary_dim]``."""
        return self.cosine[None, :tokens, None], self.signed_sine[None, :tokens, None]
