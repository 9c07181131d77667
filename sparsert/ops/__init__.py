"""The one door to a kernel: operators, their CPU reference, and the choice between implementations."""

from sparsert.ops.activation import ACTIVATIONS, activate
from sparsert.ops.attention import (
    AttentionShape,
    decode_attention,
    explain_attention,
    keep_heads,
    masked_attention,
    rotate,
    split_heads,
)
from sparsert.ops.choice import BACKENDS, CAPABILITIES, Capability, Choice
from sparsert.ops.dense import dense_linear
from sparsert.ops.linear24 import explain, fuses24, linear24, linear24_close, linear24_open
from sparsert.ops.masked_weight import CANDIDATES, candidate_masks, hard_mask, masked_weight
from sparsert.ops.norm import DeferredNorm, residual_norm
from sparsert.ops.pack import pack, pack_bitmask, pack_bitmask_unchecked, pack_if_24, refuse_bitmask, unpack
from sparsert.ops.prompt_attention import (
    PackedTexts,
    causal_attention,
    explain_packed_attention,
    packed_attention,
)
from sparsert.ops.tiles import Tiled, to_rows
from sparsert.ops.token_loss import token_loss_

__all__ = [
    "ACTIVATIONS",
    "BACKENDS",
    "CANDIDATES",
    "CAPABILITIES",
    "AttentionShape",
    "Capability",
    "Choice",
    "DeferredNorm",
    "PackedTexts",
    "Tiled",
    "activate",
    "candidate_masks",
    "causal_attention",
    "decode_attention",
    "dense_linear",
    "explain",
    "explain_attention",
    "explain_packed_attention",
    "fuses24",
    "hard_mask",
    "keep_heads",
    "linear24",
    "linear24_close",
    "linear24_open",
    "masked_attention",
    "masked_weight",
    "pack",
    "pack_bitmask",
    "pack_bitmask_unchecked",
    "pack_if_24",
    "packed_attention",
    "refuse_bitmask",
    "residual_norm",
    "rotate",
    "split_heads",
    "to_rows",
    "token_loss_",
    "unpack",
]
