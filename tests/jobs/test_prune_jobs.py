"""prune depth, prune width and report as jobs: what they write, how they go on, what they refuse."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_chat_model import BLOCKS, save_chat_model
from tiny_llama import magnitude_prune_, make_llama, save

from sparsert.checkpoint import open_checkpoint
from sparsert.compress.anatomy import anatomy_of
from sparsert.compress.score_windows import mean_loss, perplexity
from sparsert.errors import CheckpointError, InputError, UnsupportedError
from sparsert.jobs import calibration_job
from sparsert.jobs.prune_depth import DepthOptions, prune_depth
from sparsert.jobs.prune_width import prune_width
from sparsert.jobs.sensitivity_report import ReportOptions, report
from sparsert.jobs.width_options import WidthOptions
from sparsert.models import load_model
from sparsert.schedule import LayerPlan, read_block_order

TEXT = (
    "The tower leans, and it has leaned for eight hundred years. Engineers took soil from under its northern side. "
    * 30
)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A directory with a model and a text."""
    save_chat_model(tmp_path / "model", hidden_size=48, intermediate_size=64)
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path


def _paths(place: Path, output: str) -> dict[str, Any]:
    return {"model": str(place / "model"), "output": str(place / output)}


def _depth(place: Path, **changes: Any) -> DepthOptions:
    options = {"text": (str(place / "text.txt"),), "window": 32, "windows": 6, "count": 2, "device": "cpu"}
    return DepthOptions(**{**_paths(place, "out"), **options, **changes})


def _width(place: Path, **changes: Any) -> WidthOptions:
    options = {"text": (str(place / "text.txt"),), "window": 32, "windows": 6, "multiple": 16, "device": "cpu"}
    return WidthOptions(**{**_paths(place, "out"), **options, **changes})


def _report(place: Path, **changes: Any) -> ReportOptions:
    options = {"text": (str(place / "text.txt"),), "window": 32, "windows": 4, "device": "cpu"}
    return ReportOptions(**{**_paths(place, "report.json"), **options, **changes})


def test_depth_writes_the_model_the_plan_and_the_order(place: Path) -> None:
    result = prune_depth(_depth(place))
    plan = LayerPlan.from_json((place / "out" / "layer_plan.json").read_text())
    assert plan == result.choice.plan and plan.removed == (4, 5)
    assert sorted(read_block_order(place / "out" / "block_order.csv", 2, BLOCKS)) == [4, 5]
    checkpoint = open_checkpoint(place / "out")
    assert checkpoint.num_blocks == BLOCKS - 2 and checkpoint.config["sparsert"]["removed_blocks"] == [4, 5]
    scores = json.loads((place / "out" / "depth_scores.json").read_text())
    assert len(scores["rounds"][0]) == BLOCKS and scores["criterion"] == "perplexity"
    # what the job says of the shorter model is what the written one does
    options = dataclasses.replace(_depth(place), model=str(place / "out"))
    written = calibration_job.open_job(options)
    assert written.windows is not None and result.perplexity is not None
    loss = mean_loss(written.anatomy, written.windows, batch_size=4)
    assert result.perplexity[1] == pytest.approx(math.exp(loss), rel=1e-4)
    assert "6 of 8 blocks" in result.to_text() and result.to_dict()["removed_blocks"] == [4, 5]
    assert (place / "out" / "tokenizer.json").is_file() and not (place / "out.measured").exists()


def test_magnitude_needs_no_text_and_a_plan_no_model(place: Path) -> None:
    result = prune_depth(_depth(place, text=(), criterion="magnitude", plan_only=True))
    assert sorted(file.name for file in (place / "out").iterdir()) == [
        "block_order.csv",
        "depth_scores.json",
        "layer_plan.json",
    ]
    assert result.perplexity is None and result.total_bytes == 0 and "order and plan only" in result.to_text()


