"""Costs refined from step timings: what is observed is learnt, what is not stays, nothing becomes negative."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from preble_jax.config import SchedSettings
from preble_jax.sched import GlobalScheduler
from preble_jax.sched.cost import LinearCostModel
from preble_jax.sched.step_fit import PROFILED_ROWS, StepFit, StepTotals, solve_nonnegative

START = LinearCostModel(prefill_base_s=0.03, prefill_token_s=0.0008, decode_token_s=0.006)
BASE, TOKEN, ROW = 0.01, 0.0002, 0.0005  # of the device that is really there


class Device:
    """Reports totals of steps whose times follow BASE, TOKEN and ROW, with 5% of noise."""

    def __init__(self, *, prefill: bool = True, decode: bool = True) -> None:
        self._random = random.Random(0)
        self._prefill, self._decode = prefill, decode
        self._totals = StepTotals(0, 0, 0, 0.0)

    def report(self) -> StepTotals:
        for _ in range(self._random.randint(1, 6)):
            tokens = self._prefill * self._random.choice((0, 0, 64, 256))
            rows = self._decode * self._random.randint(1, 16)
            seconds = (BASE + TOKEN * tokens + ROW * rows) * self._random.uniform(0.95, 1.05)
            steps, all_tokens, all_rows, all_s = self._totals
            self._totals = StepTotals(steps + 1, all_tokens + tokens, all_rows + rows, all_s + seconds)
        return self._totals


def fitted(device: Device, num_reports: int) -> LinearCostModel:
    fit, model = StepFit(START), START
    for _ in range(num_reports):
        model = fit.observe(device.report()) or model
    return model


def test_a_device_is_learnt_from_its_reports() -> None:
    model = fitted(Device(), 3000)
    assert model.prefill_base_s == pytest.approx(BASE, rel=0.25)
    assert model.prefill_token_s == pytest.approx(TOKEN, rel=0.15)
    assert model.decode_token_s == pytest.approx(ROW + BASE / 8.5, rel=0.1)
    # The row alone, which is harder to tell from the base than the sum of both is.
    assert 0.5 * ROW < model.decode_row_s < 2 * ROW


def test_what_is_not_observed_stays_as_profiled() -> None:
    model = fitted(Device(prefill=False), 1000)
    assert model.prefill_token_s == pytest.approx(START.prefill_token_s)
    assert model.decode_token_s < 0.5 * START.decode_token_s
    assert model.decode_row_s < 0.5 * START.decode_row_s


def test_without_observations_there_is_no_new_model() -> None:
    fit = StepFit(START)
    assert fit.observe(StepTotals(0, 0, 0, 0.0)) is None
    assert fit.observe(StepTotals(0, 0, 0, 0.0)) is None
    assert fit.observe(StepTotals(10, 640, 0, 0.9)) is None  # less than refit_s of step time
    assert fit.observe(StepTotals(20, 1280, 0, 1.8)) is not None


def test_a_device_like_the_profiled_one_changes_nothing() -> None:
    row = START.decode_token_s - START.prefill_base_s / PROFILED_ROWS
    fit, totals, model = StepFit(START), StepTotals(0, 0, 0, 0.0), None
    for tokens in (0, 64, 256) * 40:
        seconds = START.prefill_base_s + START.prefill_token_s * tokens + row * PROFILED_ROWS
        totals = StepTotals(totals[0] + 1, totals[1] + tokens, totals[2] + int(PROFILED_ROWS), totals[3] + seconds)
        model = fit.observe(totals) or model
    assert model is not None
    assert vars(model) == pytest.approx(vars(START))


def test_a_row_costs_the_same_however_many_share_the_step() -> None:
    fit, totals, model = StepFit(START), StepTotals(0, 0, 0, 0.0), None
    for tokens in (0, 64, 256) * 40:
        seconds = START.prefill_base_s + START.prefill_token_s * tokens + START.decode_row_s * 40
        totals = StepTotals(totals[0] + 1, totals[1] + tokens, totals[2] + 40, totals[3] + seconds)
        model = fit.observe(totals) or model
    assert model is not None
    assert model.decode_row_s == pytest.approx(START.decode_row_s)
    assert model.decode_token_s == pytest.approx(START.decode_row_s + START.prefill_base_s / 40, rel=0.02)


def test_a_group_that_starts_anew_is_no_observation() -> None:
    fit = StepFit(START)
    fit.observe(StepTotals(1000, 0, 0, 50.0))
    assert fit.observe(StepTotals(1, 0, 0, 9.0)) is None
    assert fit.observe(StepTotals(1, 0, 0, 9.0)) is None


totals = st.builds(StepTotals, st.integers(0, 10**6), st.integers(0, 10**9), st.integers(0, 10**8), st.floats(0.0, 1e6))


@given(st.lists(totals, max_size=20))
def test_costs_are_never_negative_or_undefined(reports: list[StepTotals]) -> None:
    fit = StepFit(START)
    for report in reports:
        model = fit.observe(report)
        if model is not None:
            assert model.prefill_ns(1000) >= 0
            assert model.decode_ns(10.0) >= model.row_ns(10.0) >= 0


@given(st.integers(0, 2**32 - 1))
def test_the_solution_is_the_constrained_minimum(seed: int) -> None:
    """Karush-Kuhn-Tucker: where x > 0 the gradient vanishes, where x = 0 it does not point inwards."""
    rng = np.random.default_rng(seed)
    factor = rng.standard_normal((5, 3))
    gram, moment = factor.T @ factor + 0.1 * np.eye(3), rng.standard_normal(3)
    x = np.array(solve_nonnegative(gram.tolist(), moment.tolist()))
    gradient = gram @ x - moment
    assert (x >= 0).all()
    assert np.allclose(gradient[x > 0], 0.0, atol=1e-9)
    assert (gradient[x == 0] >= -1e-9).all()


class Report:
    num_waiting = num_running = 0


def test_the_scheduler_refines_one_group_and_not_the_other() -> None:
    scheduler, device = GlobalScheduler(SchedSettings(), 16), Device()
    for group in ("a", "b"):
        scheduler.add_group(group, 100, 1, 0.0)
    for _ in range(500):
        scheduler.load_report("a", Report(), 0.0, steps=device.report())
    refined, other = (scheduler.cost_of(group) for group in ("a", "b"))
    assert refined.prefill_ns(1000) < 0.5 * other.prefill_ns(1000)
    scheduler.validate()


def test_refining_can_be_switched_off() -> None:
    scheduler, device = GlobalScheduler(SchedSettings(refine_costs=False), 16), Device()
    scheduler.add_group("a", 100, 1, 0.0)
    before = scheduler.cost_of("a")
    for _ in range(100):
        scheduler.load_report("a", Report(), 0.0, steps=device.report())
    assert scheduler.cost_of("a") is before
