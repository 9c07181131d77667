"""Contenders in processes of their own: a dead, hanging or failing one costs its own rows only."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_llama import magnitude_prune_, make_llama, save

from sparsert.bench import peers
from sparsert.bench.architectures import hf_config
from sparsert.bench.effort import Effort
from sparsert.bench.engine_contender import EngineContender, TimedRunner
from sparsert.bench.metrics import Run
from sparsert.bench.peer_worker import execute, reason_of
from sparsert.bench.peers import Entry, generation_job, line_up, start_here, start_process, why_absent
from sparsert.bench.subject import Subject, build_model, fill_dense_, stored_sparsity
from sparsert.bench.transformers_contender import TransformersContender
from sparsert.bench.workload import Setting, random_prompts
from sparsert.checkpoint import open_checkpoint
from sparsert.errors import InputError, UnsupportedError
from sparsert.models import load_model
from sparsert.nn import SparseLinear

CPU = torch.device("cpu")
SUBJECT = Subject("tiny", hf_config("tiny"), "float32", "2:4", removed=(4,))
ONCE = Effort(warmup=0, runs=1, time_limit_s=60.0)
SETTINGS = [Setting(1, 6, 4, 1), Setting(2, 6, 4, 3)]


def job(peer: str = "ours", subject: Subject = SUBJECT, **changes: Any) -> dict[str, Any]:
    entry = Entry(peer, subject)
    options: dict[str, Any] = {"device": "cpu", "warmup": 0, "runs": 2, "time_limit_s": 60.0, "seed": 0, "check": True}
    return generation_job(entry, SETTINGS, **(options | changes))


def test_line_up() -> None:
    entries, skipped = line_up(SUBJECT, ["hf", "dense", "torch-sparse"], corners=False)
    assert [(e.peer, e.subject.corner) for e in entries] == [
        ("dense", "dense"),
        ("ours", "2:4 + blocks removed"),
        ("hf", "dense"),
        ("torch-sparse", "2:4 + blocks removed"),
    ]
    assert not skipped
    entries, _ = line_up(SUBJECT, [], corners=True)
    assert [e.label for e in entries] == ["dense", "2:4", "blocks removed", "2:4 + blocks removed"]
    assert [e.peer for e in entries] == ["dense", "ours", "ours", "ours"]
    dense = SUBJECT.at_corner(sparse=False, removed=())
    entries, skipped = line_up(dense, ["dense", "torch-sparse"], corners=False)
    assert [(e.peer, e.subject) for e in entries] == [("dense", dense)]
    assert skipped == [{"peer": "torch-sparse", "reason": "the model measured is dense, so there is nothing 2:4 in it"}]


def test_events_of_a_contender() -> None:
    events = list(start_here(job(), 1.0))
    assert [event["event"] for event in events] == ["loaded", "row", "row", "done"]
    loaded, first, second, _ = events
    assert loaded["weight_bytes"] == SUBJECT.card().weight_bytes and loaded["kernel"]
    assert loaded["read_bytes"] == SUBJECT.card().read_bytes
    for row, setting in ((first, SETTINGS[0]), (second, SETTINGS[1])):
        assert row["runs"] == 2 and row["correct"] is True and row["error"] <= 2 * row["torch_error"]
        assert 0 < row["ttft_ms"]["p50"] < row["e2e_ms"]["p50"]
        assert 0 < row["tpot_ms"]["p50"] <= row["tpot_ms"]["p95"]
        assert row["requests_per_s"] == pytest.approx(setting.num_prompts / row["elapsed_s"])
        assert row["peak_bytes"] > 1e6 and row["peak_of"] == "the process"
        assert row["step_ms"] is None and row["capture_ms"] == 0  # no GPU, no graphs


@pytest.mark.parametrize("how", ["crash", "hang", "garbage"])
def test_a_process_that_dies_hangs_or_babbles(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    code = {
        "crash": "import os, sys; print('it broke', file=sys.stderr); os.kill(os.getpid(), 11)",
        "hang": "import time; time.sleep(60)",
        "garbage": "print('hello'); print('3'); print('{}'); raise SystemExit(3)",
    }[how]
    real = subprocess.Popen
    monkeypatch.setattr(
        peers.subprocess, "Popen", lambda command, **options: real([sys.executable, "-c", code], **options)
    )
    start = time.monotonic()
    events = list(start_process(job(), silence_s=1.0))
    assert time.monotonic() - start < 30
    assert [event["event"] for event in events] == ["failed"]
    expected = {
        "crash": "ended by SIGSEGV: it broke",
        "hang": "no sign of life for 1 s",
        "garbage": "ended with code 3",
    }
    assert events[0]["reason"] == expected[how]


def test_a_tree_in_the_working_directory_is_not_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It may lack the compiled extension; what is measured has to be the package that measures."""
    (tmp_path / "sparsert").mkdir()
    (tmp_path / "sparsert" / "__init__.py").write_text("raise RuntimeError('the wrong package')")
    monkeypatch.chdir(tmp_path)
    events = list(start_process(job(), silence_s=120))
    assert events[-1]["event"] == "done", events[-1]


