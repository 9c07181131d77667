"""The recipes at toy size: every stage runs, rows are complete, and a second run does nothing again."""

from __future__ import annotations

import importlib
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tiny_chat_model import save_chat_model

from sparsert.checkpoint import open_checkpoint

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
TEXT = (
    "The tower leans, and it has leaned for eight hundred years. Engineers took soil from under its northern side. "
    * 20
)


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    """Options that make a recipe a matter of seconds."""
    save_chat_model(tmp_path / "model", hidden_size=48, intermediate_size=64)
    (tmp_path / "text.txt").write_text(TEXT)
    text = str(tmp_path / "text.txt")
    paths = [
        "--model",
        str(tmp_path / "model"),
        "--text",
        text,
        "--evaluate-text",
        text,
        "--work",
        str(tmp_path / "work"),
    ]
    sizes = {"window": 24, "windows": 3, "evaluate-windows": 4, "steps": 3, "batch-size": 2, "micro-batch": 2}
    return [*paths, "--device", "cpu", *(part for name, size in sizes.items() for part in (f"--{name}", str(size)))]


def _recipe(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    for module in ("recipe", name):
        monkeypatch.delitem(sys.modules, module, raising=False)
    return importlib.import_module(name)


def _check(rows: dict[str, dict[str, float]], expected: list[str]) -> None:
    assert list(rows) == expected
    for name, row in rows.items():
        assert math.isfinite(row["perplexity"]) and row["perplexity"] > 1 and row["MB"] > 0, name
    assert rows["dense"]["share"] == 1.0


def test_depth(arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    depth = _recipe("depth", monkeypatch)
    rows = depth.main([*arguments, "--count", "2"])
    criteria = [name for choice in depth.CHOICES for name in (choice, f"{choice}, distilled")]
    more = ["perplexity, distilled with states", "perplexity, finetuned", "perplexity, LoRA"]
    _check(rows, ["dense", *criteria, *more])
    assert rows["perplexity"]["MB"] < rows["dense"]["MB"]
    printed = capsys.readouterr().out
    assert "| perplexity, LoRA |" in printed and "of the lost log-perplexity is back" in printed

    def never(*given: Any, **options: Any) -> None:
        raise AssertionError("this was done before")

    for name in ("prune_depth", "distill", "finetune"):
        monkeypatch.setattr(depth, name, never)
    assert depth.main([*arguments, "--count", "2"]) == rows
    with pytest.raises(SystemExit, match="holds results of other options"):
        depth.main([*arguments, "--count", "1"])


def test_width(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    width = _recipe("width", monkeypatch)
    rows = width.main([*arguments, "--intermediate", "32", "--kv-heads", "1", "--multiple", "16"])
    starts = [f"{start}, {how}" for start in ("trimmed", "random") for how in ("finetuned", "distilled")]
    _check(rows, ["dense", "trimmed", "random", *starts])
    assert rows["trimmed"]["MB"] == pytest.approx(rows["random"]["MB"], rel=0.01) and rows["trimmed"]["share"] != 1.0


def test_depth_and_masks(arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    composed = _recipe("depth_and_masks", monkeypatch)
    rows = composed.main([*arguments, "--count", "2", "--mask-steps", "2", "--samples", "4"])
    both = ["masked, then shorter", "shorter, then masked", "shorter, then masked, distilled"]
    _check(rows, ["dense", "shorter", "masked", *both])
    for name in both:
        checkpoint = open_checkpoint(tmp_path / "work" / name)
        assert checkpoint.num_blocks == 6
        for weight in checkpoint.block_linears():
            assert int((checkpoint.read(weight).view(-1, 4) != 0).sum(1).max()) <= 2, (name, weight)
