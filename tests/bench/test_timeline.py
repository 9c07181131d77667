"""Kernels of a step by what they add: overlap, gaps, cutting a record into steps, and parts by name and order."""

from __future__ import annotations

import itertools
import random

import pytest

from sparsert.bench.step_parts import ATTENTION, GAPS, HEAD, LINEARS, OTHER, PARTS, SAMPLING, parts_of_kernels
from sparsert.bench.timeline import DeviceEvent, read_timeline
from sparsert.errors import UnsupportedError

GATHER, ARGMAX, COPY = "at::native::vectorized_gather_kernel", "reduce_kernel<ArgMaxOps<float>>", "Memcpy DtoD"
NORM = "void sparsert::(anonymous namespace)::residual_norm_kernel<__nv_bfloat16, 1>"
LINEAR = "void sparsert::(anonymous namespace)::linear24_kernel<__nv_bfloat16, 1, 2, 4, 2, 8, 8>"
ATTEND = "void sparsert::(anonymous namespace)::decode_attention_kernel<__nv_bfloat16, 128, 4>"
GEMM, SPLIT = "nvjet_tst_64x8_64x16_4x2_h_bz_TNT", "void cublasLt::splitKreduce_kernel<32, 16>"

#: A model of two equal blocks, so that there are shorter repeats inside of a step.
BLOCK = (NORM, LINEAR, ATTEND, LINEAR, NORM, LINEAR, LINEAR)
STEP = (GATHER, *BLOCK, *BLOCK, NORM, GEMM, SPLIT, ARGMAX, COPY)
STEP_PARTS = [
    OTHER,
    *[OTHER, LINEARS, ATTENTION, LINEARS, OTHER, LINEARS, LINEARS] * 2,
    OTHER,
    HEAD,
    HEAD,
    SAMPLING,
    SAMPLING,
]


def record_of(*steps: list[tuple[str, float, float]], between: float = 0.0) -> list[DeviceEvent]:
    """Events of steps given as (name, start after the last start, duration)."""
    now, events = 1000.0, []
    for step in steps:
        end = now
        for name, wait, duration in step:
            now += wait
            events.append(DeviceEvent(now, now + duration, name))
            end = max(end, now + duration)
        now = end + between
    return events


def random_step(scale: float = 1.0) -> list[tuple[str, float, float]]:
    """Kernels that overlap, follow each other at once, leave gaps, or end before an earlier one."""
    return [(name, random.uniform(0, 8) * scale, random.choice((0.5, 5.0, 20.0)) * scale) for name in STEP]


def test_shares_and_gaps_add_up_to_the_span() -> None:
    random.seed(3)
    step = random_step()
    slow, fast = ([(name, wait * f, us * f) for name, wait, us in step] for f in (1.7, 0.6))
    events = record_of(step, slow, step, fast, between=4.0)
    shuffled = random.sample(events, len(events))
    found = read_timeline(shuffled, 3)
    ends = [max(e.end_us for e in events[at : at + len(STEP)]) for at in range(0, len(events), len(STEP))]
    spans = [late - early for early, late in itertools.pairwise(ends)]
    assert found.span_us == pytest.approx(sorted(spans)[1]) == pytest.approx(spans[1])  # the median of three
    assert tuple(found.parts_us) == PARTS and sum(found.parts_us.values()) == pytest.approx(found.span_us)
    assert found.kernels == len(STEP)
    assert sum(o.us for o in found.operations) == pytest.approx(found.span_us - found.parts_us[GAPS])
    assert sum(o.count for o in found.operations) == len(STEP)
    assert [o.us for o in found.operations] == sorted((o.us for o in found.operations), reverse=True)


