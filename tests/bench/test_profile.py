"""The parts of a decode step: operators on a CPU and kernels on a GPU count once, and the model is left as it was."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from bench_arguments import parsed

from sparsert.bench import profile, step_profile
from sparsert.bench.architectures import hf_config
from sparsert.bench.operator_times import read_operators
from sparsert.bench.records import new_record, validate_record
from sparsert.bench.step_parts import ATTENTION, GAPS, HEAD, LINEARS, OTHER, PARTS, SAMPLING
from sparsert.bench.step_profile import StepProfile, profile_step
from sparsert.bench.subject import Subject, build_model
from sparsert.cli import main

SUBJECT = Subject("tiny", hf_config("tiny"), "float32", "2:4")


def test_parts_add_up_to_the_step() -> None:
    model = build_model(SUBJECT, "cpu")
    found = profile_step(model, 2, 10, steps=3)
    assert tuple(found.parts_us) == PARTS
    assert all(spent > 0 for spent in found.parts_us.values()), found
    assert sum(found.parts_us.values()) == pytest.approx(found.step_us)
    assert (found.profiled_us, found.kernels, found.largest_gap_us) == (found.step_us, None, None)
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks


def spends_most(model: torch.nn.Module, part: str, others: tuple[str, ...]) -> StepProfile:
    """A profile of a step whose ``part`` takes longest: of up to five, since a busy machine holds any part up."""
    for _ in range(5):
        found = profile_step(model, 1, 4, steps=3)
        if all(found.parts_us[part] > found.parts_us[other] for other in others):
            return found
    raise AssertionError(found)


@pytest.mark.parametrize("sparsity", ["dense", "2:4"])
@pytest.mark.parametrize("family", ["gated", "ungated"])
def test_the_widest_layers_take_the_linears(family: str, sparsity: str) -> None:
    """A model whose head is its largest matrix, and one whose blocks are; however the model calls its layers."""
    shape = hf_config("tiny") | {"num_hidden_layers": 2}
    if family == "ungated":
        shape |= {"model_type": "nemotron", "architectures": ["NemotronForCausalLM"], "hidden_act": "relu2"}
        shape |= {"norm_eps": 1e-5, "partial_rotary_factor": 0.5}
    head = build_model(Subject("x", shape | {"vocab_size": 100_000}, "float32", sparsity), "cpu")
    assert spends_most(head, HEAD, (LINEARS,))
    blocks = build_model(Subject("x", shape | {"intermediate_size": 50_048}, "float32", sparsity), "cpu")
    found = spends_most(blocks, LINEARS, (HEAD, ATTENTION, OTHER))
    products = sum(o.count for o in found.operations if o.name == OPERATOR[sparsity] and o.part == LINEARS)
    assert products == 2 * 4, "q k v, o, gate and up, down, in each of two blocks"


#: What a linear layer of a block is on a CPU.
OPERATOR = {"dense": "aten::linear", "2:4": "sparsert::linear24"}


def event(name: str, parent: Any = None, us: float = 0.0, at: float = 0.0) -> Any:
    """One of the profiler's, of its own time ``us``."""
    time_range = types.SimpleNamespace(start=at, end=at + us)
    return types.SimpleNamespace(name=name, cpu_parent=parent, self_cpu_time_total=us, time_range=time_range)


