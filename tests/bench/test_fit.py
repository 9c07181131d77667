"""What fits into a memory: the prediction is monotone and tight, and running it corrects it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from bench_arguments import parsed

from sparsert.bench import fit, fit_trial
from sparsert.bench.architectures import hf_config
from sparsert.bench.cut_off import CutOff
from sparsert.bench.fit import QUESTIONS, parse_memory, predict_rows
from sparsert.bench.peers import start_process
from sparsert.bench.records import validate_record
from sparsert.bench.subject import Subject, build_model
from sparsert.bench.workload import Setting
from sparsert.cli import main
from sparsert.errors import InputError
from sparsert.models.attention import CausalAttention

EIGHT_B = Subject("llama-3.1-8b", hf_config("llama-3.1-8b"), "bfloat16", "2:4")
TINY = Subject("tiny", hf_config("tiny"), "float32", "2:4")
TEXTS = [Setting(1, 128, 128, 1)]
GB = 10**9


def test_memory() -> None:
    assert parse_memory("24GB") == 24 * GB and parse_memory("80GiB") == 80 * 2**30
    assert parse_memory(" 1.5e9 ") == parse_memory("1500 mb") == 1_500_000_000
    for text in ("", "GB", "0", "-1", "24 parsecs", "1e"):
        with pytest.raises(InputError, match="--memory"):
            parse_memory(text)


@pytest.mark.parametrize("memory", [24 * GB, 40 * GB, 80 * GB])
@pytest.mark.parametrize("sparse", [True, False])
def test_what_is_predicted_fits_and_one_more_does_not(memory: int, sparse: bool) -> None:
    subject = EIGHT_B.at_corner(sparse=sparse, removed=())
    batch_row, output_row = predict_rows(subject, memory, TEXTS, [4])
    for row in (batch_row, output_row):
        assert row["fits"] and row["predicted_bytes"] <= memory and not row["confirmed"]
        parts = row["weight_bytes"] + row["cache_bytes"] + row["activation_bytes"]
        assert 0 < row["predicted_bytes"] - parts < 0.2 * GB
    needed = fit._BytesNeeded(subject)
    assert needed.total(batch_row["batch"] + 1, 128, 256) > memory
    if output_row["limited_by"] == "memory":
        assert needed.total(4, 128, 128 + output_row["output_len"] + 1) > memory
    assert batch_row["cache_bytes"] >= batch_row["batch"] * 256 * batch_row["kv_bytes_per_token"]


def test_pruning_leaves_room_for_more_texts() -> None:
    corners = [(False, ()), (True, ()), (True, tuple(range(22, 30)))]
    found = [predict_rows(EIGHT_B.at_corner(sparse=s, removed=r), 24 * GB, TEXTS, [16]) for s, r in corners]
    batches = [rows[0]["batch"] for rows in found]
    outputs = [rows[1]["output_len"] for rows in found]
    assert batches == sorted(batches) and batches[1] > 1.5 * batches[0] and batches[2] > 2.5 * batches[0]
    assert outputs == sorted(outputs) and outputs[1] > 1.5 * outputs[0]


def test_a_model_that_is_too_large() -> None:
    dense = Subject("llama-2-13b", hf_config("llama-2-13b"), "bfloat16", "dense")
    for row in predict_rows(dense, 24 * GB, TEXTS, [1]):
        assert not row["fits"] and row["predicted_bytes"] > 24 * GB
        assert row["batch"] == 0 or row["output_len"] == 0
    assert all(row["fits"] for row in predict_rows(dense.at_corner(sparse=True, removed=()), 24 * GB, TEXTS, [1]))


def test_a_text_is_never_longer_than_the_model_was_made_for() -> None:
    row = predict_rows(TINY, 4 * GB, TEXTS, [1])[1]
    assert row["length"] == 4096 and row["limited_by"] == "what the model was made for"


def test_prefill_is_bounded() -> None:
    needed = fit._BytesNeeded(EIGHT_B)
    # 64 texts of 128 tokens are a chunk; more texts add their logits only, and a longer text nothing
    assert needed.activations(1000, 128) - needed.activations(64, 128) == 936 * 128256 * 8
    assert needed.activations(1, 100_000) == needed.activations(1, 8192) > needed.activations(1, 8000)


def test_the_cache_has_a_rotary_table_for_each_rope_of_the_blocks_that_run() -> None:
    sizes = {"num_hidden_layers": 7, "hidden_size": 32, "intermediate_size": 48, "vocab_size": 50, "head_dim": 16}
    gemma = Subject("gemma", hf_config("gemma-3-1b") | sizes, "float32", "dense")
    tables = []
    for removed in ((), (5,)):  # of seven blocks the sixth alone sees the whole text
        subject = gemma.at_corner(sparse=False, removed=removed)
        model = build_model(subject, "cpu")
        model.reserve_positions_(64)
        bytes_of_tables = sum(buffer.nbytes for buffer in model.rotaries.buffers())
        needed = fit._BytesNeeded(subject)
        assert needed.cache(3, 64) == 3 * 64 * needed.card.kv_bytes_per_token + bytes_of_tables
        tables.append(len(model.rotaries))
    assert tables == [2, 1]


def test_on_a_cpu_it_predicts_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--arch", "llama-3.1-8b", "--remove-blocks", "8", "--corners", "--memory", "24GB", "--device", "cpu")
    record = fit.run(parsed(fit, *words, "--batch", "1,16"))
    validate_record(record)
    assert [row["question"] for row in record["results"]] == 4 * [QUESTIONS[0], QUESTIONS[1], QUESTIONS[1]]
    assert len({row["corner"] for row in record["results"]}) == 4
    assert not any(row["confirmed"] or row["measured_bytes"] for row in record["results"])
    assert any("not confirmed by running: there is no GPU here" in note for note in record["notes"])
    output = capsys.readouterr().out
    assert output.count("predicted, not run") == 12 and "of 24.00 GB" in output


def test_trials_run_and_shrink(monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs out of memory is tried smaller until it runs."""
    tried: list[tuple[int, int]] = []
    real = fit_trial.generate_at_limits

    def generate(model: Any, batch: int, input_len: int, output_len: int) -> None:
        tried.append((batch, output_len))
        if batch * (input_len + output_len) > 90:
            raise torch.OutOfMemoryError("no")
        real(model, batch, input_len, output_len)

    monkeypatch.setattr(fit_trial, "generate_at_limits", generate)
    trials = [
        {"question": QUESTIONS[0], "batch": 6, "input_len": 12, "output_len": 8},
        {"question": QUESTIONS[1], "batch": 2, "input_len": 12, "output_len": 40},
        {"question": QUESTIONS[0], "batch": 2, "input_len": 80, "output_len": 40},
    ]
    job = {"subject": TINY.to_json(), "device": "cpu", "memory_bytes": GB, "trials": trials}
    found = fit_trial.run_trial(job)
    assert [(r["batch"], r["output_len"], r["fits"]) for r in found] == [(4, 8, True), (2, 32, True), (0, 0, False)]
    assert tried[:3] == [(6, 8), (5, 8), (4, 8)]