def test_a_kernel_counts_for_what_it_adds() -> None:
    """The picture at the top of the module, with the head and a copy behind it."""
    picture = [
        (NORM, 2.0, 10.0),  # 2 after the last step's end
        (LINEAR, 6.0, 9.0),  # 12-15 is its own
        (ATTEND, 4.0, 2.0),  # over before the linear is
        (NORM, 9.0, 6.0),  # a gap of 4
        (GEMM, 6.0, 3.0),
        ("Memset (Device)", 3.5, 1.0),  # a gap of a half
    ]
    found = read_timeline(record_of(picture, picture, picture), 2)
    expected = {OTHER: 10 + 6, LINEARS: 5, ATTENTION: 0, HEAD: 3, SAMPLING: 1, GAPS: 2 + 4 + 0.5}
    assert found.parts_us == pytest.approx(expected)
    assert found.largest_gap_us == pytest.approx(4)
    assert {(o.name, o.part): (o.count, round(o.us, 6)) for o in found.operations} == {
        (NORM, OTHER): (2, 16),
        (LINEAR, LINEARS): (1, 5),
        (ATTEND, ATTENTION): (1, 0),
        (GEMM, HEAD): (1, 3),
        ("Memset (Device)", SAMPLING): (1, 1),
    }


def test_the_gap_between_two_steps_is_not_inside_of_one() -> None:
    tight = [(name, 0.0 if place == 0 else 5.0, 5.0) for place, name in enumerate(STEP)]
    found = read_timeline(record_of(tight, tight, tight, between=50.0), 2)
    assert found.largest_gap_us == pytest.approx(0) and found.parts_us[GAPS] == pytest.approx(50)
    # where nothing stands before the first step it begins with its own first kernel
    assert read_timeline(record_of(tight, tight, between=50.0), 2).parts_us[GAPS] == pytest.approx(0)


@pytest.mark.parametrize("lead", [0, 1, 7, len(STEP), len(STEP) + 3])
def test_steps_are_cut_from_the_end(lead: int) -> None:
    """Whatever part of the step before the profiler saw, and a few copies that are none of it."""
    tight = [(name, 5.0, 5.0) for name in STEP]
    before = [(COPY, 5.0, 5.0)] * (lead - len(STEP)) + tight[max(0, len(STEP) - lead) :]
    found = read_timeline(record_of(before, *[tight] * 4), 4)
    assert found.kernels == len(STEP)
    assert found.parts_us[HEAD] == pytest.approx(10) and found.parts_us[SAMPLING] == pytest.approx(10)


@pytest.mark.parametrize("case", ["nothing", "one lost", "one more", "too few steps"])
def test_what_is_no_repeat_is_an_error(case: str) -> None:
    tight = [(name, 5.0, 5.0) for name in STEP]
    steps = {
        "nothing": [[]],
        "one lost": [tight, tight, tight[:-3], tight],
        "one more": [tight, tight, [*tight, (COPY, 1.0, 1.0)], tight],
        "too few steps": [tight, tight],
    }[case]
    count = sum(map(len, steps))
    with pytest.raises(UnsupportedError, match=rf"recorded {count} kernels.*3 equal steps; .*fewer --steps"):
        read_timeline(record_of(*steps), 3)


def test_parts_go_by_name_and_the_head_by_order() -> None:
    assert parts_of_kernels(STEP) == STEP_PARTS
    dense = [GATHER, NORM, GEMM, ATTEND, GEMM, SPLIT, NORM, GEMM, "activate_kernel", GEMM, NORM, GEMM, ARGMAX]
    assert parts_of_kernels(dense) == [
        OTHER, OTHER, LINEARS, ATTENTION, LINEARS, LINEARS, OTHER, LINEARS, OTHER, LINEARS, OTHER, HEAD, SAMPLING,
    ]  # fmt: skip
    # attention of libraries is known before "cutlass" and "splitk" are, a softmax behind the head is none
    library = ["pytorch_flash::flash_fwd_splitkv_kernel", "fmha_cutlassF_f16_aligned", "cutlass_80_GEMM", "softmax"]
    assert parts_of_kernels(library) == [ATTENTION, ATTENTION, HEAD, SAMPLING]
    assert parts_of_kernels([GATHER, LINEAR, "_add_parts_kernel", "Memset"]) == [OTHER, LINEARS, LINEARS, OTHER]
    assert parts_of_kernels([]) == []