def test_a_killed_depth_job_goes_on_to_the_same_result(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = prune_depth(_depth(place, mode="iterative"))
    calls = 0

    def dying(*arguments: Any, **options: Any) -> float:
        nonlocal calls
        calls += 1
        if calls == 11:
            raise KeyboardInterrupt
        return perplexity(*arguments, **options)

    options = _depth(place, mode="iterative", output=str(place / "again"))
    monkeypatch.setattr("sparsert.compress.block_scores.perplexity", dying)
    with pytest.raises(KeyboardInterrupt):
        prune_depth(options)
    assert not (place / "again").exists()
    calls = 100
    resumed = prune_depth(dataclasses.replace(options, resume=True))
    # 8 + 7 scores and the whole model, ten known; the shorter model was one of the second round
    assert calls - 100 == 8 + 7 + 1 - 10
    assert resumed.choice == whole.choice and resumed.perplexity == whole.perplexity


def test_depth_of_a_model_that_is_2_4_keeps_its_zeros(place: Path) -> None:
    model = make_llama(num_hidden_layers=BLOCKS, hidden_size=48, intermediate_size=64)
    magnitude_prune_(model)
    save(model, place / "sparse")
    ids = place / "ids.npy"
    np.save(ids, np.arange(2000) * 7 % 211)
    prune_depth(_depth(place, model=str(place / "sparse"), text=(str(ids),), criterion="influence"))
    loaded = load_model(open_checkpoint(place / "out"), device="cpu")
    assert loaded.report.count("2:4") == 7 * (BLOCKS - 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"count": 3}, r"asked to remove 3 of 8 blocks, but only 2 can go"),
        ({"text": ()}, "criterion perplexity needs calibration text; give --text FILE"),
        ({"windows": 4000}, "4000 windows of 32 tokens are wanted and the text has"),
        ({"window": 5000}, "--window 5000: the model reads 512 tokens at most"),
        ({"text": ("empty.txt",)}, "holds no text"),
        ({"window": 400, "text": ("short.txt",)}, "one window takes 400; give more text, or a shorter window"),
    ],
)
def test_depth_refuses_what_it_cannot_do(place: Path, changes: dict[str, Any], message: str) -> None:
    (place / "empty.txt").write_text("\n")
    (place / "short.txt").write_text("Too short.")
    if "text" in changes:
        changes = {**changes, "text": tuple(str(place / file) for file in changes["text"])}
    with pytest.raises(InputError, match=message):
        prune_depth(_depth(place, **changes))
    assert not (place / "out").exists() and not (place / "out.measured").exists()


