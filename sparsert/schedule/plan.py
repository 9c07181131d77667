"""The layer plan: which transformer blocks of a checkpoint run, and which halves of them.

Depth pruning removes whole blocks. What remains is an ordinary, shorter model, so a plan is the list of
kept blocks in the checkpoint's own numbering; their order is the order in which they run. A kept block
may also run without its attention or without its feed-forward layer (mlp): a skipped half adds nothing to
the residual stream, and neither its weights nor, for attention, its keys and values are held. A plan is
data: it can be printed, compared, hashed, stored, and asked whether it lies within another one.

The first four and the last two blocks are guarded: removing any of them ruins a model (LLaMA-7B on
WikiText-2 goes from perplexity 12.6 to 21 without block 24, but to 719 without block 2 and to 8276
without block 0), and criteria that look at weights alone rank exactly these first. One rule for all: neither
such a block nor a half of it goes, unless whoever wants it says ``force=True``. The rule is for people
who ask; what a checkpoint says of itself (:meth:`LayerPlan.from_per_layer_config`) is taken as it is.

Source: Kim et al., "Shortened LLaMA" (2024), section 3: the "+" rule keeps blocks 0-3 and the last two.
``per_layer_config`` with ``skip``: transformers, ``integrations/heterogeneity``.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sparsert.errors import CheckpointError, InputError
from sparsert.schedule.blocks import (
    check_block_indices,
    format_block_list,
    guarded_blocks,
    parse_block_list,
    read_block_order,
)

#: Blocks as text (``"21-25,27"``) or as numbers in any order (a list, a ``range``).
Blocks = str | Iterable[int]

#: What ``skip`` of a ``per_layer_config`` may name, and the half of a block that it means.
SKIP_NAMES = {"attention": "attention", "self_attn": "attention", "mlp": "mlp", "feed_forward": "mlp"}


@dataclasses.dataclass(frozen=True)
class LayerPlan:
    """The blocks of a checkpoint that run.

    Attributes:
        num_blocks: blocks in the checkpoint.
        kept: the blocks that run, in the checkpoint's numbering, strictly ascending.
        without_attention, without_mlp: kept blocks whose attention or feed-forward layer is skipped,
            ascending; a block without both is a removed one and may not be named here.

    Raises:
        InputError: no block is kept, or blocks are out of range, repeated or out of order.

    Example:
        >>> print(LayerPlan.remove(32, "21-25,27"))
        26 of 32 blocks: 0-20,26,28-31 (removed: 21-25,27)
        >>> print(LayerPlan.remove(32, range(21, 26), skip_attention="20"))
        27 of 32 blocks: 0-20,26-31 (removed: 21-25), without attention in 20
    """

    num_blocks: int
    kept: tuple[int, ...]
    without_attention: tuple[int, ...] = ()
    without_mlp: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.num_blocks < 1:
            raise InputError(f"a layer plan needs a model of at least one block, got {self.num_blocks}")
        check_block_indices(self.kept, self.num_blocks, "keep")
        if list(self.kept) != sorted(self.kept):
            raise InputError(f"kept blocks must ascend, got {list(self.kept)}; blocks run in the checkpoint's order")
        if not self.kept:
            raise InputError(f"all {self.num_blocks} blocks would be removed; at least one has to stay")
        for part, blocks in (("attention", self.without_attention), ("mlp", self.without_mlp)):
            check_block_indices(blocks, self.num_blocks, f"skip the {part} of")
            strangers = sorted(set(blocks) - set(self.kept))
            if strangers:
                raise InputError(
                    f"cannot skip the {part} of block {format_block_list(strangers)}: the plan removes it as a whole"
                )
            if list(blocks) != sorted(blocks):
                raise InputError(f"blocks without {part} must ascend, got {list(blocks)}")
        both = sorted(set(self.without_attention) & set(self.without_mlp))
        if both:
            raise InputError(f"block {format_block_list(both)} would run without attention and mlp; remove it instead")

    def runs_attention(self, block: int) -> bool:
        """Whether the attention layer of a block runs."""
        return block in self.kept and block not in self.without_attention

    def runs_mlp(self, block: int) -> bool:
        """Whether the feed-forward layer of a block runs."""
        return block in self.kept and block not in self.without_mlp

    @property
    def removed(self) -> tuple[int, ...]:
        """The blocks that do not run, ascending, in the checkpoint's numbering."""
        kept = set(self.kept)
        return tuple(index for index in range(self.num_blocks) if index not in kept)

    def check_within(self, other: LayerPlan, what: str) -> None:
        """Check that ``other`` runs all that this plan runs: its weights and KV cache then serve this plan too.

        Args:
            what: what ``other`` is, for the message: ``"the loaded model"``.

        Raises:
            InputError: naming the blocks that ``other`` does not run.
        """
        if self.num_blocks != other.num_blocks:
            raise InputError(f"the plan is for {self.num_blocks} blocks, {what} has {other.num_blocks}")
        attention, mlp = self._beyond(other)
        if attention or mlp:
            parts = [("attention", attention), ("mlp", mlp)]
            named = " and ".join(f"{part} of block {format_block_list(blocks)}" for part, blocks in parts if blocks)
            raise InputError(
                f"the plan runs {named}, but {what} runs {other}; leave them out, or load a model with them"
            )

    def _beyond(self, other: LayerPlan) -> tuple[list[int], list[int]]:
        """Blocks whose attention, and whose mlp, runs here and not in ``other``."""
        attention = [block for block in self.kept if self.runs_attention(block) and not other.runs_attention(block)]
        mlp = [block for block in self.kept if self.runs_mlp(block) and not other.runs_mlp(block)]
        return attention, mlp

    def intersect(self, other: LayerPlan) -> LayerPlan:
        """What of this plan ``other`` runs too; a block that keeps neither half is removed.

        Raises:
            InputError: the plans are for different numbers of blocks, or nothing would be left.
        """
        if self.num_blocks != other.num_blocks:
            raise InputError(f"the layer plan is for {other.num_blocks} blocks, the model has {self.num_blocks}")
        blocks = range(self.num_blocks)
        attention = {block for block in blocks if self.runs_attention(block) and other.runs_attention(block)}
        mlp = {block for block in blocks if self.runs_mlp(block) and other.runs_mlp(block)}
        return LayerPlan._running(self.num_blocks, attention, mlp)

    @classmethod
    def _running(cls, num_blocks: int, attention: set[int], mlp: set[int]) -> LayerPlan:
        kept = attention | mlp
        return cls(num_blocks, *(tuple(sorted(blocks)) for blocks in (kept, kept - attention, kept - mlp)))

    @classmethod
    def full(cls, num_blocks: int) -> LayerPlan:
        """The plan that keeps every block."""
        return cls(num_blocks, tuple(range(num_blocks)))

    @classmethod
    def remove(
        cls,
        num_blocks: int,
        removed: Blocks = (),
        *,
        order: tuple[str | Path, int] | None = None,
        skip_attention: Blocks = (),
        skip_mlp: Blocks = (),
        force: bool = False,
    ) -> LayerPlan:
        """The plan that leaves out what is named.

        Args:
            num_blocks: blocks in the checkpoint.
            removed: blocks to leave out, in the checkpoint's numbering.
            order: an order file and how many of its first blocks to leave out, instead of ``removed``; see
                :func:`read_block_order`.
            skip_attention, skip_mlp: blocks of which only this half is left out.
            force: also allow the guarded blocks (0-3 and the last two).

        Raises:
            InputError: an index is out of range or named twice, a block is named for both halves, a
                guarded block is named without ``force``, or nothing would be left.
        """
        if order is not None:
            path, count = order
            removed = read_block_order(path, count, num_blocks, force=force)
        gone, attention, mlp = (_numbers(blocks) for blocks in (removed, skip_attention, skip_mlp))
        for verb, blocks in (("remove", gone), ("skip the attention of", attention), ("skip the mlp of", mlp)):
            check_block_indices(blocks, num_blocks, verb)
            if not force:
                _refuse_guarded(blocks, num_blocks, verb)
        kept = tuple(index for index in range(num_blocks) if index not in set(gone))
        return cls(num_blocks, kept, tuple(sorted(attention)), tuple(sorted(mlp)))

    @classmethod
    def from_per_layer_config(cls, num_blocks: int, per_layer_config: Mapping[Any, Any] | None) -> LayerPlan:
        """The plan that a ``config.json`` names in ``per_layer_config``; other keys than ``skip`` are not its business.

        Args:
            per_layer_config: ``{"3": {"skip": ["attention"]}, ...}``, or None.

        Raises:
            CheckpointError: the entry is malformed, or names a block or part that does not exist.
            InputError: nothing would be left.

        Example:
            >>> print(LayerPlan.from_per_layer_config(6, {"2": {"skip": ["mlp"]}, "4": {"skip": ["attention", "mlp"]}}))
            5 of 6 blocks: 0-3,5 (removed: 4), without mlp in 2
        """
        running = {"attention": set(range(num_blocks)), "mlp": set(range(num_blocks))}
        if per_layer_config is not None and not isinstance(per_layer_config, Mapping):
            raise CheckpointError(
                f"config.json: per_layer_config is {per_layer_config!r}; it must map blocks to settings"
            )
        for key, settings in (per_layer_config or {}).items():
            place = f"config.json: per_layer_config[{key!r}]"
            if not str(key).isdecimal() or int(key) >= num_blocks:
                raise CheckpointError(f"{place}: a model of {num_blocks} blocks has 0-{num_blocks - 1}; mend the key")
            skip = (settings.get("skip") or ()) if isinstance(settings, Mapping) else None
            if not isinstance(skip, (list, tuple)) or not all(name in SKIP_NAMES for name in skip):
                raise CheckpointError(f"{place}: skip must be a list of {', '.join(SKIP_NAMES)}, got {skip!r}")
            for name in skip:
                running[SKIP_NAMES[name]].discard(int(key))
        return cls._running(num_blocks, running["attention"], running["mlp"])

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> LayerPlan:
        """What a pruned checkpoint runs of the model it was made from, in that model's numbering.

        Args:
            record: ``sparsert`` of its ``config.json``, see ``sparsert.checkpoint.prune``.

        Raises:
            CheckpointError: the record is damaged.
        """
        try:
            halves = (record.get("without_attention", ()), record.get("without_mlp", ()))
            return cls(record["base_num_blocks"], tuple(record["kept_blocks"]), *(tuple(blocks) for blocks in halves))
        except (KeyError, TypeError, AttributeError, InputError) as error:
            raise CheckpointError(
                f"config.json: the sparsert record of what was removed is damaged ({error}); prune the model again"
            ) from None

    def to_json(self) -> str:
        """The plan as a JSON object, which :meth:`from_json` reads."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> LayerPlan:
        """The plan that :meth:`to_json` wrote.

        Raises:
            InputError: no JSON object, unknown or missing keys, values of the wrong kind, or no valid plan.

        Example:
            >>> plan = LayerPlan.remove(8, "4", skip_mlp="5")
            >>> LayerPlan.from_json(plan.to_json()) == plan
            True
        """
        names = [field.name for field in dataclasses.fields(cls)]
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise InputError(f"layer plan: is no JSON ({error}); give what LayerPlan.to_json wrote") from None
        if not isinstance(values, dict) or not {"num_blocks", "kept"} <= set(values) <= set(names):
            raise InputError(f"layer plan: {text[:80]!r} must be a JSON object with {', '.join(names)}")
        count = values.pop("num_blocks")
        lists = values.values()
        if type(count) is not int or not all(isinstance(x, list) and all(type(b) is int for b in x) for x in lists):
            raise InputError("layer plan: num_blocks must be a whole number, everything else a list of block numbers")
        return cls(count, **{name: tuple(blocks) for name, blocks in values.items()})

    def __str__(self) -> str:
        text = f"all {self.num_blocks} blocks"
        if self.removed:
            kept, removed = format_block_list(self.kept), format_block_list(self.removed)
            text = f"{len(self.kept)} of {self.num_blocks} blocks: {kept} (removed: {removed})"
        if self.without_attention:
            text += f", without attention in {format_block_list(self.without_attention)}"
        if self.without_mlp:
            text += f", without mlp in {format_block_list(self.without_mlp)}"
        return text


def _numbers(blocks: Blocks) -> tuple[int, ...]:
    return parse_block_list(blocks) if isinstance(blocks, str) else tuple(blocks)


def _refuse_guarded(blocks: Iterable[int], num_blocks: int, verb: str) -> None:
    refused = sorted(set(blocks) & guarded_blocks(num_blocks))
    if refused:
        free = sorted(set(range(num_blocks)) - guarded_blocks(num_blocks))
        allowed = f"blocks {format_block_list(free)} can go" if free else "this model has no other blocks"
        raise InputError(
            f"refusing to {verb} block {format_block_list(refused)} of {num_blocks}: without one of the first four "
            f"or the last two blocks perplexity explodes; {allowed}, "
            f"or force it (force=True, --force-remove)"
        )