def test_limits_are_those_of_the_engine() -> None:
    """The last step sees all tokens: its logits are those of a plain forward over the whole text."""
    model = build_model(TINY, "cpu")
    seen: list[tuple[Any, Any]] = []
    forward = model.forward

    def spy(tokens: Any, *arguments: Any, **options: Any) -> Any:
        logits = forward(tokens, *arguments, **options)
        seen.append((tokens, logits))
        return logits

    model.forward = spy  # type: ignore[method-assign]
    fit_trial.generate_at_limits(model, 5, 7, 2)
    (prompts, _), (first, _), (second, logits) = seen[0], seen[1], seen[2]
    texts = torch.cat([prompts.view(5, 7), first, second], dim=1)  # prompts come packed
    plain = forward(texts, attention=CausalAttention())[:, -1]
    torch.testing.assert_close(logits.squeeze(1), plain, rtol=1e-4, atol=1e-4)


def test_running_corrects_the_rows() -> None:
    def start(job: dict[str, Any], silence_s: float) -> Iterator[dict[str, Any]]:
        assert job["task"] == "fit" and len(job["trials"]) == 2
        results = [{"batch": 7, "output_len": 128, "measured_bytes": 5, "reserved_bytes": 6, "fits": True}]
        yield {"event": "result", "value": results}
        yield {"event": "failed", "reason": "it broke"}

    rows = predict_rows(EIGHT_B, 24 * GB, TEXTS, [1])
    predicted = rows[0]["batch"]
    record: dict[str, Any] = {"skipped": []}
    fit._confirm(record, EIGHT_B, rows, 24 * GB, "cuda:0", 1.0, start)
    assert rows[0]["confirmed"] and rows[0]["batch"] == 7 and rows[0]["predicted"] == predicted
    assert rows[0]["measured_bytes"] == 5 and not rows[1]["confirmed"]
    assert record["skipped"] == [{"peer": "ours", "reason": "2:4: it broke"}]
    assert f"ran; {predicted} predicted" in fit._row_line(rows[0])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--arch", "tiny"), "--memory: there is no GPU here whose memory could be taken; give an amount, e.g. 24GB"),
        (("--arch", "tiny", "--memory", "much"), "--memory much"),
        (("--memory", "1GB"), "nothing to measure"),
        (("--arch", "tiny", "--memory", "1GB", "--corners"), "--remove-blocks N"),
        (("--arch", "tiny", "--memory", "1GB", "--batch", "x"), "--batch x"),
    ],
)
def test_wrong_arguments(words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "fit", "--device", "cpu", *words]) == 2
    assert message in capsys.readouterr().err


