"""What goes wrong while a pruned model is made: in every command that can meet it, one sentence, and nothing lost."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_chat_model import save_chat_model

from sparsert.cli import main

Capture = pytest.CaptureFixture[str]

#: Commands that read a text, with what else they need for a few windows of 64 tokens.
MAKERS = {
    "wanda": ("prune", "mask", "--method", "wanda", "--samples", "4"),
    "learn-masks": ("learn-masks", "--samples", "4", "--steps", "2", "--batch-size", "2"),
    "depth": ("prune", "depth", "--count", "1", "--windows", "4"),
    "width": ("prune", "width", "--intermediate", "64", "--windows", "4"),
    "distill": ("distill", "--teacher", "{model}", "--steps", "2", "--batch-size", "2"),
    "finetune": ("finetune", "--steps", "2", "--batch-size", "2"),
    "report": ("report", "--windows", "4"),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chat_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def pruned(model: Path) -> Path:
    assert main(["prune", "--model", str(model), "--output", str(model.parent / "pruned")]) == 0
    return model.parent / "pruned"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    letters = torch.randint(97, 123, (2000,), generator=torch.Generator().manual_seed(3))
    file.write_text(bytes(letters.tolist()).decode())
    return file


def command(maker: str, model: Path, text: Path, output: Path, *more: object) -> list[str]:
    words = [word.format(model=model) for word in MAKERS[maker]]
    common = ("--model", model, "--text", text, "--window", 64, "--device", "cpu", "--output", output, *more)
    return [*words, *(str(word) for word in common)]


def fails(capsys: Capture, arguments: list[str]) -> str:
    """Run a command that must fail through no fault of its own; return its sentence."""
    capsys.readouterr()
    code = main(arguments)
    captured = capsys.readouterr()
    assert code == 2, captured.err
    assert captured.out == "" and "Traceback" not in captured.err
    assert captured.err.count("sparsert: error: ") == 1
    return captured.err.rpartition("sparsert: error: ")[2].strip()


@pytest.mark.parametrize("maker", MAKERS)
def test_text_that_is_empty_or_too_short(capsys: Capture, model: Path, tmp_path: Path, maker: str) -> None:
    output = tmp_path / "output"
    for content in ("", " \n\n\t"):
        (tmp_path / "empty.txt").write_text(content)
        message = fails(capsys, command(maker, model, tmp_path / "empty.txt", output))
        assert message == f"{tmp_path / 'empty.txt'}: holds no text; give a file with some text in it"
    (tmp_path / "short.txt").write_text("a" * 63)
    message = fails(capsys, command(maker, model, tmp_path / "short.txt", output))
    assert message == "the text has 63 tokens and one window takes 64; give more text, or a shorter window"
    assert {path.name for path in tmp_path.iterdir()} == {"empty.txt", "short.txt"}


def test_text_for_a_perplexity(capsys: Capture, model: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text(" \n")
    evaluate = ["eval", "--model", str(model), "--device", "cpu", "--window", "64", "--text"]
    message = fails(capsys, [*evaluate, str(tmp_path / "empty.txt")])
    assert message == f"--text {tmp_path / 'empty.txt'}: holds no text; give a file with some text in it"
    note = "note: the text has 63 tokens and a window takes 64, so it was read as one shorter window"
    (tmp_path / "short.txt").write_text("a" * 63)
    assert main([*evaluate, str(tmp_path / "short.txt")]) == 0
    assert note in capsys.readouterr().err
    assert main([*evaluate, str(tmp_path / "short.txt"), "--bos", "window"]) == 0  # BOS fills it
    assert "shorter window" not in capsys.readouterr().err


@pytest.mark.parametrize("maker", MAKERS)
def test_weights_that_overflow(capsys: Capture, model: Path, text: Path, tmp_path: Path, maker: str) -> None:
    tensors = load_file(model / "model.safetensors")
    for block in (3, 4):
        tensors[f"model.layers.{block}.mlp.down_proj.weight"] *= 1e38
    for file in model.iterdir():
        (tmp_path / "huge").mkdir(exist_ok=True)
        (tmp_path / "huge" / file.name).write_bytes(file.read_bytes())
    save_file(tensors, tmp_path / "huge" / "model.safetensors", {"format": "pt"})
    more = ("--prior", "magnitude") if maker == "learn-masks" else ()
    message = fails(capsys, command(maker, tmp_path / "huge", text, tmp_path / "output", *more))
    if maker in ("learn-masks", "distill", "finetune"):
        assert message.startswith("step 1: the loss is ") and "the update was not made: nothing had been ch" in message
        assert "look for damaged weights (`sparsert inspect`)" in message and "learning rate" not in message
    else:
        assert "nan" in message.lower() and "weights" in message and "bfloat16 or float32" in message
    assert not (tmp_path / "output").exists()


def test_a_learning_rate_that_is_too_high(capsys: Capture, model: Path, text: Path, tmp_path: Path) -> None:
    more = ("--learning-rate", 1e30, "--warmup-steps", 0, "--steps", 9, "--save-every", 1)
    message = fails(capsys, command("finetune", model, text, tmp_path / "output", *more))
    assert message.startswith("step ") and "the update was not made: try a smaller learning rate" in message
    assert not (tmp_path / "output").exists()
    message = fails(capsys, command("finetune", model, text, tmp_path / "output"))
    assert "holds a run that has not ended; go on with --resume, or remove the directory to start anew" in message


@pytest.mark.parametrize("maker", ["wanda", "learn-masks", "width"])
def test_a_model_that_is_pruned_already(
    capsys: Capture, model: Path, pruned: Path, text: Path, tmp_path: Path, maker: str
) -> None:
    message = fails(capsys, command(maker, pruned, text, tmp_path / "output"))
    if maker == "width":
        assert "56 weights are 2:4 already" in message and "Prune width first" in message
    else:
        assert message.startswith(f"{pruned}: every linear weight of its blocks is 2:4 already")
        assert "start from the model before it was pruned (`sparsert prune --method none` removes blocks" in message
    assert list(tmp_path.iterdir()) == []


def test_plain_prune_does_not_rename_masks_that_are_there(
    capsys: Capture, model: Path, pruned: Path, tmp_path: Path
) -> None:
    """Magnitude would keep the zeros of any method and call them its own; other masks would thin out groups."""
    prune = ["prune", "--model", str(pruned), "--output", str(tmp_path / "output")]
    magnitude = ["prune", "mask", "--model", str(model), "--method", "magnitude"]
    assert main([*magnitude, "--masks-output", str(tmp_path / "m.npz")]) == 0
    for more in ([], ["--masks", str(tmp_path / "m.npz")], ["--to", "sparsert"]):
        assert "is 2:4 already, so there is nothing to choose" in fails(capsys, [*prune, *more])
        assert not (tmp_path / "output").exists()
    assert main([*prune, "--method", "none", "--to", "sparsert"]) == 0


@pytest.mark.parametrize(
    ("maker", "more", "expected"),
    [
        ("depth", ("--count", 3), "asked to remove 3 of 8 blocks, but only 2 can go"),
        ("width", ("--parameters", 1000), "no architecture fits 1,000 parameters: the smallest within the limits"),
        ("width", ("--bytes", 1000), "no architecture fits 1,000 bytes: the smallest within the limits"),
        ("width", ("--us", 3), "--us needs measured times; give --layer-times"),
        ("report", ("--save", 0.99), "bytes cannot be saved by both"),
        ("report", ("--save-us", 0.5), "--save-us needs measured times; give --layer-times"),
    ],
)
def test_a_budget_that_cannot_be_met(
    capsys: Capture, model: Path, text: Path, tmp_path: Path, maker: str, more: tuple[object, ...], expected: str
) -> None:
    words = command(maker, model, text, tmp_path / "output", *more)
    if maker == "width":
        del words[words.index("--intermediate") : words.index("--intermediate") + 2]
    assert expected in fails(capsys, words)
    assert not (tmp_path / "output").exists()


@contextlib.contextmanager
def files_of_at_most(size_bytes: int) -> Iterator[None]:
    """Writing more to a file fails, as it does on a full disk: in whichever library is writing."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("maker", ["wanda", "learn-masks", "depth", "width", "distill", "finetune"])
def test_a_disk_that_is_full(capsys: Capture, model: Path, text: Path, tmp_path: Path, maker: str) -> None:
    words = command(maker, model, text, tmp_path / "output")
    with files_of_at_most(200_000):
        message = fails(capsys, words)
    assert "cannot be written" in message and ("free space" in message or "make room and go on" in message)
    assert not (tmp_path / "output").exists() and not list(tmp_path.rglob("*.partial"))
    assert main(words if maker == "wanda" else [*words, "--resume"]) == 0
    assert (tmp_path / "output" / "config.json").is_file()
