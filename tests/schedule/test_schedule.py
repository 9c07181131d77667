"""Layer plans, block lists and order files."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparsert.errors import InputError
from sparsert.schedule import LayerPlan, format_block_list, guarded_blocks, parse_block_list, read_block_order


def test_plan_keeps_what_is_not_removed() -> None:
    plan = LayerPlan.remove(32, [27, 21, 22, 23, 24, 25])
    assert plan.removed == (21, 22, 23, 24, 25, 27)
    assert plan.kept == (*range(21), 26, 28, 29, 30, 31)
    assert str(plan) == "26 of 32 blocks: 0-20,26,28-31 (removed: 21-25,27)"


def test_full_plan() -> None:
    plan = LayerPlan.full(3)
    assert plan.kept == (0, 1, 2) and plan.removed == ()
    assert str(plan) == "all 3 blocks"
    assert plan == LayerPlan.remove(3, [])


@pytest.mark.parametrize("index", [-1, 32, 99])
def test_plan_names_the_bad_index_and_the_range(index: int) -> None:
    with pytest.raises(InputError, match=rf"block {index}: the model has 32 blocks, numbered 0-31"):
        LayerPlan.remove(32, [10, index])


@pytest.mark.parametrize("index", [0, 1, 2, 3, 30, 31])
def test_guarded_blocks_need_force(index: int) -> None:
    assert index in guarded_blocks(32)
    with pytest.raises(InputError, match=rf"refusing to remove block {index} of 32.*blocks 4-29 can go.*force"):
        LayerPlan.remove(32, [10, index])
    assert index in LayerPlan.remove(32, [10, index], force=True).removed


def test_small_model_has_only_guarded_blocks() -> None:
    assert guarded_blocks(3) == {0, 1, 2}
    with pytest.raises(InputError, match="this model has no other blocks"):
        LayerPlan.remove(6, [3])


def test_plan_refuses_nonsense() -> None:
    with pytest.raises(InputError, match="all 2 blocks would be removed"):
        LayerPlan.remove(2, [0, 1], force=True)
    with pytest.raises(InputError, match="remove block 7 twice"):
        LayerPlan.remove(12, [7, 7])
    with pytest.raises(InputError, match="must ascend"):
        LayerPlan(4, (2, 1))
    with pytest.raises(InputError, match="at least one block"):
        LayerPlan.full(0)


def test_parse_block_list() -> None:
    assert parse_block_list("21-25,27") == (21, 22, 23, 24, 25, 27)
    assert parse_block_list(" 8 , 5 - 6,7-7") == (8, 5, 6, 7)


@pytest.mark.parametrize("text", ["", "a", "3,,4", "3-", "-3", "1.5", "1 2"])
def test_parse_block_list_names_the_bad_part(text: str) -> None:
    with pytest.raises(InputError, match="neither a block number nor a range; write it like 21-25,27"):
        parse_block_list(text)


def test_parse_block_list_refuses_backwards_repeated_and_endless() -> None:
    with pytest.raises(InputError, match="range 9-5 runs backwards; write 5-9"):
        parse_block_list("9-5")
    with pytest.raises(InputError, match="block 6 is named twice"):
        parse_block_list("5-7,6")
    with pytest.raises(InputError, match="longer than any model"):
        parse_block_list("1-99999999999")


def test_format_is_the_inverse_of_parse() -> None:
    assert format_block_list([27, 21, 22, 23, 24, 25]) == "21-25,27"
    assert parse_block_list(format_block_list([9, 1, 2, 4])) == (1, 2, 4, 9)


def _order_file(directory: Path, text: str) -> Path:
    path = directory / "block_order.csv"
    path.write_text(text)
    return path


def test_block_order_passes_over_guarded_blocks(tmp_path: Path) -> None:
    path = _order_file(tmp_path, "0,27,24,31,26,25")
    assert read_block_order(path, 3, 32) == (27, 24, 26)
    assert read_block_order(path, 3, 32, force=True) == (0, 27, 24)
    assert read_block_order(path, 0, 32) == ()
    assert LayerPlan.remove(32, read_block_order(path, 4, 32)).removed == (24, 25, 26, 27)


@pytest.mark.parametrize("count", [5, -1])
def test_block_order_count_out_of_range(tmp_path: Path, count: int) -> None:
    path = _order_file(tmp_path, "0,27,24,31,26,25\n")
    with pytest.raises(InputError, match=rf"remove {count} blocks, .* offers 4 candidates \(2 guarded.*ask for 0-4"):
        read_block_order(path, count, 32)


def test_block_order_of_another_model(tmp_path: Path) -> None:
    path = _order_file(tmp_path, "24,26,35")
    with pytest.raises(InputError, match=r"block_order.csv: cannot remove block 35: .* 32 blocks, numbered 0-31"):
        read_block_order(path, 1, 32)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("block\n24\n", "has 2 lines; one line"),
        ("", "has 0 lines; one line"),
        ("24,x,26", "'x' is no block number"),
        ("24,26,24", "remove block 24 twice"),
    ],
)
def test_block_order_damaged(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_block_order(_order_file(tmp_path, text), 1, 32)


def test_block_order_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere\.csv: cannot be read"):
        read_block_order(tmp_path / "nowhere.csv", 1, 32)
