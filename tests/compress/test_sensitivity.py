"""What changes cost and save: each against doing it, and plans for a budget."""

from __future__ import annotations

import pytest
import torch
from test_latency_table import RECORD
from tiny_llama import delete_blocks_, magnitude_prune_, make_llama
from torch import Tensor

from sparsert.compress.anatomy import Anatomy, anatomy_of
from sparsert.compress.latency_table import LatencyTable
from sparsert.compress.magnitude import magnitude_mask
from sparsert.compress.score_windows import mean_loss
from sparsert.compress.sensitivity import (
    Change,
    Sensitivity,
    make_masks,
    measure_changes,
    measure_plan,
    suggest_plan,
)
from sparsert.errors import InputError
from sparsert.formats import packed_nbytes

BLOCKS = 7


def _model() -> Anatomy:
    return anatomy_of(make_llama(num_hidden_layers=BLOCKS, hidden_size=48, intermediate_size=64))


def _windows() -> Tensor:
    return torch.randint(0, 211, (3, 9))


def _whole(anatomy: Anatomy, windows: Tensor, masks: dict[str, Tensor], table: LatencyTable | None) -> Sensitivity:
    results = list(measure_changes(anatomy, windows, masks, table=table, batch_size=2))
    assert len(results) == anatomy.num_blocks + len(masks) + 1
    whole = results[-1]
    assert isinstance(whole, Sensitivity) and whole.changes == tuple(results[:-1])
    return whole


def test_every_change_is_measured_as_if_it_were_made() -> None:
    anatomy, windows = _model(), _windows()
    masks = make_masks(anatomy, "magnitude")
    assert len(masks) == 7 * BLOCKS
    before = {name: parameter.clone() for name, parameter in anatomy.model.named_parameters()}
    whole = _whole(anatomy, windows, masks, LatencyTable(RECORD))
    assert all(torch.equal(before[name], parameter) for name, parameter in anatomy.model.named_parameters())
    changes = {change.name: change for change in whole.changes}
    assert whole.loss == pytest.approx(mean_loss(anatomy, windows), rel=1e-6)
    name = "model.layers.2.mlp.down_proj"
    linear = anatomy.block_linears()[name]
    linear.weight.masked_fill_(~magnitude_mask(linear.weight), 0.0)
    assert changes[name].loss_increase == pytest.approx(mean_loss(anatomy, windows) - whole.loss, abs=1e-5)
    assert changes[name].saved_bytes == 2 * 48 * 64 - packed_nbytes(48, 64, torch.bfloat16)
    linear.weight.copy_(before[name + ".weight"])
    delete_blocks_(anatomy.model, (4,))
    shorter = anatomy_of(anatomy.model)
    assert changes["block 4"].loss_increase == pytest.approx(mean_loss(shorter, windows) - whole.loss, abs=1e-5)
    assert changes["block 4"].saved_bytes == whole.nbytes // BLOCKS
    assert changes["block 4"].saved_us == pytest.approx(whole.us / BLOCKS) and changes["block 4"].saved_us > 0
    assert changes["block 4"].estimated  # 6 heads of 24 are smaller than anything in that table


def test_wanda_masks_follow_the_activations() -> None:
    anatomy, windows = _model(), _windows()
    masks = make_masks(anatomy, "wanda", windows, batch_size=2)
    name = "model.layers.5.mlp.down_proj"
    seen: list[Tensor] = []
    linear = anatomy.block_linears()[name]
    handle = linear.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    anatomy.hidden(windows)
    handle.remove()
    scores = linear.weight.abs() * seen[0].reshape(-1, 64).norm(dim=0)
    assert torch.equal(masks[name], magnitude_mask(scores))
    assert not torch.equal(masks[name], make_masks(anatomy, "magnitude")[name])
    with pytest.raises(InputError, match="method wanda looks at activations"):
        make_masks(anatomy, "wanda")
    with pytest.raises(InputError, match="'sparsegpt' is not known; choose one of magnitude, wanda"):
        make_masks(anatomy, "sparsegpt")


