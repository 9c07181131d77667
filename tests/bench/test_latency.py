"""Latency and throughput end to end, on a CPU: rows, four corners, speed-ups only where both sides were checked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from bench_arguments import parsed
from tiny_llama import magnitude_prune_, make_llama, save

from sparsert.bench import latency, throughput
from sparsert.bench.card import CORNERS
from sparsert.bench.cut_off import CutOff
from sparsert.bench.generation import run_generation
from sparsert.bench.peers import start_here
from sparsert.bench.records import read_record, validate_record
from sparsert.cli import main
from sparsert.errors import InputError, SparsertError

QUICK = ("--device", "cpu", "--lengths", "6/4", "--runs", "2")

#: Keys that a reader of latency and throughput rows relies on.
ROW_KEYS = {
    "peer", "corner", "model", "dtype", "batch", "input_len", "output_len", "num_prompts", "runs", "ttft_ms", "tpot_ms",
    "itl_ms", "e2e_ms", "output_tok_per_s", "total_tok_per_s", "share_of_read", "peak_bytes", "weight_bytes",
    "kv_bytes_per_token", "load_s", "start_s", "warmup_s", "run_s", "check_s", "wall_s", "speedup_vs_dense", "correct",
    "check",
}  # fmt: skip


def latency_here(*words: str) -> dict[str, Any]:
    return run_generation("latency", parsed(latency, *QUICK, *words), start=start_here)


def here_failing(job: dict[str, Any], silence_s: float, *, peer: str, after: int, error: BaseException) -> Any:
    """As ``start_here``, but after so many events of a peer an error is raised in this process."""
    for number, event in enumerate(start_here(job, silence_s)):
        if job["peer"] == peer and number == after:
            raise error
        yield event


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


def test_peers_that_cannot_run_are_skipped_with_a_reason(capsys: pytest.CaptureFixture[str]) -> None:
    record = latency_here("--arch", "tiny", "--batch", "1,32", "--peers", "dense,hf,hf-compile,torch-sparse,gpt-fast")
    assert [(row["peer"], row["batch"]) for row in record["results"]] == [
        ("dense", 1), ("ours", 1), ("hf", 1), ("hf", 32),
    ]  # fmt: skip
    hf = record["results"][2]
    assert hf["correct"] is None and hf["speedup_vs_dense"] is None and hf["itl_ms"]["p99"] > 0
    skipped = {(entry["peer"], entry["reason"]) for entry in record["skipped"]}
    assert ("dense", "batch 32, 6/4 tokens: the engine runs up to 16 texts at once") in skipped
    assert {"hf-compile", "torch-sparse", "ours", "gpt-fast"} <= {peer for peer, _ in skipped}
    lines = capsys.readouterr().out.splitlines()
    assert all(f"skipped: {peer}: {reason}" in lines for peer, reason in skipped)
    # in the order in which it happened
    places = [next(i for i, line in enumerate(lines) if line.startswith(start)) for start in ("contender", "dense ")]
    assert places == sorted(places) and lines[places[1] + 1].startswith("skipped: dense: batch 32")


def test_a_row_is_printed_as_soon_as_it_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    printed: list[str] = []

    def start(job: dict[str, Any], silence_s: float) -> Any:
        printed.append(capsys.readouterr().out)
        for event in start_here(job, silence_s):
            yield event
            printed.append(capsys.readouterr().out)

    record = run_generation("latency", parsed(latency, *QUICK, "--arch", "tiny", "--batch", "1,2"), start=start)
    before, dense_loaded, first, second, _, between, _, third, _, _ = printed
    assert before.splitlines()[-1].startswith("contender") and dense_loaded == between == ""
    assert first.startswith("dense") and second.startswith("dense") and third.startswith("2:4")
    # its speed-up is there at once, since dense came first
    assert f"{record['results'][2]['speedup_vs_dense']:.2f}x" in third


@pytest.mark.parametrize("limit", ["0.000001", "1000"])
def test_runs_end_with_the_time_limit(limit: str) -> None:
    record = latency_here("--arch", "tiny", "--batch", "1", "--runs", "3", "--time-limit", limit, "--peers", "none")
    (row,) = record["results"]
    assert row["runs"] == (3 if limit == "1000" else 1) and row["run_s"] > 0


@pytest.mark.parametrize("after", [1, 2])
def test_a_signal_keeps_what_was_measured(after: int) -> None:
    def start(job: dict[str, Any], silence_s: float) -> Any:
        return here_failing(job, silence_s, peer="ours", after=after, error=KeyboardInterrupt())

    with pytest.raises(CutOff) as cut:
        run_generation("latency", parsed(latency, *QUICK, "--arch", "tiny", "--batch", "1,2"), start=start)
    record = cut.value.record
    validate_record(record)
    rows = [(row["peer"], row["batch"]) for row in record["results"]]
    assert rows == [("dense", 1), ("dense", 2), ("ours", 1)][: after + 1]
    assert record["notes"][-1] == f"this run was cut off by SIGINT after {len(rows)} rows; the others were not reached"


@pytest.mark.parametrize("wrong", ["ours", "dense"])
def test_no_speed_up_without_its_check(wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither a wrong result nor a wrong baseline makes a speed-up."""

    def start(job: dict[str, Any], silence_s: float) -> Any:
        for event in start_here(job, silence_s):
            if event["event"] == "row" and job["peer"] == wrong:
                event |= {"correct": False, "error": 1.0}
            yield event

    arguments = parsed(latency, *QUICK, "--arch", "tiny", "--batch", "1")
    record = run_generation("latency", arguments, start=start)
    assert [row["speedup_vs_dense"] for row in record["results"]] == [None, None]
    assert any("wrong logits" in note and note.startswith(wrong) for note in record["notes"])
    assert "WRONG" in capsys.readouterr().out
    unchecked = latency_here("--arch", "tiny", "--batch", "1", "--no-check")
    assert all(row["correct"] is None and row["speedup_vs_dense"] is None for row in unchecked["results"])