def test_a_full_disk_leaves_nothing_and_forgets_nothing(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sparsert.checkpoint import writer

    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer, "write_shards", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        prune_depth(_depth(place))
    monkeypatch.undo()
    assert not (place / "out").exists()
    assert len((place / "out.measured" / "values.jsonl").read_text().splitlines()) == BLOCKS + 2
    assert prune_depth(_depth(place, resume=True)).choice.plan.removed == (4, 5)


def test_broken_weights_stop_a_job(place: Path) -> None:
    model = make_llama(num_hidden_layers=BLOCKS, hidden_size=48, intermediate_size=64, vocab_size=259)
    model.model.norm.weight.fill_(float("inf"))
    for file in (place / "model").glob("*.safetensors"):
        file.unlink()
    model.save_pretrained(place / "model")
    with pytest.raises((InputError, CheckpointError), match=r"nan|infinite"):
        prune_depth(_depth(place))


def test_width_by_sizes(place: Path) -> None:
    result = prune_width(_width(place, hidden=36, intermediate=50, heads=4))
    assert (result.widths.hidden, result.widths.intermediate) == (32, 48)
    assert (result.widths.heads, result.widths.kv_heads, result.widths.head_dim) == (4, 2, 24)
    with pytest.raises(UnsupportedError, match=r"hidden size \(32\) is not a multiple of .* heads \(3\)"):
        prune_width(_width(place, hidden=32, kv_heads=1, output=str(place / "other")))


def test_width_writes_a_plain_checkpoint(place: Path) -> None:
    result = prune_width(_width(place, intermediate=48, heads=4))
    checkpoint = open_checkpoint(place / "out")
    assert checkpoint.config["num_attention_heads"] == 4 and checkpoint.config["head_dim"] == 24
    assert checkpoint.config["sparsert"]["method"] == "width" and checkpoint.config["sparsert"]["base_model"] == "model"
    loaded = load_model(checkpoint, device="cpu")
    assert loaded.config.intermediate_size == 48
    job = calibration_job.open_job(dataclasses.replace(_width(place), model=str(place / "out")))
    assert job.held_out is not None
    assert result.losses[1] == pytest.approx(mean_loss(job.anatomy, job.held_out, batch_size=4), rel=1e-4)
    scores = json.loads((place / "out" / "width_scores.json").read_text())
    assert scores["widths"]["intermediate"] == 48
    assert "before recovery" in result.to_text() and (place / "out" / "tokenizer_config.json").is_file()


def test_width_by_a_budget_measures_candidates(place: Path) -> None:
    whole = sum(p.numel() for p in anatomy_of(make_llama(num_hidden_layers=BLOCKS, hidden_size=48)).model.parameters())
    result = prune_width(
        _width(place, parameters=0.5 * whole, most_width=0.5, most_depth=0.25, top=3, search_steps=2, batch_size=2)
    )
    assert 1 < len(result.tried) <= 3
    losses = [one.loss for one in result.tried]
    assert losses == sorted(losses) and result.losses[1] == losses[0]
    assert result.parameters <= 0.5 * whole and all(one.cost <= 0.5 * whole for one in result.tried)
    checkpoint = open_checkpoint(place / "out")
    assert checkpoint.num_blocks == result.blocks
    stored = sum(math.prod(checkpoint.shape(name)) for name in checkpoint.names if len(checkpoint.shape(name)) == 2)
    assert stored == result.parameters
    assert (
        not list(place.glob(".out*"))
        and load_model(checkpoint, device="cpu").config.hidden_size == result.widths.hidden
    )


def test_width_by_measured_microseconds(place: Path) -> None:
    rows = [
        {
            "out_features": size,
            "in_features": size,
            "batch": 1,
            "contender": contender,
            "correct": True,
            "time_us": {"median": size / 16},
        }
        for size in (16, 128, 512)
        for contender in ("dense", "ours")
    ]
    record = {"kind": "kernels", "machine": {"gpu": "Test"}, "results": rows}
    (place / "times.json").write_text(json.dumps(record))
    result = prune_width(_width(place, us=150.0, layer_times=str(place / "times.json"), top=2, most_width=0.5))
    assert all(one.cost <= 150.0 for one in result.tried)
    with pytest.raises(InputError, match="no architecture fits 1 us"):
        prune_width(_width(place, us=1.0, layer_times=str(place / "times.json"), output=str(place / "b")))
    with pytest.raises(InputError, match=r"times.json: the table has no times at batch 4; it has 1"):
        prune_width(_width(place, us=9.0, layer_times=str(place / "times.json"), batch=4, output=str(place / "c")))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "say how narrow: sizes .* or one budget"),
        ({"hidden": 32, "bytes": 1e6}, "say how narrow"),
        ({"us": 5.0}, "--us needs measured times; give --layer-times with a record of `sparsert bench kernels`"),
        ({"us": 5.0, "layer_times": "missing.json"}, "--layer-times missing.json: cannot be read"),
        ({"hidden": 64}, "hidden is to be 64, the model has 48"),
        ({"parameters": 10.0}, "no architecture fits 10 parameters"),
    ],
)
def test_width_refuses_what_it_cannot_do(place: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        prune_width(_width(place, **changes))
    assert not (place / "out").exists() and not (place / "out.measured").exists()


def test_width_of_a_2_4_model_is_refused(place: Path) -> None:
    model = make_llama(num_hidden_layers=2, hidden_size=48, intermediate_size=64, vocab_size=259)
    magnitude_prune_(model)
    for file in (place / "model").glob("*.safetensors"):
        file.unlink()
    model.save_pretrained(place / "model")
    with pytest.raises(InputError, match="weights are 2:4 already"):
        prune_width(_width(place, intermediate=32))


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_report_measures_and_suggests(place: Path, method: str) -> None:
    result = report(_report(place, method=method, save=0.15))
    record = json.loads((place / "report.json").read_text())
    assert len(record["changes"]) == BLOCKS * 8 and record["method"] == method
    assert record == json.loads(json.dumps(result.to_dict()))
    by_kind = {plan["kind"]: plan for plan in record["plans"]}
    assert set(by_kind) == {"blocks", "masks", "both"}
    for plan in by_kind.values():
        assert plan["saved"] >= 0.15 * record["nbytes"] and plan["loss"] > 0
    assert len(by_kind["blocks"]["removed_blocks"]) == 2 and not by_kind["blocks"]["masked"]
    text = result.to_text()
    assert text.count("\n") > BLOCKS + 4 and "down" in text and "measured" in text


def test_report_says_which_plans_cannot_be(place: Path) -> None:
    text = report(_report(place, save=0.4)).to_text()
    assert "blocks: " in text and "cannot be saved by blocks: all that may go saves" in text
    with pytest.raises(InputError, match="cannot be saved by both"):
        report(_report(place, save=0.95, output=str(place / "b.json")))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"save": 1.5}, r"--save 1\.5: give a share above 0 and below 1"),
        ({"save_us": 0.2}, "--save-us needs measured times"),
        ({"output": "."}, "must be a file in a directory that exists"),
    ],
)
def test_report_refuses_what_it_cannot_do(place: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        report(_report(place, **changes))


def test_the_picture_is_drawn_or_refused_at_once(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = _report(place, png=str(place / "picture.png"))
    monkeypatch.setattr("sparsert.jobs.sensitivity_report.importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="matplotlib, which is not installed"):
        report(options)
    monkeypatch.undo()
    pytest.importorskip("matplotlib")
    report(options)
    assert (place / "picture.png").read_bytes()[:4] == b"\x89PNG"
