"""SamplingParams: defaults and refusals."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from sparsert.engine import SamplingParams
from sparsert.errors import InputError


def test_defaults_are_greedy_and_frozen() -> None:
    params = SamplingParams()
    assert params.greedy and params.max_new_tokens == 128
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.temperature = 1.0  # type: ignore[misc]
    with pytest.raises(TypeError):
        SamplingParams(temprature=1.0)  # type: ignore[call-arg]


def test_one_string_or_several() -> None:
    assert SamplingParams(stop="ab").stop == ("ab",)
    assert SamplingParams(stop=["ab", "c"], stop_token_ids=[3, 4]).stop == ("ab", "c")
    assert SamplingParams(stop_token_ids=[3, 4]).stop_token_ids == (3, 4)
    assert SamplingParams(top_k=0, top_p=1, min_p=1, temperature=2, seed=0).temperature == 2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0; it must be a whole number, at least 1"),
        ({"max_new_tokens": 2.0}, r"max_new_tokens is 2\.0"),
        ({"temperature": -0.1}, r"temperature is -0\.1; it must be a number, 0 \(greedy\) or more"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": "hot"}, "temperature is 'hot'"),
        ({"top_k": -1}, "top_k is -1; it must be a whole number, 0 for off"),
        ({"top_k": True}, "top_k is True"),
        ({"top_p": 0.0}, r"top_p is 0\.0; it must be above 0 and at most 1"),
        ({"top_p": 1.5}, r"top_p is 1\.5"),
        ({"min_p": 1.5}, r"min_p is 1\.5; it must be between 0 and 1"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0; it must be a number above 0"),
        ({"seed": -1}, "seed is -1; it must be a whole number between 0"),
        ({"seed": 2**64}, "seed is 18446744073709551616"),
        ({"stop": [""]}, "strings that are not empty"),
        ({"stop": [7]}, "strings that are not empty"),
        ({"stop_token_ids": [-3]}, r"stop_token_ids is \(-3,\); it must be token ids, 0 or more"),
    ],
)
def test_refusals_name_value_and_range(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        SamplingParams(**given)