def test_an_operator_belongs_to_what_is_around_it() -> None:
    """Two steps: a linear layer within attention, one around another, and the last one of each step is the head."""
    events = [event("aten::elsewhere", us=1000.0), event("sparsert.bench: attention", us=1000.0)]
    for begin in (0.0, 100.0):
        step = event("sparsert.bench: step", us=7.0, at=begin)
        attention = event("sparsert.bench: attention", step, 1.0, begin + 10)
        query = event("aten::linear", attention, 2.0, begin + 10)
        packed = event("sparsert::linear24", step, 3.0, begin + 30)
        inside = event("aten::linear", packed, 4.0, begin + 31)
        head = event("aten::linear", step, 5.0, begin + 50)
        events += [
            step, attention, query, packed, inside, head,
            event("aten::mm", query, 10.0, begin + 10),
            event("aten::index", attention, 20.0, begin + 15),
            event("aten::mm", inside, 30.0, begin + 32),
            event("aten::add", step, 40.0, begin + 40),
            event("aten::mm", head, 50.0, begin + 51),
            event("aten::argmax", step, 60.0, begin + 60),
        ]  # fmt: skip
    spent, operations = read_operators(events, 2)
    assert spent == {LINEARS: 49, ATTENTION: 20, OTHER: 40, HEAD: 55, SAMPLING: 60, GAPS: 8}
    assert {(o.name, o.part): (o.count, o.us) for o in operations} == {
        ("aten::linear", LINEARS): (2, 6),
        ("aten::linear", HEAD): (1, 5),
        ("sparsert::linear24", LINEARS): (1, 3),
        ("aten::mm", LINEARS): (2, 40),
        ("aten::mm", HEAD): (1, 50),
        ("aten::index", ATTENTION): (1, 20),
        ("aten::add", OTHER): (1, 40),
        ("aten::argmax", SAMPLING): (1, 60),
    }


def device_events(steps: int) -> list[Any]:
    """Steps of 100 us under the profiler: a norm, linears, the head and a copy, with gaps; and what is no kernel."""
    cuda, cpu = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU
    events = []
    for begin in range(0, 100 * steps, 100):
        for name, start, end, device, annotation in (
            ("cudaGraphLaunch", -10, 5, cpu, False),
            ("a range", 0, 99, cuda, True),
            ("residual_norm_kernel", 5, 15, cuda, False),
            ("void (anonymous namespace)::linear24_kernel<1>", 10, 65, cuda, False),
            ("residual_norm_kernel", 65, 75, cuda, False),
            ("nvjet_tst", 77, 95, cuda, False),
            ("Memcpy DtoD", 95, 100, cuda, False),
        ):
            time_range = types.SimpleNamespace(start=float(begin + start), end=float(begin + end))
            events.append(
                types.SimpleNamespace(
                    name=name, time_range=time_range, device_type=device, is_user_annotation=annotation
                )
            )
    return events


