"""``sparsert eval``."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from tiny_chat_model import save_chat_model

from sparsert import LLM
from sparsert.cli import main
from sparsert.evaluate import PerplexityProtocol, measure_perplexity

TEXT = "The tower of Pisa leans, and has leaned for a long time. " * 12


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chat_model(tmp_path_factory.mktemp("model") / "tiny", max_position_embeddings=128)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def test_perplexity_of_a_file(model: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "--model", str(model), "--text", str(text), "--device", "cpu", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    expected = measure_perplexity(LLM(model, device="cpu"), TEXT)
    assert record["perplexity"]["perplexity"] == pytest.approx(expected.perplexity)
    assert record["perplexity"]["text"] == str(text) and record["perplexity"]["window"] == 128
    assert record["model"]["blocks"] == 8 and "tasks" not in record


def test_options_reach_the_protocol_and_the_plan(
    model: Path, text: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    protocol = ["--window", "40", "--stride", "15", "--bos", "window", "--keep-tail", "--max-windows", "7"]
    monkeypatch.setattr(sys, "stdin", io.StringIO(TEXT))
    options = ["--remove-blocks", "4-5", "--batch-size", "3", "--device", "cpu", *protocol]
    assert main(["eval", "--model", str(model), "--text", "-", *options]) == 0
    line = capsys.readouterr().out
    expected = measure_perplexity(
        LLM(model, device="cpu", remove_blocks="4-5"), TEXT, PerplexityProtocol(40, 15, "window", True, 7)
    )
    assert line.startswith(f"perplexity {expected.perplexity:.4f} of -: {expected.scored_tokens:,} tokens scored in 7 ")
    assert "windows of 40, stride 15, BOS: window; " in line


def test_documents_and_token_ids(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    llm = LLM(model, device="cpu")
    documents = [TEXT, "Another tower stands upright."]
    lines = tmp_path / "text.jsonl"
    lines.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    ids = tmp_path / "ids.npy"
    tokens = llm.tokenizer.encode(TEXT)
    np.save(ids, np.array(tokens, dtype=np.uint16))
    whole = measure_perplexity(llm, "\n\n".join(documents)).perplexity
    for file, expected in ((lines, whole), (ids, measure_perplexity(llm, TEXT).perplexity)):
        assert main(["eval", "--model", str(model), "--text", str(file), "--device", "cpu", "--json"]) == 0
        record = json.loads(capsys.readouterr().out)
        assert record["perplexity"]["perplexity"] == pytest.approx(expected)
    np.save(ids, np.array([*tokens, 70000]))
    assert main(["eval", "--model", str(model), "--text", str(ids), "--device", "cpu"]) == 2
    assert "holds token ids from" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "there is nothing to measure; give --text FILE"),
        (["--text", "missing.txt"], "--text missing.txt: cannot be read"),
        (["--text", "TEXT", "--window", "500"], "window is 500; this model was made for 128 tokens"),
        (["--text", "TEXT", "--batch-size", "0"], "--batch-size 0: it must be at least 1"),
        (["--text", "TEXT", "--bos", "some"], "invalid choice: 'some'"),
        (["--tasks", "piqa"], "--tasks needs lm-eval"),
    ],
)
def test_errors(
    model: Path,
    text: Path,
    options: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # whether lm-eval is here or not
    monkeypatch.delitem(sys.modules, "sparsert.integrations.lm_eval", raising=False)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    given = [str(text) if option == "TEXT" else option for option in options]
    assert main(["eval", "--model", str(model), "--device", "cpu", *given]) == 2
    assert message in capsys.readouterr().err


def test_tasks(model: Path, text: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What the harness is asked for, and how its results are printed; the harness itself has its own tests."""
    asked = {}

    def run_tasks(llm: LLM, tasks: list[str], **options: object) -> dict[str, dict[str, object]]:
        asked.update(options, tasks=tasks, blocks=llm.plan.num_blocks)
        return {"piqa": {"alias": "piqa", "acc,none": 0.75, "acc_stderr,none": 0.01, "em,strict": 0.5}}

    stand_in = ModuleType("sparsert.integrations.lm_eval")
    stand_in.run_tasks = run_tasks  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sparsert.integrations.lm_eval", stand_in)
    options = ["--tasks", "piqa, winogrande", "--num-fewshot", "2", "--limit", "9", "--batch-size", "4", "--chat"]
    assert main(["eval", "--model", str(model), "--device", "cpu", "--task-path", "mine", *options]) == 0
    assert capsys.readouterr().out.splitlines() == ["piqa  acc  0.7500 +- 0.0100", "piqa  em (strict)  0.5000"]
    assert asked == {
        "tasks": ["piqa", "winogrande"],
        "task_path": "mine",
        "num_fewshot": 2,
        "limit": 9,
        "batch_size": 4,
        "chat": True,
        "blocks": 8,
    }
    assert main(["eval", "--model", str(model), "--device", "cpu", "--text", str(text), "--json", *options]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["tasks"]["piqa"]["acc,none"] == 0.75 and record["perplexity"]["windows"] > 1
