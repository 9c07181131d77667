"""The one door to a kernel: operators, their CPU reference, and the choice between implementations."""

from sparsert.ops.activation import ACTIVATIONS, activate
from sparsert.ops.attention import AttentionShape, decode_attention, explain_attention, rotate, split_heads
from sparsert.ops.choice import BACKENDS, CAPABILITIES, Capability, Choice
from sparsert.ops.linear24 import explain, linear24, linear24_activate
from sparsert.ops.norm import residual_norm
from sparsert.ops.pack import pack, unpack

__all__ = [
    "ACTIVATIONS",
    "BACKENDS",
    "CAPABILITIES",
    "AttentionShape",
    "Capability",
    "Choice",
    "activate",
    "decode_attention",
    "explain",
    "explain_attention",
    "linear24",
    "linear24_activate",
    "pack",
    "residual_norm",
    "rotate",
    "split_heads",
    "unpack",
]
