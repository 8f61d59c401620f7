"""Fitting step costs to measured steps, and measuring steps of a chosen kind."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preble_jax.config import EngineSettings
from preble_jax.engine.shapes import StepShapes
from preble_jax.engine.step_cost_fit import fit_bounded, fit_step_costs
from preble_jax.engine.step_probe import Probe, StepProber, choose_probes
from preble_jax.sched.step_costs import KEY_TERMS, KeyCosts, StepCosts, StepKind

TRUE = StepCosts(
    decode_s=((8, 0.027), (16, 0.033)),
    mixed_s=((64, 0.076), (256, 0.18)),
    keys=KeyCosts(
        row_s=2e-4, key_s=2e-6, slot_key_s=1.6e-6, shared_key_s=1e-5, chunk_s=2e-3, pair_s=3.5e-7, token_s=2e-4
    ),
    min_sharers=5,
    tile=32,
    dispatch_s=3e-3,
)
KINDS = [
    *(StepKind(n, n * c, c, 0, ()) for n in (1, 4, 8, 9, 16) for c in (64, 1024, 2048)),
    *(StepKind(n, n * 1024, 1024, 0, (), 8) for n in (1, 9)),
    *(StepKind(n, n * 1024, 1024, 1000, ()) for n in (4, 8, 16)),
    *(StepKind(0, 0, 0, 0, ((e, s),)) for e in (16, 64, 65, 256) for s in (256, 1024, 2048)),
    *(StepKind(0, 0, 0, 0, ((16, 1024),) * 4) for _ in range(1)),
    *(StepKind(n, n * 1024, 1024, 0, ((64, 1024),)) for n in (1, 8)),
]


def fit(seconds: dict[StepKind, float]) -> StepCosts:
    return fit_step_costs(seconds, decode_slots=(8, 16), prefill_tokens=(64, 256), min_sharers=5, tile=32)


def test_costs_are_found_again() -> None:
    found = fit({kind: TRUE.seconds(kind) for kind in KINDS})
    assert dict(found.decode_s) == pytest.approx(dict(TRUE.decode_s), rel=0.01)
    assert dict(found.mixed_s) == pytest.approx(dict(TRUE.mixed_s), rel=0.01)
    for kind in KINDS:
        assert found.seconds(kind) == pytest.approx(TRUE.seconds(kind), rel=0.003)


def test_noise_does_not_make_costs_negative() -> None:
    noise = np.random.default_rng(0).normal(1.0, 0.1, len(KINDS)).tolist()
    found = fit({kind: factor * TRUE.seconds(kind) for kind, factor in zip(KINDS, noise, strict=True)})
    assert StepCosts.from_json(found.to_json()) == found, "what is written can be read"
    errors = [found.seconds(kind) / TRUE.seconds(kind) - 1 for kind in KINDS]
    assert max(map(abs, errors)) < 0.2


def test_a_shape_costs_something_whatever_was_measured() -> None:
    """Seconds in proportion to the keys, as noise may make them: nothing would be left for the shapes."""
    found = fit({kind: 1e-5 * (kind.decode_context + sum(length for _, length in kind.chunks)) for kind in KINDS})
    assert min(seconds for _, seconds in (*found.decode_s, *found.mixed_s)) > 0.0
    assert StepCosts.from_json(found.to_json()) == found


def test_a_shape_that_no_step_was_run_in_is_left_out() -> None:
    found = fit({kind: TRUE.seconds(kind) for kind in KINDS if kind.num_decode <= 8 or kind.chunks})
    assert [slots for slots, _ in found.decode_s] == [8]
    assert [tokens for tokens, _ in found.mixed_s] == [64, 256]


@settings(max_examples=30)
@given(st.integers(0, 1000))
def test_no_better_solution_is_near(seed: int) -> None:
    """The square is convex: what no small step improves is the best."""
    rng = np.random.default_rng(seed)
    terms, seconds = rng.random((12, 4)), rng.random(12) + 0.1

    def cost(x: np.ndarray) -> float:
        return float((((terms @ x) / seconds - 1) ** 2).sum())

    floor = np.array([0.0, 0.1, 0.0, 0.0])
    found = fit_bounded(terms, seconds, floor)
    assert (found >= floor).all()
    for k in range(4):
        for step in (1e-3, -1e-3):
            moved = np.maximum(found + step * np.eye(4)[k], floor)
            assert cost(moved) >= cost(found) - 1e-5


@pytest.mark.parametrize(("room", "pool"), [(8000, 65_536), (2000, 23_296), (500, 2048), (200, 1024), (70, 4096)])
def test_probes_reach_every_shape_within_the_room(room: int, pool: int) -> None:
    shapes = StepShapes(EngineSettings(max_num_seqs=16, decode_buckets=(8, 16), prefill_buckets=(64, 256)))
    probes = choose_probes(shapes, room=room, pool=pool, page_size=16, max_prefill_seqs=16, decode_steps=8)
    for probe in probes:
        assert max(probe.context, probe.length) <= room
        assert probe.num_rows * (probe.context - probe.num_shared) + probe.num_shared <= pool
        assert probe.num_chunks * probe.extend <= 256
        assert probe.length == 0 or (probe.length - probe.extend) % 16 == 0, "a chunk starts behind full pages"
    assert len({probe.kind for probe in probes}) == len(probes)
    if room > 256:  # as large a chunk fits into the context
        found = fit({probe.kind: TRUE.seconds(probe.kind) for probe in probes})
        for kind in KINDS:
            if max(kind.longest_decode, *(length for _, length in (*kind.chunks, (0, 0)))) <= room:
                assert found.seconds(kind) == pytest.approx(TRUE.seconds(kind), rel=0.1)


@pytest.mark.parametrize(
    "probe",
    [
        Probe(num_rows=3, context=40),
        Probe(num_rows=2, context=40, num_steps=4),
        Probe(num_rows=4, context=64, num_shared=40),
        Probe(num_chunks=1, extend=40, length=120),
        Probe(num_chunks=2, extend=16, length=16),
        Probe(num_rows=2, context=32, num_chunks=1, extend=64, length=128),
    ],
)
def test_steps_are_of_the_kind_that_was_asked_for(make_engine, monkeypatch, probe) -> None:
    engine = make_engine()
    planned = []
    dispatch = engine.runner.dispatch

    def remember(plan, packed):
        chunks = tuple((row.num_tokens, row.start + row.num_tokens) for row in plan.prefill)
        planned.append((len(plan.decode), chunks, plan.num_steps))
        return dispatch(plan, packed)

    monkeypatch.setattr(engine.runner, "dispatch", remember)
    assert StepProber(engine).step_s(probe) > 0.0
    assert (probe.num_rows, probe.kind.chunks, probe.num_steps) in planned
    assert not engine.has_work
    engine.scheduler.validate()


def test_terms_are_what_costs_are_multiplied_by() -> None:
    """One cost at a time: a change of it changes the step by its term."""
    kind = StepKind(8, 8000, 1100, 600, ((64, 900), (10, 10)))
    whole = TRUE.seconds(kind)
    for name in KEY_TERMS:
        keys = replace(TRUE.keys, **{name: getattr(TRUE.keys, name) + 1.0})
        grown = replace(TRUE, keys=keys).seconds(kind) - whole
        expected = {
            "row_s": 8,
            "key_s": 8000 - 8 * 600,
            "slot_key_s": 16 * 500,
            "shared_key_s": 600,
            "chunk_s": 2,
            "chunk_key_s": 910,
            "pair_s": sum(range(837, 901)) + 32 * sum(range(1, 11)) / 10,
            "token_s": 74,
        }[name]
        assert grown == pytest.approx(expected)
    longer = replace(TRUE, dispatch_s=TRUE.dispatch_s + 1.0)
    assert longer.seconds(kind) == pytest.approx(whole), "with chunks it is no dispatch of decode steps"
    decode = kind._replace(chunks=(), num_steps=4)
    assert longer.seconds(decode) - TRUE.seconds(decode) == pytest.approx(0.25)