def test_the_memory_is_by_default_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (80 * GB, 85 * GB))
    assert 79 * GB < fit._free_memory(torch.device("cuda:0")) < 80 * GB


def test_what_was_predicted_is_kept_when_a_signal_comes(capsys: pytest.CaptureFixture[str]) -> None:
    """The first corner is in the record, the second one was running."""

    def predict(subject: Subject, *arguments: Any) -> list[dict[str, Any]]:
        if subject.sparse:
            raise KeyboardInterrupt
        return predict_rows(subject, *arguments)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(CutOff) as cut:
        patch.setattr(fit, "predict_rows", predict)
        fit.run(parsed(fit, "--arch", "llama-3.1-8b", "--memory", "24GB", "--device", "cpu"))
    record = cut.value.record
    validate_record(record)
    assert {row["corner"] for row in record["results"]} == {"dense"} and "cut off by SIGINT" in record["notes"][-1]
    assert capsys.readouterr().out.count("predicted, not run") == len(record["results"]) == 3


@pytest.mark.gpu
def test_confirmed_on_a_gpu() -> None:
    def start(job: dict[str, Any], silence_s: float) -> Any:
        """The pruned corner only: a process takes its time to start."""
        return start_process(job, silence_s) if job["subject"]["sparsity"] == "2:4" else (event for event in ())

    words = ("--arch", "llama-3.2-1b", "--remove-blocks", "4", "--memory", "4GB", "--device", "cuda")
    record = fit.run(parsed(fit, *words, "--batch", "8"), start=start)
    assert not record["skipped"] and len(record["results"]) == 4
    for row in record["results"]:
        assert row["confirmed"] == (row["corner"] == "2:4 + blocks removed")
        if row["confirmed"]:
            assert row["fits"] and row["measured_bytes"] <= 4 * GB
            ran = row["batch"] if row["question"] == QUESTIONS[0] else row["output_len"]
            assert ran >= 0.8 * row["predicted"], row
            assert row["measured_bytes"] >= row["weight_bytes"] + row["batch"] * row["kv_bytes_per_token"]
