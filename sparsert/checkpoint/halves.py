"""Which half of a block a tensor belongs to: its attention or its feed-forward layer, the norms around them included.

Norms are called after where they stand, and one name means two things: ``post_attention_layernorm`` stands in front of
the feed-forward layer in Llama and behind attention in Gemma, which has norms before and behind each half. So the
tables are kept here once, for whoever reads names and whoever leaves half of a block out.
"""

from __future__ import annotations

#: Norm by its purpose -> its name in checkpoints, where norms stand in front of each half alone.
PRE_NORMS = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}

#: The same where they stand in front and behind.
PRE_AND_POST_NORMS = {
    "attention_norm": "input_layernorm",
    "attention_post_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm",
}

_LAYERS = {"self_attn": "attention", "mlp": "mlp"}
_SANDWICHED = _LAYERS | {name: purpose.partition("_")[0] for purpose, name in PRE_AND_POST_NORMS.items()}
_IN_FRONT = _SANDWICHED | {name: purpose.partition("_")[0] for purpose, name in PRE_NORMS.items()}


def half_of(inside: str, *, post_norms: bool) -> str | None:
    """The half of a block that a tensor is part of.

    Args:
        inside: its name behind the number of the block, e.g. ``mlp.up_proj.weight``.
        post_norms: whether norms stand behind each half as well.

    Returns:
        ``attention``, ``mlp``, or None for a tensor of neither.

    Example:
        >>> [half_of("post_attention_layernorm.weight", post_norms=both) for both in (False, True)]
        ['mlp', 'attention']
    """
    return (_SANDWICHED if post_norms else _IN_FRONT).get(inside.partition(".")[0])
