"""finetune and distill as jobs: zeros kept, killed runs resumed to the same bits, what is written and refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_chat_model import BLOCKS, save_tokenizer
from tiny_llama import magnitude_prune_, make_llama, save
from torch import Tensor

from sparsert.checkpoint import open_checkpoint, prune_checkpoint
from sparsert.compress.training import Trainer
from sparsert.errors import CheckpointError, InputError, TrainingError, UnsupportedError
from sparsert.jobs import recovery
from sparsert.jobs.recovery_options import DistillOptions, FinetuneOptions, distill, finetune
from sparsert.jobs.training_run import read_log
from sparsert.models import load_model
from sparsert.schedule import LayerPlan

TEXT = (
    "The tower leans, and it has leaned for eight hundred years. Engineers took soil from under its northern side. "
    * 20
)
SIZES = {"num_hidden_layers": BLOCKS, "hidden_size": 48, "intermediate_size": 64}
LINEARS = 7 * BLOCKS


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher, its copies without two blocks and with 2:4 zeros, and a text."""
    place = tmp_path_factory.mktemp("models")
    vocabulary = save_tokenizer(place / "teacher")
    model = make_llama(vocab_size=vocabulary, **SIZES)
    save(model.to(torch.bfloat16), place / "teacher")
    source = open_checkpoint(place / "teacher")
    plan = LayerPlan.remove(BLOCKS, [4, 5])
    prune_checkpoint(source, place / "short", method="none", mask_maker=None, base_model="teacher", plan=plan)
    save_tokenizer(place / "narrow")
    save(make_llama(vocab_size=vocabulary, **{**SIZES, "hidden_size": 24, "num_hidden_layers": 3}), place / "narrow")
    save_tokenizer(place / "sparse")
    magnitude_prune_(model)
    save(model, place / "sparse")
    (place / "text.txt").write_text(TEXT)
    return place


def _options(kind: type, models: Path, output: Path, **changes: Any) -> Any:
    options: dict[str, Any] = {
        "model": str(models / "sparse"),
        "output": str(output),
        "text": (str(models / "text.txt"),),
        "window": 24,
        "steps": 6,
        "batch_size": 4,
        "learning_rate": 3e-3,
        "warmup_steps": 1,
        "save_every": 2,
        "device": "cpu",
    }
    if kind is DistillOptions:
        options["teacher"] = str(models / "teacher")
    return kind(**{**options, **changes})


def _weights(directory: Path) -> dict[str, Tensor]:
    checkpoint = open_checkpoint(directory)
    return {name: checkpoint.read(name) for name in checkpoint.names}


@pytest.mark.parametrize("train", ["full", "lora"])
@pytest.mark.parametrize("job", ["finetune", "distill"])
def test_a_2_4_model_learns_and_stays_2_4(models: Path, tmp_path: Path, job: str, train: str) -> None:
    kind, run = (FinetuneOptions, finetune) if job == "finetune" else (DistillOptions, distill)
    text = (str(models / "text.txt"),)
    options = _options(kind, models, tmp_path / "out", train=train, steps=15, evaluate_text=text, evaluate_windows=5)
    result = run(options)
    assert result is not None and result.perplexity is not None
    assert result.masked_linears == LINEARS and result.tokens == 15 * 4 * 24
    if job == "finetune":  # a random teacher knows nothing of the text
        assert result.perplexity[1] < 0.9 * result.perplexity[0]
    before, after = _weights(models / "sparse"), _weights(tmp_path / "out")
    assert before.keys() == after.keys()
    for name, weight in after.items():
        assert weight.dtype == before[name].dtype == torch.bfloat16
        if name.endswith("_proj.weight"):
            assert not bool(weight[before[name] == 0].count_nonzero()), name
            assert not torch.equal(weight, before[name]), name
        elif train == "lora":
            assert torch.equal(weight, before[name]), name
    loaded = load_model(open_checkpoint(tmp_path / "out"), device="cpu")
    assert loaded.report.count("2:4") == LINEARS
    record = open_checkpoint(tmp_path / "out").config["sparsert"]["recovery"]
    assert [entry["method"] for entry in record] == ["finetuning" if job == "finetune" else "distillation"]
    log = read_log(tmp_path / "out.training")
    assert len(log) == 15 and log[-1]["loss"] < 0.97 * log[0]["loss"]
    assert ("logit_loss" in log[0]) == (job == "distill")
    # the perplexity in the log is that of the last step, before an adapter was merged and rounded
    assert log[-1]["perplexity"] == pytest.approx(result.perplexity[1], rel=2e-2)
    assert "15 updates" in result.to_text() and not (tmp_path / "out.training" / "state.pt").exists()


