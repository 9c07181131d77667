"""The parts of a decode step: named ranges are found, every operator counts once, and the model is left as it was."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from bench_arguments import parsed

from sparsert.bench import profile, step_profile
from sparsert.bench.architectures import hf_config
from sparsert.bench.records import validate_record
from sparsert.bench.step_profile import ATTENTION, GAPS, HEAD, LINEARS, OTHER, PARTS, SAMPLING, profile_step
from sparsert.bench.subject import Subject, build_model
from sparsert.cli import main

SUBJECT = Subject("tiny", hf_config("tiny"), "float32", "2:4")


def test_parts_add_up_to_the_step() -> None:
    model = build_model(SUBJECT, "cpu")
    found = profile_step(model, 2, 10, steps=3)
    assert tuple(found.parts_us) == PARTS
    assert all(spent > 0 for spent in found.parts_us.values()), found
    assert sum(found.parts_us.values()) == pytest.approx(found.step_us)
    assert found.overlap == 1
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks


def test_the_widest_layers_take_the_linears() -> None:
    """A model whose head is its largest matrix, and one whose blocks are."""
    head = Subject("x", hf_config("tiny") | {"vocab_size": 100_000, "num_hidden_layers": 4}, "float32", "dense")
    blocks = Subject("x", hf_config("tiny") | {"intermediate_size": 50_000, "num_hidden_layers": 4}, "float32", "dense")
    found = profile_step(build_model(head, "cpu"), 1, 4, steps=3).parts_us
    assert found[HEAD] > found[LINEARS]
    found = profile_step(build_model(blocks, "cpu"), 1, 4, steps=3).parts_us
    assert found[LINEARS] > found[HEAD] and found[LINEARS] > found[ATTENTION]


def event(name: str, parent: Any = None, us: float = 0.0, kernels: tuple[float, ...] = ()) -> Any:
    return types.SimpleNamespace(
        name=name,
        cpu_parent=parent,
        self_cpu_time_total=us,
        cpu_time_total=us,
        kernels=[types.SimpleNamespace(duration=duration) for duration in kernels],
    )


def test_a_kernel_belongs_to_the_innermost_range() -> None:
    step = event("sparsert.bench: step")
    linears = event("sparsert.bench: linears", parent=step)
    operator = event("sparsert::linear24", parent=linears)
    assert step_profile._part_of(event("aten::mm", parent=operator)) == LINEARS
    assert step_profile._part_of(event("aten::add", parent=step)) == OTHER
    assert step_profile._part_of(event("aten::add")) is None
    assert step_profile._part_of(event("linears", parent=event("aten::x"))) is None


@pytest.mark.parametrize(("graph_us", "overlap", "gaps"), [(100.0, 1.0, 30.0), (50.0, 1.4, 0.0)])
def test_gaps_and_overlap_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, graph_us: float, overlap: float, gaps: float
) -> None:
    """Kernel times come from the profiler and the step from the graph; a range's own device event is none."""
    step = event("sparsert.bench: step", kernels=(1000.0,))
    linears = event("sparsert.bench: linears", parent=step, kernels=(1000.0,))
    events = [step, linears, event("a", linears, kernels=(40.0, 10.0)), event("b", step, kernels=(20.0,)), event("c")]
    monkeypatch.setattr(step_profile, "_profiled_events", lambda *_: events)
    monkeypatch.setattr(step_profile, "_graph_step_us", lambda *_: graph_us)
    model: Any = types.SimpleNamespace(device=torch.device("cuda:0"), config=types.SimpleNamespace(vocab_size=9))
    found = profile_step(model, 1, 2, steps=1)
    assert found.overlap == pytest.approx(overlap) and found.step_us == graph_us
    assert found.parts_us[LINEARS] == pytest.approx(50 / overlap)
    assert found.parts_us[OTHER] == pytest.approx(20 / overlap)
    assert found.parts_us[GAPS] == pytest.approx(gaps) and found.parts_us[SAMPLING] == 0
    assert sum(found.parts_us.values()) == pytest.approx(graph_us)


def test_record_and_table(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--arch", "tiny", "--remove-blocks", "1", "--batch", "1,2", "--steps", "2", "--context", "8")
    record = profile.run(parsed(profile, *words, "--device", "cpu"))
    validate_record(record)
    rows = record["results"]
    assert len(rows) == 2 * 2 * len(PARTS)
    assert {(row["peer"], row["corner"]) for row in rows} == {("dense", "dense"), ("ours", "2:4 + blocks removed")}
    for start in range(0, len(rows), len(PARTS)):
        assert sum(row["share"] for row in rows[start : start + len(PARTS)]) == pytest.approx(1)
    output = capsys.readouterr().out
    assert all(f"\n{part}" in output for part in PARTS) and "shares are rough" in output


def test_too_little_memory_for_one_leaves_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(subject: Subject, device: Any) -> Any:
        if not subject.sparse:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")
        return build_model(subject, device)

    monkeypatch.setattr(profile, "build_model", build)
    record = profile.run(parsed(profile, "--arch", "tiny", "--steps", "1", "--device", "cpu"))
    assert {row["corner"] for row in record["results"]} == {"2:4"}
    assert record["skipped"] == [{"peer": "dense", "reason": "dense: out of memory: CUDA out of memory"}]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--arch", "tiny", "--batch", "17"), "up to 16 texts"),
        (("--arch", "tiny", "--steps", "0"), "--steps 0"),
        (("--arch", "tiny", "--context", "0"), "--context 0"),
        (("--arch", "tiny", "--context", "4090"), "--context 4090"),
        ((), "nothing to measure"),
    ],
)
def test_wrong_arguments(words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "profile", "--device", "cpu", *words]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    config = hf_config("llama-3.1-8b") | {"num_hidden_layers": 4, "vocab_size": 4096}
    for sparsity in ("dense", "2:4"):
        model = build_model(Subject("x", config, "bfloat16", sparsity), "cuda:0")
        found = profile_step(model, 1, 64, steps=10)
        assert sum(found.parts_us.values()) == pytest.approx(found.step_us)
        assert all(found.parts_us[part] > 0 for part in PARTS if part != GAPS), found
