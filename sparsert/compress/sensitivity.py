"""What every change would cost and save, before any is made.

A change is the removal of a block, or a 2:4 mask on one linear layer. Each is made alone, on the running model, and
measured: the loss of the text with it, less the loss without. What it saves follows from shapes: bytes of weights at 16
bits a value, and microseconds of a decode step if there is a table of measured layer times.

Plans for a budget are made of these greedily, the least loss for what is saved first, as if losses added up. They do
not: changes get in each other's way, most of all masks on all layers of a small model, so whoever suggests a plan
measures it as a whole (:func:`measure_plan`), and that number stands beside the sum. A block that goes takes its
masks with it.

What it gives up: a forward pass for each change (240 for SmolLM2-135M), and the effect of recovery, which is large.

Source: block loss: Kim et al. (arXiv 2402.02834), section 3; Wanda: Sun et al. (arXiv 2306.11695).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from sparsert.compress.anatomy import Anatomy, block_of
from sparsert.compress.keep_zeros import is_24
from sparsert.compress.latency_table import LatencyTable, Layer
from sparsert.compress.magnitude import magnitude_mask
from sparsert.compress.score_windows import Remember, batches_of, check_windows, compute_always, mean_loss
from sparsert.compress.skipping import masking, skipping
from sparsert.compress.wanda import InputNorms, wanda_mask
from sparsert.errors import InputError
from sparsert.schedule import LayerPlan, guarded_blocks

METHODS = ("magnitude", "wanda")

#: What plans are made of.
KINDS = ("blocks", "masks", "both")


@dataclasses.dataclass(frozen=True)
class Change:
    """One thing that could be done to a model.

    Attributes:
        name: of the linear layer, or ``block N``.
        block: the block it is in.
        linear: whether it is a mask on a linear layer; else the removal of the block.
        loss_increase: of the text's loss in nats a token, with this change alone; may be negative.
        saved_bytes: of weights on the device, 16 bits a value.
        saved_us: of the linear layers of a decode step; None without a table.
        estimated: the time is no measurement (see :mod:`sparsert.compress.latency_table`).
    """

    name: str
    block: int
    linear: bool
    loss_increase: float
    saved_bytes: int
    saved_us: float | None
    estimated: bool = False


@dataclasses.dataclass(frozen=True)
class Sensitivity:
    """All changes of a model.

    Attributes:
        loss: of the model as it is, in nats a token.
        nbytes: of the weights of the blocks' linear layers, 16 bits a value.
        us: of these at one row of input; None without a table.
        num_blocks: of the model.
        changes: blocks first, then linear layers, each in the model's order.
        already_masked: linear layers that are 2:4 now; no mask is tried on them.
    """

    loss: float
    nbytes: int
    us: float | None
    num_blocks: int
    changes: tuple[Change, ...]
    already_masked: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Suggestion:
    """A plan within a budget.

    Attributes:
        kind: of :data:`KINDS`.
        plan: the blocks that stay.
        masked: linear layers of those that get a 2:4 mask.
        saved: bytes or microseconds.
        expected_increase: of the loss, if the single increases added up.
    """

    kind: str
    plan: LayerPlan
    masked: tuple[str, ...]
    saved: float
    expected_increase: float


def make_masks(
    anatomy: Anatomy, method: str, windows: Tensor | None = None, *, batch_size: int = 1
) -> dict[str, Tensor]:
    """2:4 masks of every linear layer of the blocks that is not 2:4 yet, each from the dense model.

    Args:
        anatomy: of the model, which is not changed.
        method: of :data:`METHODS`.
        windows: int64 ``[windows, length]``; Wanda needs them.
        batch_size: windows in one pass.

    Returns:
        Name -> bool ``[out_features, in_features]``; layers whose width is no multiple of 4 are left out.

    Raises:
        InputError: unknown method, or no text for Wanda.
    """
    if method not in METHODS:
        raise InputError(f"method {method!r} is not known; choose one of {', '.join(METHODS)}")
    linears = {
        name: linear
        for name, linear in anatomy.block_linears().items()
        if linear.in_features % 4 == 0 and not is_24(linear.weight.detach())
    }
    if method == "magnitude":
        return {name: magnitude_mask(linear.weight.detach(), name=name) for name, linear in linears.items()}
    if windows is None:
        raise InputError("method wanda looks at activations; give windows of text, or use magnitude")
    check_windows(anatomy, windows)
    norms = {name: InputNorms(linear.in_features, linear.weight.device) for name, linear in linears.items()}

    def hook_of(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda module, arguments: norms[name].add(arguments[0])

    handles = [linear.register_forward_pre_hook(hook_of(name)) for name, linear in linears.items()]
    try:
        with torch.no_grad():
            for batch in batches_of(windows, batch_size, anatomy.embedding.weight.device):
                anatomy.hidden(batch)
    finally:
        for handle in handles:
            handle.remove()
    return {name: wanda_mask(linear.weight.detach(), norms[name], name=name) for name, linear in linears.items()}


def measure_changes(
    anatomy: Anatomy,
    windows: Tensor,
    masks: Mapping[str, Tensor],
    *,
    table: LatencyTable | None = None,
    batch_size: int = 1,
    remember: Remember = compute_always,
) -> Iterator[Change | Sensitivity]:
    """Measure every change alone.

    Args:
        anatomy: of the model, which is not changed.
        windows: int64 ``[windows, length]`` whose loss is measured.
        masks: by linear layer, see :func:`make_masks`.
        table: measured layer times.
        batch_size: windows in one pass.
        remember: asked for every loss.

    Yields:
        Each change as it is measured, ``num_blocks + len(masks)`` of them, and the whole at last.

    Raises:
        InputError: unusable windows, or a loss that is not finite.
    """

    def measure() -> float:
        return mean_loss(anatomy, windows, batch_size=batch_size)

    loss = remember("loss", measure)
    linears = anatomy.block_linears()
    sparse = {name for name, linear in linears.items() if linear.in_features % 4 == 0 and is_24(linear.weight.detach())}
    layers = {
        name: Layer(name, linear.out_features, linear.in_features, name in sparse) for name, linear in linears.items()
    }
    changes: list[Change] = []
    for block in range(anatomy.num_blocks):
        with skipping(anatomy, [block]):
            increase = remember(f"loss without block {block}", measure) - loss
        inside = [layer for name, layer in layers.items() if block_of(name) == block]
        saved = sum(layer.nbytes for layer in inside)
        time = table.total(inside) if table is not None else None
        changes.append(
            Change(
                f"block {block}",
                block,
                False,
                increase,
                saved,
                None if time is None else time.us,
                bool(time is not None and time.estimated),
            )
        )
        yield changes[-1]
    for name, mask in masks.items():
        with masking(linears, {name: mask}):
            increase = remember(f"loss with 2:4 {name}", measure) - loss
        packed = dataclasses.replace(layers[name], sparse=True)
        us, estimated = None, False
        if table is not None:
            before, after = table.layer(layers[name]), table.layer(packed)
            us, estimated = before.us - after.us, "estimated" in (before.source, after.source)
        saved = layers[name].nbytes - packed.nbytes
        changes.append(Change(name, block_of(name) or 0, True, increase, saved, us, estimated))
        yield changes[-1]
    yield Sensitivity(
        loss,
        sum(layer.nbytes for layer in layers.values()),
        None if table is None else table.total(layers.values()).us,
        anatomy.num_blocks,
        tuple(changes),
        tuple(sorted(sparse)),
    )


def suggest_plan(
    sensitivity: Sensitivity, kind: str, *, save: float, unit: str = "bytes", force: bool = False
) -> Suggestion:
    """The changes that cost least for what they save, until enough is saved.

    Args:
        sensitivity: of the model.
        kind: of :data:`KINDS`: remove blocks, mask layers, or both.
        save: how much.
        unit: ``bytes`` or ``us``.
        force: also remove guarded blocks.

    Returns:
        The plan.

    Raises:
        InputError: it cannot be saved that way, with the most that can; unknown kind or unit; no times.
    """
    if kind not in KINDS:
        raise InputError(f"plans of {kind!r} are not known; choose one of {', '.join(KINDS)}")
    if unit not in ("bytes", "us"):
        raise InputError(f"a budget of {unit!r} is not known; choose bytes or us")
    if unit == "us" and sensitivity.us is None:
        raise InputError(
            "microseconds cannot be saved without measured times; give a record of `sparsert bench kernels`"
        )
    guarded = frozenset() if force else guarded_blocks(sensitivity.num_blocks)
    open_changes = [
        change
        for change in sensitivity.changes
        if (kind == "both" or change.linear == (kind == "masks")) and (change.linear or change.block not in guarded)
    ]
    removed: set[int] = set()
    taken: dict[str, Change] = {}
    saved = 0.0
    while saved < save:
        offers = []
        for change in open_changes:
            gain, increase = _saving(change, unit), change.loss_increase
            if not change.linear:
                # its masked layers are smaller by now, and what they cost is not paid any more
                inside = [other for other in taken.values() if other.linear and other.block == change.block]
                gain -= sum(_saving(other, unit) for other in inside)
                increase -= sum(other.loss_increase for other in inside)
            if gain > 0:
                offers.append((increase / gain, change.name, change, gain))
        last = len(removed) + 1 == sensitivity.num_blocks
        offers = [offer for offer in offers if offer[2].linear or not last]
        if not offers:
            raise InputError(
                f"{save:,.0f} {unit} cannot be saved by {kind}: all that may go saves {saved:,.0f}; ask for less, "
                f"or allow more (both blocks and masks, force)"
            )
        _, _, best, gain = min(offers, key=lambda offer: offer[:2])
        saved += gain
        open_changes.remove(best)
        taken[best.name] = best
        if not best.linear:
            removed.add(best.block)
            open_changes = [change for change in open_changes if change.block != best.block]
            taken = {name: change for name, change in taken.items() if not change.linear or change.block != best.block}
    return Suggestion(
        kind,
        LayerPlan.remove(sensitivity.num_blocks, sorted(removed), force=True),
        tuple(change.name for change in sensitivity.changes if change.linear and change.name in taken),
        saved,
        sum(change.loss_increase for change in taken.values()),
    )


def measure_plan(
    anatomy: Anatomy,
    suggestion: Suggestion,
    windows: Tensor,
    masks: Mapping[str, Tensor],
    *,
    batch_size: int = 1,
) -> float:
    """Loss of the text under a plan as a whole, in nats a token."""
    chosen = {name: masks[name] for name in suggestion.masked}
    with skipping(anatomy, suggestion.plan.removed), masking(anatomy.block_linears(), chosen):
        return mean_loss(anatomy, windows, batch_size=batch_size)


def _saving(change: Change, unit: str) -> float:
    if unit == "bytes":
        return float(change.saved_bytes)
    assert change.saved_us is not None
    return change.saved_us