@pytest.mark.gpu
@pytest.mark.parametrize("train", ["full", "lora"])
def test_compiled_blocks_learn_the_same(models: Path, tmp_path: Path, train: str) -> None:
    from torch._dynamo.utils import counters

    losses = []
    for compiled in (False, True):
        counters.clear()
        changes = {"train": train, "compile": compiled, "device": "cuda", "dtype": "float32", "states": True}
        distill(_options(DistillOptions, models, tmp_path / f"out-{compiled}", steps=4, **changes))
        losses.append([row["loss"] for row in read_log(tmp_path / f"out-{compiled}.training")])
        assert bool(counters["frames"]["ok"]) == compiled
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"train": "lora", "dropout": 0.3},
        {"dtype": "bfloat16", "optimizer_state": "bfloat16", "states": True, "embedding": True, "micro_batch": 2},
        {"recompute": True},
        {"model": "narrow", "states": True, "embedding": True, "optimizer_state": "int8"},
    ],
    ids=["full", "lora with dropout", "bfloat16, states", "recompute", "projection, int8"],
)
def test_a_killed_run_goes_on_to_the_same_bits(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    changes = {**changes, "model": str(models / changes.get("model", "short"))}
    distill(_options(DistillOptions, models, tmp_path / "whole", **changes))
    step = Trainer.train_step

    def dying(trainer: Trainer) -> Any:
        if trainer.step == 5:
            raise Killed
        return step(trainer)

    monkeypatch.setattr(Trainer, "train_step", dying)
    with pytest.raises(Killed):
        distill(_options(DistillOptions, models, tmp_path / "again", **changes))
    monkeypatch.undo()
    assert not (tmp_path / "again").exists()
    with pytest.raises(InputError, match="--resume"):
        distill(_options(DistillOptions, models, tmp_path / "again", **changes))
    distill(_options(DistillOptions, models, tmp_path / "again", resume=True, **changes))
    whole, again = _weights(tmp_path / "whole"), _weights(tmp_path / "again")
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    start = _weights(Path(changes["model"]))
    assert not all(torch.equal(whole[name], start[name]) for name in whole)


def test_recomputed_activations_change_nothing(models: Path, tmp_path: Path) -> None:
    for name, recompute in (("plain", False), ("recomputed", True)):
        options = _options(
            DistillOptions,
            models,
            tmp_path / name,
            model=str(models / "short"),
            recompute=recompute,
            state_blocks=(2, 3),
        )
        distill(options)
    plain, recomputed = _weights(tmp_path / "plain"), _weights(tmp_path / "recomputed")
    assert all(torch.equal(plain[name], recomputed[name]) for name in plain)


def test_the_student_knows_which_blocks_it_lacks(models: Path) -> None:
    short = open_checkpoint(models / "short")
    assert recovery._kept_blocks(short, BLOCKS - 2, BLOCKS) == [0, 1, 2, 3, 6, 7]
    assert recovery._kept_blocks(short, BLOCKS - 2, BLOCKS + 1) is None
    assert recovery._kept_blocks(open_checkpoint(models / "teacher"), BLOCKS, BLOCKS) is None


def test_zeros_may_be_given_up_and_the_record_says_so(models: Path, tmp_path: Path) -> None:
    from sparsert.compress import magnitude_mask

    source = open_checkpoint(models / "teacher")
    prune_checkpoint(
        source,
        tmp_path / "pruned",
        method="magnitude",
        mask_maker=lambda name, weight: magnitude_mask(weight, name=name),
        base_model="teacher",
    )
    options = _options(FinetuneOptions, models, tmp_path / "out", model=str(tmp_path / "pruned"), preserve_zeros=False)
    result = finetune(options)
    assert result is not None and result.masked_linears == 0
    assert open_checkpoint(tmp_path / "pruned").config["sparsert"]["pattern"] == "2:4"
    assert open_checkpoint(tmp_path / "out").config["sparsert"]["pattern"] is None
    with pytest.warns(UserWarning, match="no linear layer is 2:4"):
        load_model(open_checkpoint(tmp_path / "out"), device="cpu")


def test_a_loss_that_is_no_number_ends_the_run_and_keeps_the_state(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss = recovery._Student._label_loss

    def breaking(student: Any, tokens: Tensor, position: Any) -> Tensor:
        return loss(student, tokens, position) * (float("nan") if position.step == 3 else 1.0)

    monkeypatch.setattr(recovery._Student, "_label_loss", breaking)
    with pytest.raises(TrainingError, match="step 4: the loss is nan"):
        finetune(_options(FinetuneOptions, models, tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    state = torch.load(tmp_path / "out.training" / "state.pt", weights_only=True)
    assert state["step"] == 2


def test_a_full_disk_while_saving_loses_nothing(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sparsert.checkpoint import writer

    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer, "write_shards", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        finetune(_options(FinetuneOptions, models, tmp_path / "out"))
    monkeypatch.undo()
    assert not (tmp_path / "out").exists() and (tmp_path / "out.training" / "state.pt").is_file()
    result = finetune(_options(FinetuneOptions, models, tmp_path / "out", resume=True))
    assert result is not None and len(read_log(tmp_path / "out.training")) == 6


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (FinetuneOptions, {"text": ("empty.txt",)}, "holds no text"),
        (FinetuneOptions, {"text": ("short.txt",)}, "one window takes 24; give more text"),
        (FinetuneOptions, {"window": 600}, "--window 600: the model reads 512"),
        (FinetuneOptions, {"dtype": "float16"}, "small gradients vanish"),
        (
            FinetuneOptions,
            {"train": "lora", "targets": ("c_attn",)},
            "no linear layer of the blocks is called 'c_attn'",
        ),
        (FinetuneOptions, {"train": "lora", "dropout": 0.1, "recompute": True}, "--recompute would draw another"),
        (FinetuneOptions, {"evaluate_text": ("short.txt",)}, "one window takes 24"),
        (DistillOptions, {"temperature": 0.0}, "temperature is 0.0"),
        (DistillOptions, {"state_blocks": (9,)}, "the student has no block 9"),
        (DistillOptions, {"logit_weight": 0.0}, "nothing to learn"),
    ],
)
def test_bad_input(models: Path, tmp_path: Path, kind: type, changes: dict[str, Any], message: str) -> None:
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "short.txt").write_text("Too short.")
    for key in ("text", "evaluate_text"):
        if key in changes:
            changes = {**changes, key: tuple(str(tmp_path / file) for file in changes[key])}
    with pytest.raises(InputError, match=message):
        (distill if kind is DistillOptions else finetune)(_options(kind, models, tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


def test_a_teacher_of_another_vocabulary(models: Path, tmp_path: Path) -> None:
    save(make_llama(vocab_size=300, num_hidden_layers=2), tmp_path / "teacher")
    with pytest.raises(InputError, match="vocabulary has 259 entries, the teacher's 300"):
        distill(_options(DistillOptions, models, tmp_path / "out", teacher=str(tmp_path / "teacher")))


def test_lora_without_peft(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    import sparsert.compress

    monkeypatch.delattr(sparsert.compress, "low_rank", raising=False)
    monkeypatch.delitem(sys.modules, "sparsert.compress.low_rank", raising=False)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UnsupportedError, match=r"needs peft .*pip install 'sparsert\[peft\]'"):
        finetune(_options(FinetuneOptions, models, tmp_path / "out", train="lora"))


def test_the_command_line_runs_a_config_file(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from sparsert.cli import main

    config = {
        "model": str(models / "sparse"),
        "teacher": str(models / "teacher"),
        "text": [str(models / "text.txt")],
        "window": 24,
        "steps": 2,
        "batch-size": 2,
        "device": "cpu",
    }
    (tmp_path / "job.json").write_text(json.dumps(config))
    code = main(["distill", "--config", str(tmp_path / "job.json"), "--output", str(tmp_path / "out"), "--json"])
    assert code == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 2
    report = ["report", "--model", str(models / "short"), "--text", str(models / "text.txt"), "--window", "24"]
    report += ["--windows", "2", "--device", "cpu", "--output", str(tmp_path / "report.json"), "--save", "0.05"]
    assert main([*report, "--method", "magnitude"]) == 0
    assert "plans that save" in capsys.readouterr().out
    depth = ["prune", "depth", "--model", str(models / "teacher"), "--text", str(models / "text.txt"), "--window", "24"]
    depth += ["--windows", "2", "--device", "cpu", "--output", str(tmp_path / "depth"), "--criterion", "taylor"]
    assert main([*depth, "--count", "1"]) == 0
    assert "7 of 8 blocks" in capsys.readouterr().out
    width = ["prune", "width", *depth[2:-3], str(tmp_path / "width"), "--intermediate", "48", "--multiple", "16"]
    assert main(width) == 0
    assert "intermediate 48" in capsys.readouterr().out
    assert main(["prune", "depth", "--config", str(tmp_path / "job.json"), "--output", "x", "--count", "1"]) == 2
    assert "no option is called 'teacher'" in capsys.readouterr().err
