"""The card of a model: what it weighs, before anything is timed.

Decode at small batch is a read of the weights, so bytes say what speed can be at best, and a measured time
says little without them:

    ceiling tok/s = measured read bandwidth / (bytes of weights that a step reads + bytes of keys and values)

Bytes follow from the configuration alone, which is how a model that does not fit can have a card too; a test
holds them against a model that was made. What it gives up: activations, which stay in cache at small batch.

Source: nanochat's ``infer_bench.py``, whose card comes first as well.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sparsert.bench.options import dtype_name
from sparsert.bench.workload import Setting

if TYPE_CHECKING:
    import torch

    from sparsert.models import DecoderConfig, DecoderModel
    from sparsert.schedule import LayerPlan

_BYTES = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("B", 1.0))
_COUNTS = (("billion", 1e9), ("million", 1e6))

CORNERS = ("dense", "2:4", "blocks removed", "2:4 + blocks removed")


def corner_name(sparse: bool, removes_blocks: bool) -> str:
    """Which of the four corners a model is in.

    Example:
        >>> corner_name(True, False)
        '2:4'
    """
    return CORNERS[int(sparse) + 2 * int(removes_blocks)]


@dataclasses.dataclass(frozen=True)
class Card:
    """What a model weighs.

    Attributes:
        model: its name.
        corner: one of :data:`CORNERS`.
        dtype: of activations and values, e.g. ``bfloat16``.
        blocks_kept, blocks: blocks that run, and blocks of the unpruned model.
        parameters: numbers of the blocks that run, embedding, head and norms, pruned ones included.
        weight_bytes: as stored on the device, metadata included; a tied head counts once.
        read_bytes: of these, what every decode step reads: all but an embedding that is not the head too.
        kv_bytes_per_token: keys and values of one token of one text.
    """

    model: str
    corner: str
    dtype: str
    blocks_kept: int
    blocks: int
    parameters: int
    weight_bytes: int
    read_bytes: int
    kv_bytes_per_token: int

    def ceiling_tok_per_s(self, read_bytes_per_s: float | None, setting: Setting) -> float | None:
        """Tokens per second of a batch if a decode step did nothing but read what it must, at the measured rate."""
        if read_bytes_per_s is None:
            return None
        step_bytes = self.read_bytes + setting.batch * setting.mean_context * self.kv_bytes_per_token
        return setting.batch * read_bytes_per_s / step_bytes

    def to_dict(self) -> dict[str, Any]:
        """As plain types, for a record."""
        return dataclasses.asdict(self)

    def to_text(self, read_bytes_per_s: float | None) -> str:
        """Some lines for people; the ceiling is that of batch 1 after 128 tokens."""
        lines = [
            f"{self.model}, {self.corner}, {self.dtype}: {self.blocks_kept} of {self.blocks} blocks, "
            f"{amount(self.parameters, _COUNTS)} parameters",
            f"  weights as stored {amount(self.weight_bytes)}, read in each step {amount(self.read_bytes)}, "
            f"keys and values {amount(self.kv_bytes_per_token)} a token",
        ]
        ceiling = self.ceiling_tok_per_s(read_bytes_per_s, Setting(1, 128, 2, 1))
        if ceiling is not None and read_bytes_per_s is not None:
            lines.append(
                f"  ceiling at batch 1: {ceiling:,.1f} tok/s at the measured {read_bytes_per_s / 1e9:,.0f} GB/s"
            )
        return "\n".join(lines)


def predict_card(name: str, config: DecoderConfig, *, plan: LayerPlan, sparse: bool, dtype: torch.dtype) -> Card:
    """The card of a model that need not exist.

    Args:
        name: for the card.
        plan: blocks that run.
        sparse: whether the linear layers of the blocks are packed 2:4.
    """
    from sparsert.engine.cache import kv_bytes_per_token
    from sparsert.formats import packed_nbytes

    width, size = config.hidden_size, dtype.itemsize
    parameters = weight_bytes = 0
    norms = width
    for block in plan.kept:
        for shape in config.block_linears(block, plan).values():
            bias = shape.out_features if shape.bias else 0
            parameters += shape.out_features * shape.in_features + bias
            packs = sparse and shape.in_features % 4 == 0
            dense_bytes = shape.out_features * shape.in_features * size
            weight_bytes += packed_nbytes(shape.out_features, shape.in_features, dtype) if packs else dense_bytes
            weight_bytes += bias * size
        norms += sum(config.block_norms(block, plan).values())
    norms *= 2 if config.norm.centered else 1
    matrix, matrices = config.vocab_size * width, 1 if config.tie_word_embeddings else 2
    parameters += norms + matrices * matrix
    weight_bytes += norms * (4 if config.norm.stored_minus_one else size) + matrices * matrix * size
    return Card(
        model=name,
        corner=corner_name(sparse, bool(plan.removed)),
        dtype=dtype_name(dtype),
        blocks_kept=len(plan.kept),
        blocks=config.num_blocks,
        parameters=parameters,
        weight_bytes=weight_bytes,
        read_bytes=weight_bytes - (matrices - 1) * matrix * size,
        kv_bytes_per_token=kv_bytes_per_token(config.attention_shapes(plan), dtype),
    )


def stored_bytes(model: DecoderModel) -> tuple[int, int]:
    """Bytes of a model that exists: all its weights, and those that every decode step reads."""
    held = {id(tensor): tensor.nbytes for tensor in model.parameters()}
    tables = {id(table) for table in model.rotaries.buffers()}
    held |= {id(tensor): tensor.nbytes for tensor in model.buffers() if id(tensor) not in tables}
    total = sum(held.values())
    tied = model.lm_head.weight is model.embed_tokens.weight
    return total, total - (0 if tied else model.embed_tokens.weight.nbytes)


def amount(count: float, units: Sequence[tuple[str, float]] = _BYTES) -> str:
    """A count in the unit that reads best.

    Example:
        >>> amount(131072), amount(16_060_000_000)
        ('131.1 kB', '16.06 GB')
    """
    for unit, size in units:
        if count >= size:
            return f"{count / size:.{2 if size >= 1e9 else 1}f} {unit}"
    return f"{count:.0f}"