def test_a_child_that_holds_the_stream_does_not_keep_us(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import os, subprocess, sys; subprocess.Popen(['sleep', '60']); print('bye', file=sys.stderr); os._exit(7)"
    real = subprocess.Popen
    monkeypatch.setattr(
        peers.subprocess, "Popen", lambda command, **options: real([sys.executable, "-c", code], **options)
    )
    start = time.monotonic()
    assert list(start_process(job(), silence_s=50)) == [{"event": "failed", "reason": "ended with code 7: bye"}]
    assert time.monotonic() - start < 20


def test_nothing_is_left_running(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaving in the middle ends the process and its own children."""
    started: list[subprocess.Popen[str]] = []
    real = subprocess.Popen
    code = (
        "import json, subprocess, sys, time;"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']);"
        "print(json.dumps({'event': 'loaded', 'child': child.pid}), flush=True); time.sleep(60)"
    )

    def popen(command: list[str], **options: Any) -> subprocess.Popen[str]:
        started.append(real([sys.executable, "-c", code], **options))
        return started[-1]

    monkeypatch.setattr(peers.subprocess, "Popen", popen)
    events: Iterator[dict[str, Any]] = start_process(job(), silence_s=60)
    child = next(events)["child"]
    events.close()  # type: ignore[attr-defined]
    assert started[0].poll() == -signal.SIGKILL
    for _ in range(50):
        try:
            state = Path(f"/proc/{child}/stat").read_text().split()[2]
        except FileNotFoundError:
            break
        if state == "Z":
            break
        time.sleep(0.1)
    else:
        os.kill(child, signal.SIGKILL)
        pytest.fail("the peer's child still runs")


def test_failures_become_events() -> None:
    absent = {**job("vllm"), "device": "cpu"}
    events = list(start_here(absent, 1.0))
    assert [event["event"] for event in events] == ["failed", "done"]
    assert "vllm" in events[0]["reason"]
    events = list(start_here(job(subject=Subject("x", {}, "float32", "2:4")), 1.0))
    assert events[0]["event"] == "failed" and "architecture" in events[0]["reason"]


def test_a_setting_that_fails_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(self: EngineContender, setting: Setting, *arguments: Any) -> Any:
        if setting.batch == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB. GPU 0 has ...")
        return real(self, setting, *arguments)

    real = EngineContender.measure
    monkeypatch.setattr(EngineContender, "measure", measure)
    events = list(start_here(job(), 1.0))
    assert [event["event"] for event in events] == ["loaded", "skipped", "row", "done"]
    assert events[1] == {"event": "skipped", "setting": 0, "reason": "out of memory: CUDA out of memory"}


def test_batches_beyond_the_engine() -> None:
    contender = EngineContender(SUBJECT, CPU, torch_sparse=False, check_rows=0)
    assert contender.check(1)["correct"] is None
    with pytest.raises(UnsupportedError, match="up to 16 texts at once"):
        contender.measure(Setting(17, 4, 2, 17), ONCE, 0)


def test_reasons_are_one_line() -> None:
    assert reason_of(ValueError("first\nsecond")) == "ValueError: first"
    assert reason_of(InputError("batch is 0;\n it must be 1")) == "batch is 0; it must be 1"
    assert reason_of(MemoryError()) == "out of memory"
    assert reason_of(KeyError()) == "KeyError"


def test_who_cannot_run_on_a_cpu() -> None:
    assert why_absent("hf", "cpu") is None and why_absent("dense", "cpu") is None
    for peer in ("hf-compile", "torch-sparse"):
        assert "on a GPU only" in str(why_absent(peer, "cpu"))
    assert "vllm is not installed" in str(why_absent("vllm", "cpu")) or "GPU only" in str(why_absent("vllm", "cpu"))
    with pytest.raises(UnsupportedError, match="on CUDA only"):
        EngineContender(SUBJECT, CPU, torch_sparse=True, check_rows=0)


def test_the_gpu_is_hidden_from_processes_that_need_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    on_cpu, on_gpu = peers._environment("cpu"), peers._environment("cuda:0")
    assert on_cpu["CUDA_VISIBLE_DEVICES"] == "" and on_gpu["CUDA_VISIBLE_DEVICES"] == "3"
    package, *rest = on_cpu["PYTHONPATH"].split(os.pathsep)
    assert (Path(package) / "sparsert").is_dir() and rest == ["/somewhere"]


def test_effort() -> None:
    def run(seconds: float) -> Run:
        return Run(((seconds,),), seconds)

    assert len(Effort(0, 3, 10.0).measure(lambda: run(1.0))) == 3
    assert len(Effort(0, 3, 10.0).measure(lambda: run(5.0))) == 2, "a second one ends at the limit"
    assert len(Effort(0, 3, 10.0).measure(lambda: run(6.0))) == 1, "a second one would end beyond it"
    assert len(Effort(0, 3, 10.0).measure(lambda: run(60.0))) == 1, "one is always made"


def test_every_token_is_timed_once() -> None:
    contender = EngineContender(SUBJECT, CPU, torch_sparse=False, check_rows=0)
    runs, _ = contender.measure(SETTINGS[1], ONCE, 0)
    assert [len(times) for times in runs[0].token_s] == [4, 4, 4]
    assert all(list(times) == sorted(times) for times in runs[0].token_s)
    # the third prompt waited until the first two had ended
    assert runs[0].token_s[2][0] > max(runs[0].token_s[0][-1], runs[0].token_s[1][-1])
    assert runs[0].elapsed_s >= runs[0].token_s[2][-1]


def test_transformers_is_timed_token_by_token() -> None:
    contender = TransformersContender(SUBJECT.at_corner(sparse=False, removed=()), CPU, compiled=False)
    runs, more = contender.measure(SETTINGS[1], Effort(1, 2, 60.0), 0)
    assert len(runs) == 2 and [len(times) for times in runs[0].token_s] == [4, 4, 4]
    assert runs[0].token_s[0] == runs[0].token_s[1] and runs[0].token_s[2][0] > runs[0].token_s[0][-1]
    facts = contender.facts()
    card = SUBJECT.at_corner(sparse=False, removed=()).card()
    assert (facts["weight_bytes"], facts["read_bytes"]) == (card.weight_bytes, card.read_bytes)
    assert more["peak_bytes"] > 0 and contender.check(1)["correct"] is None


def test_a_checkpoint_in_four_corners(tmp_path: Path) -> None:
    theirs = make_llama(num_hidden_layers=8)
    magnitude_prune_(theirs)
    directory = save(theirs, tmp_path / "pruned")
    checkpoint = open_checkpoint(directory)
    subject = Subject("pruned", checkpoint.config, "float32", "2:4", (5,), checkpoint=str(directory))
    assert stored_sparsity(checkpoint, subject.config) == "2:4"
    pruned = build_model(subject, CPU)
    assert pruned.plan.removed == (5,) and pruned.report.count("dense") == 0
    dense = build_model(subject.at_corner(sparse=False, removed=()), CPU)
    assert len(dense.blocks) == 8 and not any(isinstance(m, SparseLinear) for m in dense.modules())
    # kept values are the checkpoint's, pruned places are no zeros
    stored = theirs.model.layers[2].self_attn.o_proj.weight
    ours: Any = dense.blocks[2].get_submodule("self_attn.o_proj")
    assert torch.equal(ours.weight[stored != 0], stored[stored != 0]) and int((ours.weight == 0).sum()) == 0
    assert 0.5 < float(ours.weight[stored == 0].std() / stored[stored != 0].std()) < 2

    unpruned = save(make_llama(num_hidden_layers=8), tmp_path / "dense")
    assert stored_sparsity(open_checkpoint(unpruned), subject.config) == "dense"
    made = build_model(Subject("d", checkpoint.config, "float32", "2:4", checkpoint=str(unpruned), prune=True), CPU)
    assert made.report.count("2:4") == 7 * 8


@pytest.mark.filterwarnings("ignore:no linear layer is")
def test_filling_leaves_dense_layers_alone(tmp_path: Path) -> None:
    model = load_model(open_checkpoint(save(make_llama(), tmp_path / "model")), device="cpu")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert fill_dense_(model, torch.Generator().manual_seed(0)) == 0
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_jobs_are_plain_types() -> None:
    import json

    sent = json.loads(json.dumps(job()))
    assert Subject.from_json(sent["subject"]) == SUBJECT
    assert [Setting.from_json(value) for value in sent["settings"]] == SETTINGS
    events: list[str] = []
    execute(sent, lambda event, **values: events.append(event))
    assert events == ["loaded", "row", "row", "done"]


@pytest.mark.gpu
@pytest.mark.parametrize("peer", ["ours", "hf", "hf-compile", "torch-sparse"])
def test_contenders_on_a_gpu(peer: str) -> None:
    config = hf_config("smollm2-135m") | {"num_hidden_layers": 2}
    subject = Subject("small", config, "bfloat16", "dense" if peer.startswith("hf") else "2:4")
    events = list(start_here(job(peer, subject, device="cuda:0", warmup=1), 1.0))
    assert [event["event"] for event in events] == ["loaded", "row", "row", "done"], events
    for row in events[1:3]:
        assert row["peak_bytes"] >= events[0]["weight_bytes"] and row["peak_of"] == "tensors on the GPU"
        assert row["ttft_ms"]["p50"] > 0 and row["itl_ms"]["p50"] > 0
        if not peer.startswith("hf"):
            assert row["correct"] is True, row
            assert row["capture_ms"] == 0 and row["step_ms"]["p50"] > 0


@pytest.mark.gpu
def test_steps_lie_between_events() -> None:
    subject = Subject("tiny", hf_config("tiny"), "bfloat16", "2:4")
    runner = TimedRunner(build_model(subject, "cuda:0"), 256)
    prompts = random_prompts(SETTINGS[1], 512, 0)[:2]
    tokens = runner.prefill(prompts, 16).argmax(-1)
    for step in range(3):
        tokens = runner.decode(tokens, 6 + step).argmax(-1)
    seconds = runner.take_step_seconds()
    assert len(seconds) == 3 and min(seconds) > 0 and runner.take_step_seconds() == []
