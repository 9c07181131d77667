"""What a decoder is, as data: sizes, rope, biases, special tokens.

``config.json`` of a Hugging Face checkpoint is read once, checked, and turned into a frozen record, so
that nothing behind it asks a dictionary for a key that may be missing or spelt in the way of another
release. What the forward cannot compute is refused here, by name, before a tensor is read. What it
gives up: keys that do not change the forward (dropout, initialiser range, cache switches) are ignored.

Source: the configuration of ``LlamaForCausalLM`` in transformers 4 (``rope_theta``, ``rope_scaling``)
and 5 (``rope_parameters``); defaults of missing keys are those of its ``LlamaConfig``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from sparsert.errors import CheckpointError, UnsupportedError

#: Values of ``architectures[0]`` in config.json that can be run.
SUPPORTED_ARCHITECTURES = ("LlamaForCausalLM",)

SUPPORTED_ACTIVATIONS = ("silu",)

SUPPORTED_ROPE_TYPES = ("default", "linear", "llama3")

#: LlamaConfig's spelling of the activation that torch calls silu.
_ACTIVATION_ALIASES = {"swish": "silu"}


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding.

    Attributes:
        kind: one of :data:`SUPPORTED_ROPE_TYPES`.
        theta: base of the wavelengths.
        factor: by how much positions are stretched (linear, llama3).
        low_freq_factor, high_freq_factor: llama3: wavelengths above ``original / low`` tokens are
            stretched in full, those below ``original / high`` not at all, the rest in between.
        original_max_position_embeddings: llama3: context length of the model before stretching.
    """

    kind: str = "default"
    theta: float = 10000.0
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclasses.dataclass(frozen=True)
class LinearShape:
    """Shape of one linear layer of a block."""

    out_features: int
    in_features: int
    bias: bool


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """A decoder-only transformer.

    Attributes:
        architecture: the Hugging Face class name.
        hidden_size: width of the residual stream.
        num_blocks: transformer blocks in the checkpoint, before any is skipped.
        num_heads, num_kv_heads: query and key/value heads; the first is a multiple of the second.
        head_dim: width of one head; not always ``hidden_size / num_heads``.
        intermediate_size: width of the feed-forward layer.
        vocab_size: rows of the embedding and of the head.
        rms_norm_eps: added to the mean square in every norm.
        rope: rotary position embedding.
        tie_word_embeddings: the head uses the embedding's matrix.
        attention_bias, mlp_bias: whether the linear layers of that part add a bias.
        max_position_embeddings: longest sequence that the model was made for, in tokens.
        activation: of the gate.
        bos_token_id: first token of a text, if the model has one.
        eos_token_ids: tokens that end a text; may be empty.
    """

    architecture: str
    hidden_size: int
    num_blocks: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    rms_norm_eps: float
    rope: RopeConfig
    tie_word_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    max_position_embeddings: int
    activation: str
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> DecoderConfig:
        """Read the content of a ``config.json``.

        Raises:
            UnsupportedError: architecture, activation, rope type or quantisation that the forward does
                not compute; the message lists what it does.
            CheckpointError: a size is missing, of the wrong type, or contradicts another.
        """
        architecture = _architecture(config)
        _check_stored_plain(config)
        activation = config.get("hidden_act", "silu")
        activation = _ACTIVATION_ALIASES.get(activation, activation)
        _check_supported("hidden_act", activation, SUPPORTED_ACTIVATIONS)
        hidden_size = _size(config, "hidden_size")
        num_heads = _size(config, "num_attention_heads")
        num_kv_heads = _size(config, "num_key_value_heads", num_heads)
        if num_heads % num_kv_heads:
            raise CheckpointError(
                f"config.json: num_attention_heads {num_heads} is no multiple of num_key_value_heads {num_kv_heads}"
            )
        if config.get("head_dim") is None and hidden_size % num_heads:
            raise CheckpointError(
                f"config.json: hidden_size {hidden_size} is no multiple of num_attention_heads {num_heads} "
                f"and there is no head_dim; add it"
            )
        head_dim = _size(config, "head_dim", hidden_size // num_heads)
        if head_dim % 2:
            raise CheckpointError(f"config.json: head_dim {head_dim} is odd; rotary embeddings turn pairs")
        max_position_embeddings = _size(config, "max_position_embeddings", 2048)
        return cls(
            architecture=architecture,
            hidden_size=hidden_size,
            num_blocks=_size(config, "num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            intermediate_size=_size(config, "intermediate_size"),
            vocab_size=_size(config, "vocab_size"),
            rms_norm_eps=_number(config, "rms_norm_eps", 1e-6),
            rope=_rope(config, max_position_embeddings),
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            attention_bias=bool(config.get("attention_bias", False)),
            mlp_bias=bool(config.get("mlp_bias", False)),
            max_position_embeddings=max_position_embeddings,
            activation=activation,
            bos_token_id=next(iter(token_ids(config, "bos_token_id")), None),
            eos_token_ids=token_ids(config, "eos_token_id"),
        )

    def block_linears(self) -> dict[str, LinearShape]:
        """The linear layers of one block by their name inside the block, in the order they run."""
        attention, hidden = self.num_heads * self.head_dim, self.hidden_size
        key_value = self.num_kv_heads * self.head_dim
        return {
            "self_attn.q_proj": LinearShape(attention, hidden, self.attention_bias),
            "self_attn.k_proj": LinearShape(key_value, hidden, self.attention_bias),
            "self_attn.v_proj": LinearShape(key_value, hidden, self.attention_bias),
            "self_attn.o_proj": LinearShape(hidden, attention, self.attention_bias),
            "mlp.gate_proj": LinearShape(self.intermediate_size, hidden, self.mlp_bias),
            "mlp.up_proj": LinearShape(self.intermediate_size, hidden, self.mlp_bias),
            "mlp.down_proj": LinearShape(hidden, self.intermediate_size, self.mlp_bias),
        }


def token_ids(config: Mapping[str, Any], key: str) -> tuple[int, ...]:
    """Token ids under ``key``: absent, one number or a list of them.

    Raises:
        CheckpointError: anything else.
    """
    value = config.get(key)
    if value is None:
        return ()
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(entry, int) and not isinstance(entry, bool) for entry in values):
        raise CheckpointError(f"{key} is {value!r}; it must be a token id or a list of token ids")
    return tuple(values)


def _architecture(config: Mapping[str, Any]) -> str:
    names = config.get("architectures") or []
    if names:
        architecture = str(names[0])
    elif config.get("model_type") == "llama":
        # a configuration saved without its model names no class; Llama has one decoder only
        architecture = "LlamaForCausalLM"
    else:
        architecture = f"model_type {config.get('model_type')!r}"
    _check_supported("architecture", architecture, SUPPORTED_ARCHITECTURES)
    return architecture


def _check_stored_plain(config: Mapping[str, Any]) -> None:
    """Refuse weights that are not stored as plain tensors; a record of sparsity in plain tensors is fine."""
    quantization = config.get("quantization_config")
    if not quantization:
        return
    sparsity = quantization.get("sparsity_config") or {}
    if quantization.get("config_groups") or sparsity.get("format") != "dense":
        raise UnsupportedError(
            f"config.json: weights stored under quantization_config (method {quantization.get('quant_method')!r}) "
            f"cannot be loaded; give the checkpoint in bfloat16, float16 or float32, with zeros where it is pruned"
        )


def _check_supported(what: str, value: object, supported: tuple[str, ...]) -> None:
    if value not in supported:
        raise UnsupportedError(f"config.json: {what} {value} cannot be run; supported: {', '.join(supported)}")


def _number(config: Mapping[str, Any], key: str, default: float | None = None) -> float:
    value = config.get(key)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
        given = "is missing" if value is None else f"is {value!r}"
        raise CheckpointError(f"config.json: {key} {given}; a positive number is needed")
    return float(value)


def _size(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = _number(config, key, default)
    if value != int(value):
        raise CheckpointError(f"config.json: {key} is {value}; a whole number is needed")
    return int(value)


def _rope(config: Mapping[str, Any], max_position_embeddings: int) -> RopeConfig:
    parameters: dict[str, Any] = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    _check_supported("rope type", kind, SUPPORTED_ROPE_TYPES)
    for holder in (parameters, config):
        if holder.get("partial_rotary_factor", 1.0) != 1.0:
            raise UnsupportedError(
                f"config.json: partial_rotary_factor {holder['partial_rotary_factor']} cannot be run; supported: 1.0"
            )
    theta = _number(parameters, "rope_theta", _number(config, "rope_theta", 10000.0))
    if kind == "default":
        return RopeConfig(theta=theta)
    if kind == "linear":
        return RopeConfig(kind, theta, _number(parameters, "factor"))
    return RopeConfig(
        kind,
        theta,
        _number(parameters, "factor"),
        _number(parameters, "low_freq_factor"),
        _number(parameters, "high_freq_factor"),
        _size(parameters, "original_max_position_embeddings", max_position_embeddings),
    )