@pytest.fixture
def on_a_pretended_gpu(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Graphs of 80 us that take 100 under the profiler; how many steps were asked for."""
    asked: dict[str, int] = {}

    def decoding(model: Any, batch: int, context: int, steps: int) -> Any:
        asked["room"] = steps
        return types.SimpleNamespace(begin=lambda: None)

    def timed(_: Any, steps: int, device: Any) -> float:
        asked["timed"] = steps
        return 80.0

    def profiled(_: Any, steps: int, activity: Any) -> list[Any]:
        assert activity is torch.profiler.ProfilerActivity.CUDA
        asked["profiled"] = steps
        return device_events(steps)

    monkeypatch.setattr(step_profile, "_Decoding", decoding)
    monkeypatch.setattr(step_profile, "_timed_us", timed)
    monkeypatch.setattr(step_profile, "_profiled", profiled)
    return asked


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_shares_of_the_timeline_are_of_the_time_without_a_profiler(
    on_a_pretended_gpu: dict[str, int], steps: int
) -> None:
    model: Any = types.SimpleNamespace(device=torch.device("cuda:0"))
    found = profile_step(model, 1, 2, steps=steps)
    most = max(steps, 2)
    assert on_a_pretended_gpu == {"room": most + 1, "timed": most, "profiled": most + 1}
    assert (found.step_us, found.profiled_us, found.kernels) == (80, 100, 5)
    assert found.largest_gap_us == pytest.approx(2), "as the profiler saw it"
    expected = {LINEARS: 50, ATTENTION: 0, OTHER: 20, HEAD: 18, SAMPLING: 5, GAPS: 7}
    assert found.parts_us == pytest.approx({part: us * 0.8 for part, us in expected.items()})
    assert [(o.part, o.count, round(o.us, 6)) for o in found.operations[:2]] == [(LINEARS, 1, 40), (OTHER, 2, 16)]


def test_kernels_gaps_and_the_top_are_printed_and_recorded(
    on_a_pretended_gpu: dict[str, int], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def found(model: Any, batch: int, context: int, *, steps: int) -> StepProfile:
        return profile_step(types.SimpleNamespace(device=torch.device("cuda:0")), batch, context, steps=steps)  # type: ignore[arg-type]

    monkeypatch.setattr(step_profile, "profile_step", found)
    record = profile.run(parsed(profile, "--arch", "tiny", "--top", "2", "--batch", "3", "--device", "cpu"))
    validate_record(record)
    rows = {row["part"]: row for row in record["results"] if row["corner"] == "2:4"}
    assert all((row["kernels"], row["largest_gap_us"], row["profiled_us"]) == (5, 2, 100) for row in rows.values())
    linear = {"name": "void (anonymous namespace)::linear24_kernel<1>", "part": LINEARS, "count": 1}
    assert rows[LINEARS]["top"] == [linear | {"us": pytest.approx(40)}]
    assert [entry["name"] for entry in rows[OTHER]["top"]] == ["residual_norm_kernel"]
    assert rows[HEAD]["top"] == []
    output = capsys.readouterr().out
    assert "\n2:4, batch 3: 5 kernels a step, largest gap between two 2.0 us\n" in output
    assert "adding most to 2:4, batch 3 " in output
    lines = [line.split() for line in output.splitlines()]
    assert ["linears", "40.0", "1", "40.00", "linear24_kernel<1>"] in lines
    assert ["norms,", "rope,", "activation", "16.0", "2", "8.00", "residual_norm_kernel"] in lines
    assert "2:4, batch 3: under the profiler the step took 1.250 of its time" in output


def test_records_from_before_the_timeline_are_shown() -> None:
    rows = [
        {"corner": "dense", "batch": 1, "part": part, "us": 2.0, "share": 1 / len(PARTS), "step_us": 12.0}
        for part in PARTS
    ]
    record = new_record("profile", {}, device="cpu") | {"results": rows}
    validate_record(record)
    assert len(profile.table_lines(record)) == 2 + len(PARTS)


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
    assert "kernels a step" not in output and "adding most" not in output


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
        (("--arch", "tiny", "--top", "-1"), "--top -1"),
        ((), "nothing to measure"),
    ],
)
def test_wrong_arguments(words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "profile", "--device", "cpu", *words]) == 2
    assert message in capsys.readouterr().err


def test_the_longest_context_that_is_let_through_fits() -> None:
    config = hf_config("tiny") | {"max_position_embeddings": 64, "num_hidden_layers": 1}
    model = build_model(Subject("x", config, "float32", "dense"), "cpu")
    assert profile_step(model, 1, 64 - 2 - step_profile.SPARE_POSITIONS, steps=2).step_us > 0


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    """A small head keeps the blocks in front; steps across the end of a window are one graph."""
    config = hf_config("llama-3.1-8b") | {"num_hidden_layers": 4, "vocab_size": 4096}
    for sparsity in ("dense", "2:4"):
        model = build_model(Subject("x", config, "bfloat16", sparsity), "cuda:0")
        found = profile_step(model, 1, 250, steps=10)
        assert sum(found.parts_us.values()) == pytest.approx(found.step_us)
        assert all(found.parts_us[part] > 0 for part in PARTS if part != GAPS), found
        assert max(found.parts_us, key=found.parts_us.__getitem__) == LINEARS, found
        assert found.kernels is not None and found.kernels >= 4 * 5, found
        assert found.largest_gap_us is not None and found.largest_gap_us < found.profiled_us
        assert sum(operation.count for operation in found.operations) == found.kernels
        linear = [o for o in found.operations if o.part == LINEARS and "linear24" in o.name]
        assert sum(o.count for o in linear) == (4 * 4 if sparsity == "2:4" else 0), found
