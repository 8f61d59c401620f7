"""The published regressions, against the formulas written out."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preble_jax.sim.cost import StepWork, find_cost
from preble_jax.sim.cost.base import StepCost

A6000, A100 = find_cost("mistral7b_a6000"), find_cost("mistral7b_a100")


def ms(
    cost: StepCost, decode: Sequence[int] = (), chunks: Sequence[tuple[int, int]] = (), unique: int = 10**9
) -> float:
    work = StepWork(num_decode=len(decode), decode_context=sum(decode), chunks=chunks, unique_context=unique)
    return 1e3 * cost.step_s(work)


@pytest.mark.parametrize(
    ("num_tokens", "linear"),
    [(1, 22.0), (191, 22.0), (192, -118 + 1.25 * 192 - 0.00256 * 192**2), (384, 0.10843 * 384 + 4.21), (512, 59.72616)],
)
def test_a6000_linear_layers(num_tokens: int, linear: float) -> None:
    assert ms(A6000, chunks=[(num_tokens, num_tokens)]) == pytest.approx((linear + 0.32) / 0.9)


def test_a6000_parabola_does_not_fall() -> None:
    """To the letter it is worth -14.8 ms at 383 tokens."""
    peak = -118 + 1.25 * 244 - 0.00256 * 244**2
    for num_tokens in (244, 300, 383):
        assert ms(A6000, chunks=[(num_tokens, num_tokens)]) == pytest.approx((peak + 0.32) / 0.9)


def test_a6000_attention() -> None:
    assert ms(A6000, decode=[1024]) == pytest.approx((22 + 0.32) / 0.9)
    assert ms(A6000, decode=[1025]) == pytest.approx((22 + 1.86e-4 * 1025 + 0.159) / 0.9)
    many = [2000] * 10
    whole = 1.86e-4 * 20_000 + 0.159
    assert ms(A6000, decode=many, unique=10_240) == pytest.approx((22 + whole / 2) / 0.9), "1,024 of each"
    assert ms(A6000, decode=many, unique=10_241) == pytest.approx((22 + whole) / 0.9)
    assert ms(A6000, decode=many[:9], chunks=[(1, 2000)], unique=10_240) == pytest.approx((22 + whole / 2) / 0.9)
    full = (1.86e-4 * 256_000 + 0.159) / 2
    assert ms(A6000, decode=[2000] * 128, unique=131_072) == pytest.approx((22 + full) / 0.9), "2^24, no more"
    crowd = [2000] * 160  # 160 * 104,858 is more than 2^24, though each has fewer than 1,024
    assert ms(A6000, decode=crowd, unique=104_857) == pytest.approx((22 + (1.86e-4 * 320_000 + 0.159) / 2) / 0.9)
    assert ms(A6000, decode=crowd, unique=104_858) == pytest.approx((22 + 1.86e-4 * 320_000 + 0.159) / 0.9)


def test_a6000_long_chunks() -> None:
    """The product decides for each chunk by itself; exactly 2^20 is not long there, but it is on the A100."""
    base = 0.10843 * 512 + 4.21 + 1.86e-4 * 2048 + 0.159
    assert ms(A6000, chunks=[(512, 2048)]) == pytest.approx(base / 0.9)
    base += 1.86e-4 * 16
    long = 1.13e-3 * 512 + 1.75e-3 * 2064 + 2.19e-6 * 512 * 2064
    assert ms(A6000, chunks=[(512, 2064)]) == pytest.approx((base + long) / 0.9)
    two = 0.10843 * 1024 + 4.21 + 1.86e-4 * (2064 + 512) + 0.159 + long
    assert ms(A6000, chunks=[(512, 2064), (512, 512)]) == pytest.approx(two / 0.9)


@pytest.mark.parametrize(("num_tokens", "linear"), [(1, 8.96), (63, 8.96), (64, 10.5), (255, 10.5), (256, 18.38536)])
def test_a100_linear_layers(num_tokens: int, linear: float) -> None:
    assert ms(A100, chunks=[(num_tokens, num_tokens)]) == pytest.approx(linear / 0.85)


def test_a100_long_chunks() -> None:
    linear = 0.05031 * 512 + 5.506
    assert ms(A100, chunks=[(512, 2047)]) == pytest.approx(linear / 0.85)
    long = 0.124 - 7.45e-4 * 512 + 1.72e-3 * 2048 + 1.363e-6 * 512 * 2048
    assert ms(A100, chunks=[(512, 2048)]) == pytest.approx((linear + long) / 0.85)


@pytest.mark.parametrize(
    ("name", "constant", "e", "s", "es"),
    [
        ("llama70b_tp2_a100", 28.93, 0.1822, 4.004e-3, 2.551e-6),
        ("llama70b_tp2_h100", 18.67, 0.0799, 2.685e-3, 7.443e-7),
    ],
)
def test_llama_sums_over_requests(name: str, constant: float, e: float, s: float, es: float) -> None:
    def request(extend: int, length: int) -> float:
        return constant + e * extend + s * length + es * extend * length

    batched, literal = find_cost(name), find_cost(f"{name}_per_request")
    chunks = [(512, 1000), (100, 100)]
    expected = request(512, 1000) + request(100, 100)
    assert ms(batched, chunks=chunks) == pytest.approx(expected)
    assert ms(literal, chunks=chunks) == pytest.approx(expected)
    assert ms(literal, decode=[700, 900], chunks=chunks) == pytest.approx(expected + request(1, 700) + request(1, 900))
    crowd = ms(batched, decode=[1000] * 32)
    assert constant < crowd < 2 * constant, "those who decode read the weights together"
    assert expected < ms(batched, decode=[1000] * 32, chunks=chunks) < expected + crowd - constant + 1e-9


NAMES = st.sampled_from(["mistral7b_a6000", "mistral7b_a100", "llama70b_tp2_a100", "llama70b_tp2_h100"])
CHUNKS = st.lists(st.tuples(st.integers(1, 600), st.integers(0, 20_000)).map(lambda c: (c[0], sum(c))), max_size=4)


@settings(deadline=None)
@given(NAMES, st.lists(st.integers(1, 20_000), max_size=64), CHUNKS, st.integers(1, 600))
def test_more_work_takes_more_time(name: str, decode: list[int], chunks: list[tuple[int, int]], extend: int) -> None:
    cost = find_cost(name)
    assert 0.0 < ms(cost, decode, chunks) <= ms(cost, decode, [*chunks, (extend, extend)]) < float("inf")
