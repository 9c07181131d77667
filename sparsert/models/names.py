"""Where the tensors of a model stand in its checkpoint: names as data.

Inside sparsert a block's parts have one name each, whatever the family (``self_attn.q_proj``,
``attention_norm``). Checkpoints differ in three things: what the names of all tensors inside the model begin
with, what the norms are called (Gemma's ``post_attention_layernorm`` comes behind the attention, Llama's in front
of the feed-forward layer), and whether projections that read the same input are one tensor. Parts of such a
tensor are slices of its rows, so masks and 2:4 packing work part by part as they do elsewhere.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Container

from sparsert.checkpoint import block_of
from sparsert.checkpoint.halves import PRE_AND_POST_NORMS, PRE_NORMS, half_of
from sparsert.models.config import DecoderConfig
from sparsert.schedule import LayerPlan

#: Fused tensor -> the parts that its rows are, in order.
_FUSED = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
}


@dataclasses.dataclass(frozen=True)
class StoredLinear:
    """Where the weight of a linear layer stands.

    Attributes:
        tensor: name without ``.weight``.
        rows: of that tensor, ``(begin, end)``; None: all.
    """

    tensor: str
    rows: tuple[int, int] | None = None

    @property
    def label(self) -> str:
        """For people: the weight's name, with its rows if it is a part."""
        return f"{self.tensor}.weight" + (f"[{self.rows[0]}:{self.rows[1]}]" if self.rows is not None else "")


class TensorNames:
    """Names in one checkpoint.

    Attributes:
        embedding, norm, head: of what stands outside the blocks; ``norm`` without ``.weight``.
    """

    def __init__(self, config: DecoderConfig, names: Container[str] = ()) -> None:
        """Choose the beginning of names.

        Args:
            config: the model.
            names: of the checkpoint's tensors; default none, for names as they usually are.
        """
        prefixes = config.body_prefixes
        self._config = config
        self._body = next((prefix for prefix in prefixes if f"{prefix}norm.weight" in names), prefixes[0])
        outside = self._body.removesuffix("model.") if self._body.endswith(".model.") else ""
        self.embedding = f"{self._body}embed_tokens.weight"
        self.norm = f"{self._body}norm"
        self.head = f"{outside}lm_head.weight"

    def block_norm(self, block: int, name: str) -> str:
        """Name of a norm of :meth:`DecoderConfig.block_norms`, without ``.weight``."""
        stored = PRE_AND_POST_NORMS if self._config.post_norms else PRE_NORMS
        return f"{self._body}layers.{block}.{stored.get(name, name)}"

    def block_linear(self, block: int, name: str) -> StoredLinear:
        """Place of a linear layer of :meth:`DecoderConfig.block_linears`."""
        prefix = f"{self._body}layers.{block}."
        fused = next((tensor for tensor, parts in _FUSED.items() if name in parts), None)
        if not self._config.fused_tensors or fused is None:
            return StoredLinear(prefix + name)
        linears, begin = self._config.block_linears(block), 0
        for part in _FUSED[fused]:
            if part == name:
                break
            begin += linears[part].out_features
        return StoredLinear(prefix + fused, (begin, begin + linears[name].out_features))

    def expected(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all tensors but embedding and head, blocks that a plan skips included."""
        config = self._config
        shapes: dict[str, tuple[int, ...]] = {}

        def add_norm(name: str, width: int, *, bias: bool) -> None:
            shapes[f"{name}.weight"] = (width,)
            if bias:
                shapes[f"{name}.bias"] = (width,)

        add_norm(self.norm, config.hidden_size, bias=config.norm.centered)
        for block in range(config.num_blocks):
            for name, width in config.block_norms(block).items():
                add_norm(self.block_norm(block, name), width, bias=config.norm.centered)
            for name, shape in config.block_linears(block).items():
                stored = self.block_linear(block, name)
                # the last part of a fused tensor says how many rows there are
                rows = shape.out_features if stored.rows is None else stored.rows[1]
                shapes[f"{stored.tensor}.weight"] = (rows, shape.in_features)
                if shape.bias:
                    shapes[f"{stored.tensor}.bias"] = (rows,)
        return shapes

    def is_absent(self, name: str) -> bool:
        """Whether a tensor, which a checkpoint may hold, is of a layer that the configuration leaves out."""
        block = block_of(name)
        prefix = f"{self._body}layers.{block}."
        if block is None or block >= self._config.num_blocks or not name.startswith(prefix):
            return False
        layers = self._config.blocks[block]
        half = half_of(name.removeprefix(prefix), post_norms=self._config.post_norms)
        return (half == "attention" and layers.attention is None) or (half == "mlp" and layers.mlp is None)

    def linear_tensors(self, plan: LayerPlan | None = None) -> list[str]:
        """Names of the weights of all linear layers of blocks, or of those that a plan runs, each once, in order.

        These are what 2:4 pruning is about.
        """
        config = self._config
        return list(
            dict.fromkeys(
                f"{self.block_linear(block, name).tensor}.weight"
                for block in (range(config.num_blocks) if plan is None else plan.kept)
                for name in config.block_linears(block, plan)
            )
        )
