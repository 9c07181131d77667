"""Latency and throughput end to end, on a CPU: rows, four corners, speed-ups only where both sides were checked."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from bench_arguments import parsed
from tiny_llama import magnitude_prune_, make_llama, save

from sparsert.bench import latency, throughput
from sparsert.bench.card import CORNERS
from sparsert.bench.generation import run_generation, table_lines
from sparsert.bench.peers import start_here
from sparsert.bench.records import read_record, validate_record
from sparsert.cli import main
from sparsert.errors import InputError, SparsertError

QUICK = ("--device", "cpu", "--lengths", "6/4", "--runs", "2")

#: Keys that a reader of latency and throughput rows relies on.
ROW_KEYS = {
    "peer", "corner", "model", "dtype", "batch", "input_len", "output_len", "num_prompts", "runs", "ttft_ms", "tpot_ms",
    "itl_ms", "e2e_ms", "output_tok_per_s", "total_tok_per_s", "share_of_read", "peak_bytes", "weight_bytes",
    "kv_bytes_per_token", "load_s", "speedup_vs_dense", "correct", "check",
}  # fmt: skip


def latency_here(*words: str) -> dict[str, Any]:
    return run_generation("latency", parsed(latency, *QUICK, *words), start=start_here)


def test_four_corners_in_one_table(capsys: pytest.CaptureFixture[str]) -> None:
    record = latency_here("--arch", "tiny", "--remove-blocks", "2", "--corners", "--batch", "1,3", "--peers", "none")
    validate_record(record)
    rows = record["results"]
    assert [(row["corner"], row["batch"]) for row in rows] == [(corner, b) for corner in CORNERS for b in (1, 3)]
    assert [row["peer"] for row in rows] == ["dense"] * 2 + ["ours"] * 6
    weights = {row["corner"]: row["weight_bytes"] for row in rows}
    assert weights["2:4 + blocks removed"] < weights["2:4"] < weights["blocks removed"] < weights["dense"]
    for row in rows:
        assert set(row) >= ROW_KEYS
        assert row["correct"] is True and row["share_of_read"] > 0
        dense = next(r for r in rows if r["peer"] == "dense" and r["batch"] == row["batch"])
        if row is dense:
            assert row["speedup_vs_dense"] is None
        else:
            assert row["speedup_vs_dense"] == dense["tpot_ms"]["p50"] / row["tpot_ms"]["p50"]
    output = capsys.readouterr().out
    # the cards come before the first number that was timed
    assert output.index("weights as stored") < output.index("TTFT")
    assert output.count("x torch's error") == 8
    assert [card["corner"] for card in record["settings"]["cards"]] == list(CORNERS)


def test_peers_that_cannot_run_are_skipped_with_a_reason() -> None:
    record = latency_here("--arch", "tiny", "--batch", "1,32", "--peers", "dense,hf,hf-compile,torch-sparse")
    assert [(row["peer"], row["batch"]) for row in record["results"]] == [
        ("dense", 1), ("ours", 1), ("hf", 1), ("hf", 32),
    ]  # fmt: skip
    hf = record["results"][2]
    assert hf["correct"] is None and hf["speedup_vs_dense"] is None and hf["itl_ms"]["p99"] > 0
    skipped = {(entry["peer"], entry["reason"]) for entry in record["skipped"]}
    assert ("dense", "batch 32, 6/4 tokens: the engine runs up to 16 texts at once") in skipped
    assert {"hf-compile", "torch-sparse", "ours"} <= {peer for peer, _ in skipped}
    assert all(f"skipped: {peer}: {reason}" in table_lines(record) for peer, reason in skipped)


@pytest.mark.parametrize("wrong", ["ours", "dense"])
def test_no_speed_up_without_its_check(wrong: str) -> None:
    """Neither a wrong result nor a wrong baseline makes a speed-up."""

    def start(job: dict[str, Any], silence_s: float) -> Iterator[dict[str, Any]]:
        for event in start_here(job, silence_s):
            if event["event"] == "row" and job["peer"] == wrong:
                event |= {"correct": False, "error": 1.0}
            yield event

    arguments = parsed(latency, *QUICK, "--arch", "tiny", "--batch", "1")
    record = run_generation("latency", arguments, start=start)
    assert [row["speedup_vs_dense"] for row in record["results"]] == [None, None]
    assert any("wrong logits" in note and note.startswith(wrong) for note in record["notes"])
    assert any("WRONG" in line for line in table_lines(record))
    unchecked = latency_here("--arch", "tiny", "--batch", "1", "--no-check")
    assert all(row["correct"] is None and row["speedup_vs_dense"] is None for row in unchecked["results"])


def test_a_contender_that_dies_in_the_middle() -> None:
    def start(job: dict[str, Any], silence_s: float) -> Iterator[dict[str, Any]]:
        events = list(start_here(job, silence_s))
        if job["peer"] == "dense":
            yield from events[:2]
            yield {"event": "failed", "reason": "ended by SIGSEGV"}
        else:
            yield from events

    record = run_generation("latency", parsed(latency, *QUICK, "--arch", "tiny", "--batch", "1,2"), start=start)
    assert [(row["peer"], row["batch"]) for row in record["results"]] == [("dense", 1), ("ours", 1), ("ours", 2)]
    assert record["skipped"] == [{"peer": "dense", "reason": "after 1 of 2 settings: ended by SIGSEGV"}]
    assert [row["speedup_vs_dense"] is None for row in record["results"]] == [True, False, True]


def test_throughput_sends_all_prompts_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = parsed(throughput, *QUICK, "--arch", "tiny", "--batch", "2", "--num-prompts", "5")
    record = run_generation("throughput", arguments, prompts_of=lambda batch: 5, start=start_here)
    validate_record(record)
    dense, ours = record["results"]
    assert record["kind"] == "throughput" and dense["num_prompts"] == 5
    assert ours["output_tok_per_s"] == pytest.approx(5 * 4 / ours["elapsed_s"])
    assert ours["total_tok_per_s"] == pytest.approx(5 * 10 / ours["elapsed_s"])
    assert ours["speedup_vs_dense"] == ours["output_tok_per_s"] / dense["output_tok_per_s"]
    # the last prompts waited for the first
    assert ours["ttft_ms"]["p95"] > 2 * ours["tpot_ms"]["p50"]


def test_one_token_compares_whole_requests() -> None:
    record = latency_here("--arch", "tiny", "--batch", "1", "--lengths", "9/1")
    dense, ours = record["results"]
    assert ours["tpot_ms"]["p50"] == 0 and ours["share_of_read"] is None
    assert ours["speedup_vs_dense"] == dense["e2e_ms"]["p50"] / ours["e2e_ms"]["p50"]


def test_real_checkpoints(tmp_path: Path) -> None:
    model = make_llama(num_hidden_layers=8)
    unpruned = save(model, tmp_path / "unpruned")
    magnitude_prune_(model)
    pruned = save(model, tmp_path / "pruned")
    record = latency_here("--model", str(pruned), "--remove-blocks", "4-5", "--batch", "2", "--peers", "dense,hf")
    assert [(row["peer"], row["corner"]) for row in record["results"]] == [
        ("dense", "dense"), ("ours", "2:4 + blocks removed"), ("hf", "dense"),
    ]  # fmt: skip
    assert {row["model"] for row in record["results"]} == {"pruned"} and record["settings"]["model"] == "pruned"
    assert all(row["correct"] for row in record["results"][:2])
    assert any("random values where the checkpoint holds zeros" in note for note in record["notes"])
    # a dense checkpoint stays dense unless asked for
    record = latency_here("--model", str(unpruned), "--batch", "1")
    assert [row["corner"] for row in record["results"]] == ["dense"]
    record = latency_here("--model", str(unpruned), "--batch", "1", "--sparsity", "2:4")
    assert [row["corner"] for row in record["results"]] == ["dense", "2:4"]
    assert any("magnitude masks" in note for note in record["notes"])


WRONG = [
    (("--arch", "gpt"), "--arch gpt: known are"),
    ((), "nothing to measure; give --arch"),
    (("--model", "/nowhere"), "no such directory"),
    (("--arch", "tiny", "--remove-blocks", "3"), "at most 2 can go"),
    (("--arch", "tiny", "--remove-blocks", "0-1"), "block"),
    (("--arch", "tiny", "--corners"), "give --remove-blocks N"),
    (("--arch", "tiny", "--masks", "m.npz"), "--masks fits the weights of a --model"),
    (("--arch", "tiny", "--peers", "them"), "--peers them"),
    (("--arch", "tiny", "--batch", "0"), "--batch 0"),
    (("--arch", "tiny", "--lengths", "1"), "--lengths 1"),
    (("--arch", "tiny", "--lengths", "4000/4000"), "takes texts of up to 4096 tokens"),
    (("--arch", "tiny", "--runs", "0"), "--runs 0"),
    (("--arch", "tiny", "--warmup", "-1"), "--warmup -1"),
    (("--arch", "tiny", "--timeout", "0"), "--timeout 0"),
    (("--arch", "tiny", "--sparsity", "1:2"), "--sparsity"),
    (("--arch", "tiny", "--model", "x"), "not allowed with"),
]


@pytest.mark.parametrize(("words", "message"), WRONG)
def test_wrong_arguments_end_with_a_sentence_and_2(
    words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "latency", "--device", "cpu", *words]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1 and captured.out == ""


def test_wrong_number_of_prompts() -> None:
    with pytest.raises(InputError, match="--num-prompts 0"):
        throughput.run(parsed(throughput, *QUICK, "--arch", "tiny", "--num-prompts", "0"))


def test_from_the_command_line(tmp_path: Path) -> None:
    """The whole way, each contender in its own process."""
    output = tmp_path / "latency.json"
    command = [sys.executable, "-m", "sparsert", "bench", "latency", "--arch", "tiny", "--batch", "1", *QUICK]
    done = subprocess.run(
        [*command, "--json", "--output", str(output), "--csv", str(tmp_path / "rows.csv")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    record = read_record(output)
    assert [row["peer"] for row in record["results"]] == ["dense", "ours"]
    assert record["results"][1]["speedup_vs_dense"] > 0
    assert done.stdout.splitlines()[-1].startswith('{"schema": 1')
    assert len((tmp_path / "rows.csv").read_text().splitlines()) == 3


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    words = ("--device", "cuda", "--arch", "smollm2-135m", "--remove-blocks", "6", "--corners", "--batch", "1,4")
    record = latency.run(parsed(latency, *words, "--lengths", "32/32", "--peers", "hf,torch-sparse,vllm"))
    found = {(row["peer"], row["corner"], row["batch"]) for row in record["results"]}
    assert found >= {("dense", "dense", b) for b in (1, 4)} | {("ours", c, b) for c in CORNERS[1:] for b in (1, 4)}
    for row in record["results"]:
        assert 0 < row["share_of_read"] < 1.2
        if row["peer"] == "ours":
            assert row["correct"] and row["speedup_vs_dense"] > 0


def test_errors_are_typed() -> None:
    for words, _ in WRONG[:12]:
        with pytest.raises(SparsertError):
            latency.run(parsed(latency, "--device", "cpu", *words))
