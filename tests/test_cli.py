"""The command line on a tiny model: every subcommand, what it prints, and where."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_chat_model import BLOCKS, save_chat_model

from sparsert import __version__
from sparsert.checkpoint import open_checkpoint, write_maskllm
from sparsert.cli import main
from sparsert.compress import magnitude_mask

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chat_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def pruned(model: Path) -> Path:
    output = model.parent / "pruned"
    assert main(["prune", "--model", str(model), "--output", str(output)]) == 0
    return output


def run(capsys: Capture, *arguments: object) -> str:
    """Run a command that must succeed; return its standard output."""
    capsys.readouterr()
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return captured.out


def generate(capsys: Capture, *arguments: object) -> list[dict[str, Any]]:
    """Run generate with --json on the CPU."""
    output = run(capsys, "generate", "--device", "cpu", "--json", *arguments)
    return [json.loads(line) for line in output.splitlines()]


def test_generate_prints_the_text_and_nothing_else(capsys: Capture, pruned: Path) -> None:
    assert (
        main(["generate", "--model", str(pruned), "--prompt", "abc", "--max-new-tokens", "5", "--device", "cpu"]) == 0
    )
    captured = capsys.readouterr()
    (answer,) = generate(capsys, "--model", pruned, "--prompt", "abc", "--max-new-tokens", 5)
    assert captured.out == answer["text"] + "\n"
    assert "sparsert: 5 tokens for 1 prompt(s): load" in captured.err and "tok/s" in captured.err


def test_generate_json_has_all_fields(capsys: Capture, pruned: Path) -> None:
    (answer,) = generate(capsys, "--model", pruned, "--prompt", "abc", "--max-new-tokens", 5)
    assert set(answer) == {"prompt", "text", "token_ids", "finish_reason", "timings", "model"}
    assert answer["prompt"] == "abc" and answer["finish_reason"] in ("length", "stop")
    assert 1 <= len(answer["token_ids"]) <= 5
    assert {"load_s", "prefill_ms", "decode_ms", "decode_tok_per_s"} <= set(answer["timings"])
    assert answer["model"]["linears_sparse"] == 7 * BLOCKS and answer["model"]["linears_dense"] == 0


def test_prompts_from_a_file_and_from_options(capsys: Capture, pruned: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("second\n\nthird line\n", encoding="utf-8")
    arguments = ("--model", pruned, "--prompt", "first", "--prompts", tmp_path / "prompts.txt", "--max-new-tokens", 3)
    answers = generate(capsys, *arguments)
    assert [answer["prompt"] for answer in answers] == ["first", "second", "third line"]
    text = run(capsys, "generate", "--device", "cpu", *arguments)
    assert "[2/3] second\n" in text
    (alone,) = generate(capsys, "--model", pruned, "--prompt", "third line", "--max-new-tokens", 3)
    assert alone["token_ids"] == answers[2]["token_ids"]


def test_stream_prints_the_same_text(capsys: Capture, pruned: Path) -> None:
    arguments = ("--model", pruned, "--prompt", "abc", "--max-new-tokens", 9)
    (answer,) = generate(capsys, *arguments)
    assert run(capsys, "generate", "--device", "cpu", "--stream", *arguments) == answer["text"] + "\n"


def test_chat_uses_the_template(capsys: Capture, pruned: Path) -> None:
    arguments = ("--model", pruned, "--max-new-tokens", 4, "--ignore-eos")
    (chat,) = generate(capsys, *arguments, "--prompt", "abc", "--chat")
    assert chat["prompt"] == "abc"
    (plain,) = generate(capsys, *arguments, "--prompt", "<|im_start|>user\nabc<|im_end|>\n")
    assert chat["token_ids"] == plain["token_ids"]


def test_sampling_options_reach_the_sampler(capsys: Capture, pruned: Path) -> None:
    arguments = ("--model", pruned, "--prompt", "abc", "--max-new-tokens", 12, "--ignore-eos")
    sampled = [*arguments, "--temperature", 5, "--top-k", 200, "--top-p", 0.99, "--min-p", 0.0001]
    (one,) = generate(capsys, *sampled, "--seed", 1)
    (again,) = generate(capsys, *sampled, "--seed", 1)
    (other,) = generate(capsys, *sampled, "--seed", 2)
    (greedy,) = generate(capsys, *arguments)
    (penalised,) = generate(capsys, *arguments, "--repetition-penalty", 1000)
    assert one["token_ids"] == again["token_ids"] != other["token_ids"]
    assert greedy["token_ids"] not in (one["token_ids"], penalised["token_ids"])
    assert len(set(penalised["token_ids"])) == 12
    (first_two,) = generate(capsys, *sampled, "--seed", 1, "--top-k", 1)
    assert first_two["token_ids"] == greedy["token_ids"]
    stop = next(character for character in greedy["text"] if character.isprintable() and character != "\ufffd")
    (stopped,) = generate(capsys, *arguments, "--stop", stop, "--stop", "never")
    assert stopped["finish_reason"] == "stop" and stop not in stopped["text"]
    assert greedy["text"].startswith(stopped["text"])


def test_masks_give_the_pruned_model(capsys: Capture, model: Path, pruned: Path, tmp_path: Path) -> None:
    source = open_checkpoint(model)
    write_maskllm(tmp_path / "m.npz", ((name, magnitude_mask(source.read(name))) for name in source.block_linears()))
    arguments = ("--prompt", "abc", "--max-new-tokens", 8)
    (masked,) = generate(capsys, "--model", model, "--masks", tmp_path / "m.npz", *arguments)
    (zeros,) = generate(capsys, "--model", pruned, *arguments)
    (dense,) = generate(capsys, "--model", model, *arguments)
    assert masked["token_ids"] == zeros["token_ids"] != dense["token_ids"]
    assert masked["model"]["linears_sparse"] == 7 * BLOCKS and dense["model"]["linears_dense"] == 7 * BLOCKS


def test_every_way_to_remove_blocks_is_the_same(capsys: Capture, pruned: Path, tmp_path: Path) -> None:
    (tmp_path / "order.csv").write_text("0,5,7,4,1")
    arguments = ("--model", pruned, "--prompt", "abc", "--max-new-tokens", 8)
    answers = [
        generate(capsys, *arguments, *options)[0]
        for options in (
            ("--remove-blocks", "4-5"),
            ("--remove-blocks", f"{tmp_path / 'order.csv'}:2"),
            ("--block-order", tmp_path / "order.csv", "--remove-count", 2),
        )
    ]
    assert run(capsys, "prune", "--model", pruned, "--method", "none", "--remove-blocks", "4,5", "--output",
               tmp_path / "short").startswith(str(tmp_path / "short"))  # fmt: skip
    answers += generate(capsys, "--model", tmp_path / "short", "--prompt", "abc", "--max-new-tokens", 8)
    assert all(answer["token_ids"] == answers[0]["token_ids"] for answer in answers)
    assert all(answer["model"]["blocks_removed"] == [4, 5] for answer in answers[:3])
    (whole,) = generate(capsys, *arguments)
    (forced,) = generate(capsys, *arguments, "--remove-blocks", "0", "--force-remove")
    assert whole["token_ids"] != answers[0]["token_ids"] and forced["model"]["blocks_removed"] == [0]


def test_halves_of_blocks(capsys: Capture, pruned: Path, tmp_path: Path) -> None:
    halves = ("--remove-blocks", "4", "--skip-attention", "2,5", "--skip-mlp", "3", "--force-remove")
    arguments = ("--prompt", "abc", "--max-new-tokens", 8)
    (skipped,) = generate(capsys, "--model", pruned, *arguments, *halves)
    assert skipped["model"]["without_attention"] == [2, 5] and skipped["model"]["without_mlp"] == [3]
    run(capsys, "prune", "--model", pruned, "--method", "none", *halves, "--output", tmp_path / "short")
    (short,) = generate(capsys, "--model", tmp_path / "short", *arguments)
    assert short["token_ids"] == skipped["token_ids"]
    plan = "7 of 8 blocks: 0-3,5-7 (removed: 4), without attention in 2,5, without mlp in 3"
    assert short["model"]["plan"] == skipped["model"]["plan"] == plan
    assert f"runs {plan}" in run(capsys, "inspect", tmp_path / "short")


def test_drafts_give_the_same_text(capsys: Capture, model: Path, pruned: Path) -> None:
    arguments = ("generate", "--device", "cpu", "--model", model, "--prompt", "abc", "--max-new-tokens", 20)
    plain = run(capsys, *arguments)
    for draft in (
        ("--draft-remove-blocks", "0,3-5"),
        ("--draft-skip-mlp", "4", "--draft-skip-attention", "5-7", "--draft-tokens", 2),
        ("--draft-model", pruned, "--draft-tokens", 3),
    ):
        assert run(capsys, *arguments, *draft) == plain
        assert run(capsys, *arguments, *draft, "--stream") == plain
    assert main([str(argument) for argument in (*arguments, "--draft-remove-blocks", "4", "--draft-tokens", "2")]) == 0
    assert "tokens stood" in capsys.readouterr().err
    shortened = (*arguments, "--remove-blocks", "4", "--json")
    answer = json.loads(run(capsys, *shortened, "--draft-remove-blocks", "5", "--draft-tokens", 3))
    assert answer["text"] == json.loads(run(capsys, *shortened))["text"]
    record = answer["timings"]["speculation"]
    assert record["draft_tokens"] == 3 and record["drafted"] == 3 * record["rounds"]
    assert record["acceptance_rate"] == record["accepted"] / record["drafted"]
    assert json.loads(run(capsys, *shortened))["timings"]["speculation"] is None


def test_prune_reports_what_it_did(capsys: Capture, model: Path, tmp_path: Path) -> None:
    arguments = ("prune", "--model", model, "--remove-blocks", "5", "--json", "--output", tmp_path / "out")
    summary = json.loads(run(capsys, *arguments))
    assert summary["removed_blocks"] == [5] and summary["masked_linears"] == 7 * 7 and summary["zero_share"] == 0.5
    config = open_checkpoint(tmp_path / "out").config
    assert config["num_hidden_layers"] == 7 and config["sparsert"]["base_model"] == "tiny"
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_inspect(capsys: Capture, model: Path, pruned: Path) -> None:
    text = run(capsys, "inspect", pruned)
    assert f"{7 * BLOCKS} linear weights would run sparse" in text and "runs in sparsert" in text
    assert "pruned by sparsert" in text and "method magnitude" in text
    report = json.loads(run(capsys, "inspect", pruned, "--json"))
    assert report["totals"]["sparse_linears"] == 7 * BLOCKS and report["supported"] is True
    assert json.loads(run(capsys, "inspect", model, "--json"))["totals"]["sparse_linears"] == 0


def test_env(capsys: Capture) -> None:
    text = run(capsys, "env")
    assert f"sparsert         {__version__}" in text and torch.__version__ in text
    report = json.loads(run(capsys, "env", "--json"))
    assert set(report) == {
        "sparsert", "python", "platform", "packages", "cuda_runtime", "driver", "gpus", "native", "missing",
    }  # fmt: skip
    assert set(report["native"]) == {"available", "cuda", "architectures", "reason"}
    if not torch.cuda.is_available():
        assert report["gpus"] == [] and any("no GPU can be used" in sentence for sentence in report["missing"])
    if not report["native"]["cuda"]:
        assert any("extension" in sentence or "nvcc" in sentence for sentence in report["missing"])


def test_help_and_version(capsys: Capture) -> None:
    assert run(capsys, "--version") == f"sparsert {__version__}\n"
    assert "examples:" in run(capsys, "--help")
    for command in ("generate", "prune", "inspect"):
        assert "examples:" in run(capsys, command, "--help")
    assert "--json" in run(capsys, "env", "--help")


def test_help_imports_nothing_heavy() -> None:
    script = (
        "import sys; from sparsert.cli import main; code = main(['generate', '--help']); "
        "heavy = {'torch', 'numpy', 'triton', 'transformers', 'huggingface_hub'} & set(sys.modules); "
        "sys.exit(str(heavy) if heavy else code)"
    )
    finished = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr


def test_python_dash_m() -> None:
    command = [sys.executable, "-m", "sparsert", "--version"]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (finished.returncode, finished.stdout) == (0, f"sparsert {__version__}\n")


def test_a_reader_that_leaves_is_no_error() -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "sparsert", "env"]
    finished = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert finished.returncode == 141 and finished.stderr == ""
