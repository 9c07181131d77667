"""Architectures within a budget: counts against real models, and what is found."""

from __future__ import annotations

import pytest
from test_latency_table import RECORD
from tiny_families import make_model
from tiny_llama import make_llama

from sparsert.compress.anatomy import anatomy_of
from sparsert.compress.architecture_search import Budget, ModelShape, SearchLimits, find_candidates
from sparsert.compress.latency_table import LatencyTable
from sparsert.compress.width import Widths, widths_of
from sparsert.errors import InputError

SMOL = ModelShape(Widths(576, 1536, 9, 3, 64), 30, 49152, tied=True, gated=True)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["Llama", "Nemotron"])
def test_parameters_are_those_of_the_matrices(family: str, tied: bool) -> None:
    model = make_model(family, tie_word_embeddings=tied)
    shape = ModelShape(widths_of(anatomy_of(model)), 3, 211, tied=tied, gated=family == "Llama")
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters() if parameter.ndim == 2)
    assert shape.nbytes() == 2 * shape.parameters
    assert len(shape.layers()) == 3 * 4 + 1


def test_packed_blocks_take_nine_sixteenths() -> None:
    head = 2 * 49152 * 576
    assert SMOL.nbytes(sparse=True) - head == (SMOL.nbytes() - head) * 9 // 16


def test_candidates_lie_close_below_the_budget() -> None:
    budget = Budget("parameters", 100e6)
    found = find_candidates(SMOL, budget, SearchLimits(depth=0.2), accept=lambda w: w.hidden % w.heads == 0)
    costs = [budget.cost(shape) for shape in found]
    assert len(found) > 5 and costs == sorted(costs, reverse=True)
    assert all(0.95 * 100e6 <= cost <= 100e6 for cost in costs)
    for shape in found:
        widths = shape.widths
        assert 24 <= shape.blocks <= 30 and widths.hidden % widths.heads == 0
        assert widths.hidden % 64 == 0 and widths.intermediate % 64 == 0
        assert widths.hidden >= 0.6 * 576 and widths.intermediate >= 0.6 * 1536 and widths.heads >= 0.6 * 9
    assert len({shape.blocks for shape in found}) > 1 and len({shape.widths.intermediate for shape in found}) > 1


def test_without_depth_every_block_stays() -> None:
    found = find_candidates(SMOL, Budget("bytes", 160e6, sparse=True), SearchLimits())
    assert {shape.blocks for shape in found} == {30}
    assert all(shape.nbytes(sparse=True) <= 160e6 for shape in found)


def test_measured_microseconds_are_a_budget() -> None:
    table = LatencyTable(RECORD)
    tiny = ModelShape(Widths(128, 256, 4, 2, 32), 4, 512, tied=False, gated=True)
    whole = Budget("us", 1.0, table=table).cost(tiny)
    budget = Budget("us", 0.8 * whole, table=table)
    found = find_candidates(tiny, budget, SearchLimits(depth=0.5))
    assert found and all(table.total(shape.layers()).us <= 0.8 * whole for shape in found)


def test_the_closest_is_taken_where_none_is_close() -> None:
    coarse = SearchLimits(width=0.5, multiple=512)
    shape = ModelShape(Widths(1024, 2048, 8, 8, 128), 2, 100, tied=True, gated=True)
    budget = Budget("parameters", shape.parameters - 1)
    found = find_candidates(shape, budget, coarse)
    everything = [candidate for candidate in found if budget.cost(candidate) <= budget.value]
    assert found == everything and len(found) >= 1


def test_budgets_that_cannot_be_met() -> None:
    with pytest.raises(InputError, match=r"no architecture fits 1,000 parameters.*takes [\d,]+; raise the budget"):
        find_candidates(SMOL, Budget("parameters", 1000), SearchLimits())
    for arguments, message in (
        (("flops", 1.0), "budget of 'flops' is not known; choose one of parameters, bytes, us"),
        (("bytes", 0.0), "budget of 0.0 bytes cannot be met"),
        (("us", 5.0), "needs measured times; give a record of `sparsert bench kernels`"),
    ):
        with pytest.raises(InputError, match=message):
            Budget(*arguments)
    with pytest.raises(InputError, match=r"width is 1\.0"):
        SearchLimits(width=1.0)
    with pytest.raises(InputError, match="multiple is 0"):
        SearchLimits(multiple=0)


def test_the_whole_model_is_a_candidate_of_its_own_cost() -> None:
    shape = ModelShape(widths_of(anatomy_of(make_llama())), 3, 211, tied=False, gated=True)
    assert find_candidates(shape, Budget("bytes", shape.nbytes()), SearchLimits(multiple=16))[0] == shape