def test_a_contender_that_dies_in_the_middle() -> None:
    def start(job: dict[str, Any], silence_s: float) -> Any:
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
    (("--arch", "tiny", "--time-limit", "0"), "--time-limit 0"),
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


@pytest.mark.skipif(torch.cuda.is_available(), reason="test_on_a_gpu takes the same way, and processes are slow there")
def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The whole way, each contender in its own process."""
    output, table = tmp_path / "latency.json", tmp_path / "rows.csv"
    command = ["bench", "latency", "--arch", "tiny", "--batch", "1", *QUICK]
    assert main([*command, "--json", "--output", str(output), "--csv", str(table)]) == 0
    record = read_record(output)
    assert [row["peer"] for row in record["results"]] == ["dense", "ours"]
    assert record["results"][1]["speedup_vs_dense"] > 0
    for row in record["results"]:
        assert row["start_s"] > row["load_s"] > 0
        parts = row["start_s"] + row["warmup_s"] + row["run_s"] + row["check_s"]
        assert row["wall_s"] > 0.9 * parts  # by the clocks of two processes
    assert capsys.readouterr().out.splitlines()[-1].startswith('{"schema": 1')
    assert len(table.read_text().splitlines()) == 3


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    """Processes of their own; what torch.sparse and transformers do there is tested in this process (test_peers)."""
    words = ("--device", "cuda", "--arch", "tiny", "--remove-blocks", "2", "--batch", "1,4")
    record = latency.run(parsed(latency, *words, "--lengths", "32/32", "--runs", "2"))
    assert [(row["peer"], row["batch"]) for row in record["results"]] == [
        ("dense", 1), ("dense", 4), ("ours", 1), ("ours", 4),
    ]  # fmt: skip
    for row in record["results"]:
        assert row["correct"] and row["share_of_read"] > 0 and row["peak_bytes"] > row["weight_bytes"]
        assert row["peer"] == "dense" or row["speedup_vs_dense"] > 0


def test_errors_are_typed() -> None:
    for words, _ in WRONG[:12]:
        with pytest.raises(SparsertError):
            latency.run(parsed(latency, "--device", "cpu", *words))
