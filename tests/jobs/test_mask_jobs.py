"""`prune mask` and `learn-masks` as a user runs them: files in, files out, killed and resumed, refused."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_llama import VOCABULARY, make_llama, save

from sparsert.checkpoint import open_checkpoint, read_maskllm
from sparsert.cli import EXIT_USER_ERROR, main
from sparsert.compress import training
from sparsert.compress.magnitude import magnitude_mask
from sparsert.formats.groups import count_groups
from sparsert.jobs import training_run

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("mask_jobs") / "tiny"
    return save(make_llama(num_hidden_layers=2).bfloat16(), directory)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "ids.npy"
    ids = torch.randint(3, VOCABULARY, (3000,), generator=torch.Generator().manual_seed(1))
    np.save(file, ids.numpy().astype(np.uint16))
    return file


def run(*words: object) -> int:
    return main([str(word) for word in words])


def prune_mask(model: Path, *words: object) -> int:
    return run("prune", "mask", "--model", model, "--window", 32, "--device", "cpu", "--samples", 20, *words)


def learn(model: Path, text: Path, *words: object) -> int:
    options = ("--window", 32, "--steps", 6, "--batch-size", 4, "--samples", 8, "--device", "cpu", "--save-every", 2)
    return run("learn-masks", "--model", model, "--text", text, *options, *words)


def error_of(capsys: Capture, code: int) -> str:
    assert code == EXIT_USER_ERROR
    return " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_one_shot_masks_as_checkpoint_and_file(
    method: str, model: Path, text: Path, tmp_path: Path, capsys: Capture
) -> None:
    places = ("--output", tmp_path / "pruned", "--masks-output", tmp_path / "masks.npz", "--json")
    words = () if method == "magnitude" else ("--text", text)
    assert prune_mask(model, "--method", method, *words, *places) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["masked_linears"] == 14 and record["dense_linears"] == 0 and record["method"] == method
    source, pruned, masks = (
        open_checkpoint(model),
        open_checkpoint(tmp_path / "pruned"),
        read_maskllm(tmp_path / "masks.npz"),
    )
    assert pruned.config["sparsert"]["method"] == method and pruned.config["sparsert"]["pattern"] == "2:4"
    assert pruned.config["sparsert"]["base_model"] == "tiny"
    same = 0
    for name in source.block_linears():
        mask = masks.mask(name, source.shape(name))
        assert bool((mask.view(-1, 4).sum(1) == 2).all())
        assert torch.equal(pruned.read(name), source.read(name) * mask)
        same += torch.equal(mask, magnitude_mask(source.read(name)))
    assert (same == 14) == (method == "magnitude")
    assert torch.equal(pruned.read("lm_head.weight"), source.read("lm_head.weight"))


def test_update_weights_writes_other_weights_of_the_same_dtype(model: Path, text: Path, tmp_path: Path) -> None:
    words = ("--text", text, "--method", "sparsegpt", "--update-weights")
    assert prune_mask(model, *words, "--output", tmp_path / "updated", "--masks-output", tmp_path / "m.npz") == 0
    source, updated = open_checkpoint(model), open_checkpoint(tmp_path / "updated")
    for name in source.block_linears():
        weight = updated.read(name)
        mask = read_maskllm(tmp_path / "m.npz").mask(name, source.shape(name))
        assert weight.dtype == torch.bfloat16 and count_groups(weight)[1] == 0
        assert not bool(weight[~mask].any()) and not torch.equal(weight[mask], source.read(name)[mask])
    assert updated.config["sparsert"]["method"] == "sparsegpt, weights updated"


def test_weights_fitted_to_given_masks(model: Path, text: Path, tmp_path: Path) -> None:
    assert prune_mask(model, "--method", "magnitude", "--masks-output", tmp_path / "m.npz") == 0
    words = ("--masks", tmp_path / "m.npz", "--update-weights", "--text", text, "--to", "sparsert")
    assert prune_mask(model, *words, "--output", tmp_path / "fitted") == 0
    source, fitted = open_checkpoint(model), open_checkpoint(tmp_path / "fitted")
    name = source.block_linears()[3]
    mask = magnitude_mask(source.read(name))
    assert fitted.storage(name) == "sparse-24-bitmask"
    assert not bool(fitted.read(name)[~mask].any()) and not torch.equal(
        fitted.read(name)[mask], source.read(name)[mask]
    )


def test_kept_dense_layers(model: Path, text: Path, tmp_path: Path) -> None:
    words = ("--text", text, "--method", "wanda", "--keep-dense", "*.layers.1.*", "*.q_proj")
    assert prune_mask(model, *words, "--output", tmp_path / "out", "--masks-output", tmp_path / "m.npz") == 0
    source, pruned = open_checkpoint(model), open_checkpoint(tmp_path / "out")
    assert len(read_maskllm(tmp_path / "m.npz")) == 6
    assert len(pruned.config["sparsert"]["dense_linears"]) == 8
    for name in pruned.config["sparsert"]["dense_linears"]:
        assert torch.equal(pruned.read(name), source.read(name))


class Killed(BaseException):
    """Stands for the end of the process: nothing may catch it."""


def kill_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    real = training.Trainer.train_step

    def train_step(self: training.Trainer) -> Any:
        if self.step == step:
            raise Killed
        return real(self)

    monkeypatch.setattr(training.Trainer, "train_step", train_step)


def test_learned_masks_are_the_same_when_killed_and_resumed(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    places = ("--output", tmp_path / "whole", "--masks-output", tmp_path / "whole.npz")
    assert learn(model, text, *places, "--evaluate-text", text, "--evaluate-every", 3, "--json") == 0
    record = json.loads(capsys.readouterr().out)
    assert record["method"] == "maskllm" and record["measured"]["perplexity"] > 1
    log = training_run.read_log(tmp_path / "whole.training")
    assert [line["step"] for line in log if "perplexity" in line] == [3, 6]
    assert not (tmp_path / "whole.training" / "state.pt").exists()

    prior = read_maskllm(tmp_path / "whole.training" / "prior.npz")
    learned = read_maskllm(tmp_path / "whole.npz")
    source, pruned = open_checkpoint(model), open_checkpoint(tmp_path / "whole")
    changed = 0.0
    for name in source.block_linears():
        mask = learned.mask(name, source.shape(name))
        assert torch.equal(pruned.read(name), source.read(name) * mask)
        changed += float((mask != prior.mask(name, source.shape(name))).float().mean()) / 14
    assert 0.001 < changed < 0.5

    for step in (0, 1, 3, 5):
        output = tmp_path / f"killed{step}"
        with monkeypatch.context() as patch:
            kill_at(patch, step)
            with pytest.raises(Killed):
                learn(model, text, "--output", output)
        assert not output.exists()
        capsys.readouterr()
        if step >= 2:  # a state was saved
            assert "holds a run that has not ended; go on with --resume" in error_of(
                capsys, learn(model, text, "--output", output)
            )
            wrong = error_of(capsys, learn(model, text, "--output", output, "--resume", "--learning-rate", 1))
            assert "differs in options.learning_rate; give it the same options" in wrong
        assert learn(model, text, "--output", output, "--resume", "--save-every", 3) == 0
        again = open_checkpoint(output)
        assert all(torch.equal(again.read(name), pruned.read(name)) for name in source.block_linears())


def test_transfer_from_masks_and_a_config_file(model: Path, text: Path, tmp_path: Path) -> None:
    assert prune_mask(model, "--method", "magnitude", "--masks-output", tmp_path / "m.npz") == 0
    config = tmp_path / "job.json"
    config.write_text(
        json.dumps(
            {"masks": str(tmp_path / "m.npz"), "steps": 2, "prior_strength": 50, "bos": False, "recompute": True}
        )
    )
    words = ("--window", 32, "--batch-size", 2, "--device", "cpu", "--masks-output", tmp_path / "out.npz")
    assert run("learn-masks", "--config", config, "--model", model, "--text", text, *words) == 0
    first, second = read_maskllm(tmp_path / "m.npz"), read_maskllm(tmp_path / "out.npz")
    source = open_checkpoint(model)
    for name in source.block_linears():  # so strong a prior stays what it is
        assert torch.equal(first.mask(name, source.shape(name)), second.mask(name, source.shape(name)))
    assert not (tmp_path / "out.npz.training" / "prior.npz").exists()


def test_what_is_refused(model: Path, text: Path, tmp_path: Path, capsys: Capture) -> None:
    out = ("--output", tmp_path / "out")

    def prune_error(*words: object) -> str:
        return error_of(capsys, prune_mask(model, *words))

    assert "there is nowhere to write to" in prune_error("--method", "magnitude")
    assert "wanda needs a calibration text; give --text FILE" in prune_error("--method", "wanda", *out)
    assert "20 windows of 1000 tokens are wanted" in prune_error("--text", text, *out, "--window", 1000)
    assert "changes no weights" in prune_error("--method", "wanda", "--update-weights", "--text", text, *out)
    assert "needs --update-weights" in prune_error("--masks", "m.npz", "--text", text, *out)
    assert "choose a name that ends so" in prune_error("--method", "magnitude", "--masks-output", tmp_path / "m.pt")
    assert "matches no linear layer" in prune_error("--method", "magnitude", "--keep-dense", "*.fc1", *out)
    assert "has no tokenizer" in prune_error("--text", tmp_path / "text.txt", *out)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert "not an empty directory" in prune_error("--method", "magnitude", "--output", tmp_path / "full")
    assert "--dtype float16" in error_of(capsys, learn(model, text, *out, "--dtype", "float16"))
    assert "--model: must be given" in error_of(capsys, run("learn-masks", "--text", text, *out))
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.training").exists()


def test_pruned_and_packed_models_are_refused(model: Path, text: Path, tmp_path: Path, capsys: Capture) -> None:
    assert prune_mask(model, "--method", "magnitude", "--output", tmp_path / "pruned") == 0
    assert prune_mask(model, "--method", "magnitude", "--output", tmp_path / "packed", "--to", "sparsert") == 0
    capsys.readouterr()
    message = error_of(capsys, learn(tmp_path / "pruned", text, "--output", tmp_path / "out"))
    assert "is 2:4 already, so there is nothing to choose; start from the model before it was pruned" in message
    message = error_of(capsys, prune_mask(tmp_path / "packed", "--method", "magnitude", "--output", tmp_path / "out"))
    assert "this needs dense weights" in message and "--to dense" in message


def test_a_loss_that_is_no_number(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    from sparsert.compress.mask_learning import MaskLearner

    real = MaskLearner.__call__

    def broken(self: MaskLearner, tokens: torch.Tensor, position: training.Position) -> torch.Tensor:
        return real(self, tokens, position) * (float("nan") if position.step == 3 else 1)

    monkeypatch.setattr(MaskLearner, "__call__", broken)
    message = error_of(capsys, learn(model, text, "--output", tmp_path / "out"))
    assert "step 4: the loss is nan" in message
    assert torch.load(tmp_path / "out.training" / "state.pt")["step"] == 2
    assert not (tmp_path / "out").exists()


def test_a_full_disk_while_the_checkpoint_is_written_loses_nothing(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    from sparsert.checkpoint import writer

    def full(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(writer, "write_shards", full)
        message = error_of(capsys, learn(model, text, "--output", tmp_path / "out"))
    assert "No space left on device" in message and not (tmp_path / "out").exists()
    assert torch.load(tmp_path / "out.training" / "state.pt")["step"] == 6
    assert learn(model, text, "--output", tmp_path / "out", "--resume") == 0
    assert (tmp_path / "out" / "config.json").is_file()