def test_pruned_layers_are_told_and_left_out() -> None:
    model = make_llama(num_hidden_layers=BLOCKS, hidden_size=48, intermediate_size=64)
    dense = model.model.layers[1].mlp.up_proj.weight.clone()
    magnitude_prune_(model)
    model.model.layers[1].mlp.up_proj.weight.copy_(dense)
    anatomy = anatomy_of(model)
    masks = make_masks(anatomy, "magnitude")
    assert list(masks) == ["model.layers.1.mlp.up_proj"]
    whole = _whole(anatomy, _windows(), masks, None)
    assert len(whole.already_masked) == 7 * BLOCKS - 1
    assert whole.us is None and whole.changes[0].saved_us is None
    assert whole.changes[0].saved_bytes < whole.changes[1].saved_bytes


def _change(name: str, block: int, increase: float, saved: int, linear: bool = False) -> Change:
    return Change(name, block, linear, increase, saved, float(saved) / 10)


#: Blocks of 100 bytes, one layer each that a mask halves.
SYNTHETIC = Sensitivity(
    2.0,
    800,
    80.0,
    8,
    (
        *(_change(f"block {block}", block, 1.0 - block / 10, 100) for block in range(8)),
        *(_change(f"layers.{block}.x", block, 0.05 * (block + 1), 50, True) for block in range(8)),
    ),
    (),
)


def test_plans_take_the_cheapest_first_and_mind_the_guard() -> None:
    masks = suggest_plan(SYNTHETIC, "masks", save=120)
    assert masks.masked == ("layers.0.x", "layers.1.x", "layers.2.x") and not masks.plan.removed
    assert masks.saved == 150 and masks.expected_increase == pytest.approx(0.3)
    blocks = suggest_plan(SYNTHETIC, "blocks", save=15, unit="us")
    assert blocks.plan.removed == (4, 5) and blocks.masked == () and blocks.saved == pytest.approx(20.0)
    assert suggest_plan(SYNTHETIC, "blocks", save=100, force=True).plan.removed == (7,)
    with pytest.raises(InputError, match=r"250 bytes cannot be saved by blocks: all that may go saves 200"):
        suggest_plan(SYNTHETIC, "blocks", save=250)
    with pytest.raises(InputError, match="800 bytes cannot be saved by blocks: all that may go saves 700"):
        suggest_plan(SYNTHETIC, "blocks", save=800, force=True)


def test_a_removed_block_takes_its_masks_with_it() -> None:
    both = suggest_plan(SYNTHETIC, "both", save=500)
    removed = set(both.plan.removed)
    assert removed == {4, 5}
    assert not any(int(name.split(".")[1]) in removed for name in both.masked)
    assert both.saved == 100 * len(removed) + 50 * len(both.masked) == 500
    # removed: 0.6 + 0.5; masks of the six others
    assert both.expected_increase == pytest.approx(1.1 + 0.05 * (1 + 2 + 3 + 4 + 7 + 8))
    with pytest.raises(InputError, match="all that may go saves 500"):
        suggest_plan(SYNTHETIC, "both", save=501)


def test_a_plan_is_measured_as_a_whole() -> None:
    anatomy, windows = _model(), _windows()
    masks = make_masks(anatomy, "magnitude")
    whole = _whole(anatomy, windows, masks, None)
    plan = suggest_plan(whole, "both", save=whole.nbytes * 0.3)
    assert plan.saved >= whole.nbytes * 0.3
    measured = measure_plan(anatomy, plan, windows, masks)
    for name in plan.masked:
        linear = anatomy.block_linears()[name]
        linear.weight.masked_fill_(~masks[name], 0.0)
    delete_blocks_(anatomy.model, plan.plan.removed)
    assert measured == pytest.approx(mean_loss(anatomy_of(anatomy.model), windows), rel=1e-5)


def test_wishes_that_make_no_sense() -> None:
    with pytest.raises(InputError, match="plans of 'heads' are not known"):
        suggest_plan(SYNTHETIC, "heads", save=1)
    with pytest.raises(InputError, match="budget of 'flops' is not known; choose bytes or us"):
        suggest_plan(SYNTHETIC, "both", save=1, unit="flops")
    without = Sensitivity(1.0, 10, None, 1, (), ())
    with pytest.raises(InputError, match="without measured times"):
        suggest_plan(without, "both", save=1, unit="us")
