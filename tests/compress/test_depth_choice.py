"""From scores to plans: orders, the "+" rule, rounds, runs of neighbours."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from tiny_llama import delete_blocks_, make_llama
from torch import Tensor

from sparsert.compress.anatomy import Anatomy, anatomy_of
from sparsert.compress.block_scores import CRITERIA, score_blocks
from sparsert.compress.depth import DepthSettings, choose_blocks
from sparsert.compress.score_windows import mean_loss
from sparsert.compress.skipping import skipping
from sparsert.errors import InputError
from sparsert.schedule import LayerPlan, read_block_order, write_order_file

BLOCKS = 9


def _model(**changes: int) -> Anatomy:
    return anatomy_of(make_llama(num_hidden_layers=BLOCKS, hidden_size=48, intermediate_size=64, **changes))


def _windows() -> Tensor:
    return torch.randint(0, 211, (3, 9))


@pytest.mark.parametrize("criterion", CRITERIA)
def test_one_shot_takes_the_lowest_that_are_not_guarded(criterion: str, tmp_path: Path) -> None:
    anatomy, windows = _model(), _windows()
    scores = score_blocks(anatomy, criterion, windows)
    choice = choose_blocks(anatomy, DepthSettings(2, criterion), windows, batch_size=2)
    assert sorted(choice.order) == list(range(BLOCKS))
    ordered = [scores[block] for block in choice.order]
    assert ordered == sorted(ordered) or ordered == pytest.approx(sorted(ordered), rel=1e-5)
    assert choice.plan.removed == tuple(sorted([block for block in choice.order if 4 <= block <= 6][:2]))
    write_order_file(tmp_path / "order.csv", choice.order)
    assert sorted(read_block_order(tmp_path / "order.csv", 2, BLOCKS)) == list(choice.plan.removed)


def test_force_takes_the_lowest_of_all() -> None:
    anatomy, windows = _model(), _windows()
    anatomy.blocks[0].mlp.down_proj.weight.zero_()
    anatomy.blocks[0].self_attn.o_proj.weight.zero_()
    settings = DepthSettings(1, "influence", force=True)
    assert choose_blocks(anatomy, settings, windows).plan.removed == (0,)
    assert choose_blocks(anatomy, DepthSettings(1, "influence"), windows).plan.removed != (0,)


def test_iterative_scores_again_without_what_is_gone() -> None:
    anatomy, windows = _model(), _windows()
    steps: list[tuple[int, int]] = []
    settings = DepthSettings(3, "perplexity", "iterative", force=True)
    choice = choose_blocks(anatomy, settings, windows, progress=lambda done, of: steps.append((done, of)))
    gone: list[int] = []
    for scores in choice.rounds:
        losses = {}
        for block in set(range(BLOCKS)) - set(gone):
            with skipping(anatomy, [*gone, block]):
                losses[block] = math.exp(mean_loss(anatomy, windows))
        assert scores == pytest.approx(losses, rel=1e-6)
        gone.append(min(losses, key=losses.__getitem__))
    assert len(choice.rounds) == 3 and list(choice.order[:3]) == gone
    assert sorted(choice.order) == list(range(BLOCKS))
    assert choice.plan == LayerPlan.remove(BLOCKS, gone, force=True)
    assert steps[-1] == (BLOCKS - 2, BLOCKS - 2)


def test_iterative_in_larger_steps() -> None:
    choice = choose_blocks(_model(), DepthSettings(3, "influence", "iterative", step=2), _windows())
    assert len(choice.rounds) == 2
    assert choice.plan.removed == (4, 5, 6)


def test_runs_by_perplexity_and_influence_are_measured_as_runs() -> None:
    windows = _windows()
    anatomy = _model()
    settings = DepthSettings(4, "perplexity", "contiguous", force=True)
    choice = choose_blocks(anatomy, settings, windows)
    scores = choice.rounds[0]
    assert list(scores) == [0, 1, 2, 3, 4, 5]
    best = min(scores, key=scores.__getitem__)
    assert choice.order == choice.plan.removed == tuple(range(best, best + 4))
    influence = choose_blocks(anatomy, DepthSettings(4, "influence", "contiguous", force=True), windows, batch_size=2)
    model = anatomy.model
    with torch.no_grad():
        states = model(windows, output_hidden_states=True).hidden_states
        for first in range(5):
            cosine = torch.nn.functional.cosine_similarity(states[first].double(), states[first + 4].double(), dim=-1)
            assert influence.rounds[0][first] == pytest.approx(1 - float(cosine.mean()), abs=1e-6)
        delete_blocks_(model, (2, 3, 4, 5))
        assert scores[2] == pytest.approx(math.exp(model(windows, labels=windows).loss), rel=1e-4)


def test_runs_by_magnitude_add_up_and_mind_the_guard() -> None:
    anatomy = _model()
    for block, factor in enumerate([0.1, 0.1, 0.1, 0.1, 4.0, 0.5, 0.6, 0.1, 0.1]):
        for parameter in anatomy.blocks[block].parameters():
            parameter.mul_(factor)
    choice = choose_blocks(anatomy, DepthSettings(2, "magnitude", "contiguous"))
    assert list(choice.rounds[0]) == [4, 5]
    assert choice.plan.removed == (5, 6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"count": 4}, "asked to remove 4 of 9 blocks, but only 3 can go .*guarded.*ask for 1-3"),
        ({"count": 9, "force": True}, "asked to remove 9 of 9 blocks, but only 8 can go; ask for 1-8"),
        ({"count": 0}, "count is 0"),
        ({"count": 1, "mode": "greedy"}, "mode 'greedy' is not known; choose one of one-shot, iterative, contiguous"),
        ({"count": 1, "criterion": "l2"}, "criterion 'l2' is not known"),
    ],
)
def test_impossible_wishes_are_told(settings: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        choose_blocks(_model(), DepthSettings(**settings), _windows())  # type: ignore[arg-type]


def test_an_order_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be written"):
        write_order_file(tmp_path / "missing" / "order.csv", [1])
    with pytest.raises(InputError, match="no block"):
        write_order_file(tmp_path / "order.csv", [])
