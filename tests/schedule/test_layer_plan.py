"""Layer plans: halves of blocks, the ways to make one, comparison, and the forms in which one is stored."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from sparsert.errors import CheckpointError, InputError
from sparsert.schedule import LayerPlan


def random_plan(draw: random.Random, num_blocks: int) -> LayerPlan:
    kept = sorted(draw.sample(range(num_blocks), draw.randint(1, num_blocks)))
    halves: dict[str, list[int]] = {"attention": [], "mlp": [], "whole": []}
    for block in kept:
        halves[draw.choice(("attention", "mlp", "whole"))].append(block)
    return LayerPlan(num_blocks, tuple(kept), tuple(halves["attention"]), tuple(halves["mlp"]))


def test_halves_of_blocks() -> None:
    plan = LayerPlan.remove(32, "21-25,27", skip_attention="20", skip_mlp=[19, 18])
    assert plan.without_attention == (20,) and plan.without_mlp == (18, 19)
    assert [plan.runs_attention(block) for block in (18, 20, 21, 31)] == [True, False, False, True]
    assert [plan.runs_mlp(block) for block in (18, 20, 21, 31)] == [False, True, False, True]
    assert (
        str(plan) == "26 of 32 blocks: 0-20,26,28-31 (removed: 21-25,27), without attention in 20, without mlp in 18-19"
    )
    assert LayerPlan.remove(32, range(21, 26)) == LayerPlan.remove(32, "21-25")
    assert hash(plan) == hash(LayerPlan.remove(32, [27, *range(21, 26)], skip_attention=(20,), skip_mlp=range(18, 20)))


@pytest.mark.parametrize("options", [{"skip_attention": [1]}, {"skip_mlp": "30"}, {"removed": [3], "skip_mlp": [9]}])
def test_halves_of_guarded_blocks_need_force(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"refusing to .* block \d+ of 32.*blocks 4-29 can go.*force"):
        LayerPlan.remove(32, **options)
    assert LayerPlan.remove(32, **options, force=True) != LayerPlan.full(32)


def test_contradicting_halves() -> None:
    with pytest.raises(InputError, match="cannot skip the attention of block 9: the plan removes it as a whole"):
        LayerPlan.remove(32, "8-10", skip_attention="9")
    with pytest.raises(InputError, match="block 9 would run without attention and mlp; remove it instead"):
        LayerPlan.remove(32, skip_attention="9", skip_mlp="9")
    with pytest.raises(InputError, match="cannot skip the mlp of block 40: the model has 32 blocks"):
        LayerPlan.remove(32, skip_mlp="40")
    with pytest.raises(InputError, match=r"blocks without mlp must ascend, got \[2, 1\]"):
        LayerPlan(4, (0, 1, 2, 3), without_mlp=(2, 1))


def test_order_file(tmp_path: Path) -> None:
    (tmp_path / "order.csv").write_text("0,27,24,31,26,25")
    assert LayerPlan.remove(32, order=(tmp_path / "order.csv", 3)) == LayerPlan.remove(32, [24, 26, 27])
    assert LayerPlan.remove(32, order=(tmp_path / "order.csv", 1), force=True).removed == (0,)


def test_per_layer_config_of_transformers() -> None:
    config = {
        "2": {"skip": ["mlp"]},
        3: {"skip": ["attention"], "intermediate_size": 48},
        "4": {"intermediate_size": 9},
    }
    assert LayerPlan.from_per_layer_config(6, config) == LayerPlan(6, (0, 1, 2, 3, 4, 5), (3,), (2,))
    assert LayerPlan.from_per_layer_config(6, None) == LayerPlan.from_per_layer_config(6, {}) == LayerPlan.full(6)
    assert LayerPlan.from_per_layer_config(2, {"0": {"skip": ["self_attn", "mlp"]}}).removed == (0,)
    assert LayerPlan.from_per_layer_config(2, {"0": {"skip": None}}) == LayerPlan.full(2)


def test_transformers_takes_the_same_form() -> None:
    from transformers import LlamaConfig

    config = LlamaConfig(num_hidden_layers=6, per_layer_config={"2": {"skip": ["mlp"]}}).to_dict()
    assert LayerPlan.from_per_layer_config(6, config["per_layer_config"]).without_mlp == (2,)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ([], r"per_layer_config is \[\]; it must map blocks to settings"),
        ({"6": {}}, r"per_layer_config\['6'\]: a model of 6 blocks has 0-5"),
        ({"x": {}}, r"per_layer_config\['x'\]: a model of 6 blocks has 0-5"),
        ({"\u00b2": {}}, r"a model of 6 blocks has 0-5"),  # a digit to Python, and no number
        ({"1": {"skip": "mlp"}}, r"\['1'\]: skip must be a list of attention, self_attn, mlp, feed_forward, got 'mlp'"),
        ({"1": {"skip": ["experts"]}}, r"\['1'\]: skip must be a list of"),
        ({"1": 3}, r"\['1'\]: skip must be a list of"),
    ],
)
def test_damaged_per_layer_config(config: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        LayerPlan.from_per_layer_config(6, config)


def test_within() -> None:
    resident = LayerPlan.remove(12, "5", skip_attention="6", skip_mlp="7")
    for within, other in (
        (resident, resident),
        (resident, LayerPlan.full(12)),
        (LayerPlan.remove(12, "5-7"), resident),
    ):
        within.check_within(other, "this model")
    with pytest.raises(InputError, match="the plan runs mlp of block 7, but this model"):
        LayerPlan.remove(12, "5,6").check_within(resident, "this model")
    with pytest.raises(
        InputError, match=r"runs attention of block 5-6 and mlp of block 5,7, but this model runs 11 of 12"
    ):
        LayerPlan.full(12).check_within(resident, "this model")
    with pytest.raises(InputError, match="the plan is for 9 blocks, this model has 12"):
        LayerPlan.full(9).check_within(resident, "this model")


def test_intersection_is_the_largest_plan_within_both() -> None:
    draw = random.Random(3)
    for _ in range(200):
        one, other = random_plan(draw, 9), random_plan(draw, 9)
        try:
            both = one.intersect(other)
        except InputError as error:
            assert "all 9 blocks would be removed" in str(error)
            continue
        both.check_within(one, "the first")
        both.check_within(other, "the second")
        for block in range(9):
            assert both.runs_attention(block) == (one.runs_attention(block) and other.runs_attention(block))
            assert both.runs_mlp(block) == (one.runs_mlp(block) and other.runs_mlp(block))
        assert both == other.intersect(one)
    with pytest.raises(InputError, match="the layer plan is for 8 blocks, the model has 9"):
        LayerPlan.full(9).intersect(LayerPlan.full(8))


def test_json_round_trip() -> None:
    draw = random.Random(4)
    for _ in range(100):
        plan = random_plan(draw, draw.randint(1, 40))
        assert LayerPlan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no JSON"),
        ("[1]", "must be a JSON object with num_blocks, kept"),
        ('{"num_blocks": 3}', "must be a JSON object"),
        ('{"num_blocks": 3, "kept": [0], "colour": []}', "must be a JSON object"),
        ('{"num_blocks": true, "kept": [0]}', "num_blocks must be a whole number"),
        ('{"num_blocks": 3, "kept": ["0"]}', "a list of block numbers"),
        ('{"num_blocks": 3, "kept": [4]}', "cannot keep block 4"),
    ],
)
def test_damaged_json(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        LayerPlan.from_json(text)


@pytest.mark.parametrize(
    "record",
    [
        {},
        {"base_num_blocks": 4},
        {"base_num_blocks": "4", "kept_blocks": [0]},
        {"base_num_blocks": 4, "kept_blocks": [7]},
    ],
)
def test_damaged_record(record: dict[str, Any]) -> None:
    with pytest.raises(
        CheckpointError, match=r"the sparsert record of what was removed is damaged \(.*prune the model again"
    ):
        LayerPlan.from_record(record)
