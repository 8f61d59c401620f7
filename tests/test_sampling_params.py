"""Sampling parameters: what is accepted, and that each bad value is refused with its name and what came."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preble_jax.errors import InvalidRequestError
from preble_jax.sampling_params import SamplingParams


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("max_tokens", 0, "an integer >= 1"),
        ("max_tokens", 1.0, "an integer >= 1"),
        ("max_tokens", True, "an integer >= 1"),
        ("temperature", -0.1, "a finite number >= 0"),
        ("temperature", math.nan, "a finite number >= 0"),
        ("temperature", math.inf, "a finite number >= 0"),
        ("temperature", "hot", "a finite number >= 0"),
        ("top_k", -1, "an integer >= 0"),
        ("top_p", 0.0, "a finite number > 0 and <= 1"),
        ("top_p", 1.01, "a finite number > 0 and <= 1"),
        ("top_p", math.nan, "a finite number > 0 and <= 1"),
        ("min_p", -0.1, "a finite number >= 0 and <= 1"),
        ("min_p", 1.1, "a finite number >= 0 and <= 1"),
        ("seed", -1, "an integer in [0, 4294967295]"),
        ("seed", 1 << 32, "an integer in [0, 4294967295]"),
        ("seed", False, "an integer in [0, 4294967295]"),
    ],
)
def test_a_bad_number_says_what_was_expected_and_what_came(field: str, value: object, expected: str) -> None:
    bad: dict[str, Any] = {field: value}
    with pytest.raises(InvalidRequestError) as caught:
        SamplingParams(**bad)
    assert str(caught.value) == f"{field}: expected {expected}, got {value!r}"


@pytest.mark.parametrize(
    "bad",
    [
        {"stop": ""},
        {"stop": ["a", ""]},
        {"stop": [3]},
        {"stop_token_ids": [-1]},
        {"stop_token_ids": ["a"]},
        {"stop": 5},
        {"stop_token_ids": 5},
        {"stop_token_ids": "12"},
    ],
)
def test_bad_stops_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError, match=f"^{next(iter(bad))}: expected"):
        SamplingParams(**bad)


@pytest.mark.parametrize(
    ("given_stop", "stop"), [((), ()), ("end", ("end",)), (["a", "b"], ("a", "b")), (("a",), ("a",))], ids=repr
)
def test_stop_is_a_tuple_of_strings_whatever_came(given_stop: Any, stop: tuple[str, ...]) -> None:
    assert SamplingParams(stop=given_stop).stop == stop


def test_stop_token_ids_become_a_tuple() -> None:
    assert SamplingParams(stop_token_ids=[2, 0]).stop_token_ids == (2, 0)


def test_only_temperature_zero_is_greedy() -> None:
    assert SamplingParams(temperature=0).greedy
    assert SamplingParams(temperature=0.0).greedy
    assert not SamplingParams().greedy


def test_frozen_and_by_keyword_only() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        SamplingParams().max_tokens = 3  # type: ignore[misc]
    with pytest.raises(TypeError):
        SamplingParams(3)  # type: ignore[misc]


valid = st.fixed_dictionaries(
    {},
    optional={
        "max_tokens": st.integers(1, 1 << 20),
        "temperature": st.floats(0, 100) | st.integers(0, 100),
        "top_k": st.integers(0, 1 << 20),
        "top_p": st.floats(0, 1, exclude_min=True),
        "min_p": st.floats(0, 1),
        "seed": st.none() | st.integers(0, (1 << 32) - 1),
        "stop": st.text(min_size=1) | st.lists(st.text(min_size=1)),
        "stop_token_ids": st.lists(st.integers(0, 1 << 20)),
    },
)


@given(valid)
def test_valid_parameters_survive_a_round_trip(keywords: dict[str, Any]) -> None:
    params = SamplingParams(**keywords)
    assert dataclasses.replace(params) == params
    hash(params)


@given(st.floats(), st.floats(), st.floats())
def test_nothing_but_numbers_in_range_gets_through(temperature: float, top_p: float, min_p: float) -> None:
    in_range = math.isfinite(temperature) and temperature >= 0 and 0 < top_p <= 1 and 0 <= min_p <= 1
    try:
        SamplingParams(temperature=temperature, top_p=top_p, min_p=min_p)
    except InvalidRequestError:
        assert not in_range
    else:
        assert in_range
