"""What an engine says it did is what it did."""

from __future__ import annotations

import random
import typing
from dataclasses import replace
from itertools import count

import pytest

from preble_jax.config import QueueSettings
from preble_jax.engine.engine import Engine
from preble_jax.engine.ledger import MAX_TENANTS, Ledger, StepTimes
from preble_jax.request import Request, RequestOutput
from preble_jax.sampling_params import SamplingParams
from preble_jax.sched.sequence import PlannedRow, Sequence, StepPlan


def make_request(name, tenant, num_tokens, max_tokens):
    prompt = random.Random(name).choices(range(256), k=num_tokens)
    sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens)
    return Request(request_id=name, prompt_token_ids=prompt, sampling=sampling, tenant=tenant)


def test_totals_are_those_of_the_requests(make_engine):
    engine = make_engine()
    engine.clock = count(0.0, 2.0**-20).__next__  # binary: sums of seconds are exact in any order
    for i in range(6):
        engine.add(make_request(f"gold-{i}", "gold", 50, 4))
        engine.add(make_request(f"free-{i}", "free", 90, 7))
    first_queue_s = {}
    while engine.has_work:
        for output in engine.step():
            first_queue_s.setdefault(output.request_id, output.queue_s)
    ledger = engine.ledger
    assert ledger.total.extend_tokens == 6 * (50 + 90)
    assert ledger.total.output_tokens == 6 * (4 + 7)
    assert ledger.total.admitted == ledger.finished == 12
    assert ledger.decode_rows == 6 * (3 + 6), "the first token of each comes from its prompt"
    assert ledger.dispatches < ledger.steps, "some dispatches are several steps"
    assert ledger.step_s > 0.0
    tenants = {load.tenant: load for load in ledger.tenants({"gold": 5.0})}
    assert (tenants["gold"].extend_tokens, tenants["free"].extend_tokens) == (300, 540)
    assert (tenants["gold"].output_tokens, tenants["free"].output_tokens) == (24, 42)
    assert (tenants["gold"].deficit, tenants["free"].deficit) == (5.0, None)
    assert tenants["gold"].queue_s + tenants["free"].queue_s == ledger.total.queue_s
    assert sum(first_queue_s.values()) == ledger.total.queue_s


def test_cached_tokens_are_no_extend_tokens(make_engine):
    engine = make_engine()
    for _ in range(2):
        engine.add(make_request("same", "t", 64, 1))
        while engine.has_work:
            engine.step()
    assert engine.ledger.total.extend_tokens == 64 + 8, "all but the last page came from the cache"


def test_waiting_counts_until_the_first_step_only():
    ledger = Ledger()
    sequence = Sequence(make_request("a", "t", 4, 4), 0, 8, 10.0, 0)
    plan = StepPlan((), (PlannedRow(sequence, 0, 4, True),))
    ledger.planned(plan, 12.5)
    ledger.planned(plan, 99.0)
    assert (ledger.total.admitted, ledger.total.queue_s, sequence.queue_s) == (1, 2.5, 2.5)


def test_the_tenants_kept_are_the_latest():
    ledger = Ledger()
    for number in range(MAX_TENANTS + 2):
        sequence = Sequence(make_request(str(number), f"tenant-{number}", 4, 4), number, 8, 0.0, 0)
        plan = StepPlan((), (PlannedRow(sequence, 0, 4, True),))
        ledger.planned(plan, 0.0)
        ledger.ran(plan, [RequestOutput(request_id=str(number), token_ids=[1])], 1, StepTimes(step_s=0.1))
    names = [load.tenant for load in ledger.tenants({})]
    assert len(names) == MAX_TENANTS
    assert (names[0], names[-1]) == ("tenant-2", f"tenant-{MAX_TENANTS + 1}")
    assert ledger.total.output_tokens == MAX_TENANTS + 2


@pytest.mark.parametrize("policy", typing.get_args(typing.get_type_hints(QueueSettings)["policy"]))
def test_every_queue_policy_serves_an_engine_and_reports_its_deficits(make_engine, policy):
    other = make_engine()  # shares its programs
    config = replace(other.config, queue=QueueSettings(policy=policy))
    engine = Engine(config, other.runner, other.limits.vocab_size)
    for i in range(8):
        engine.add(make_request(f"{i}", "gold" if i % 2 else "free", 40, 3))
    while engine.has_work:
        engine.step()
    assert engine.ledger.finished == 8
    engine.scheduler.validate()
    deficits = engine.scheduler.tenant_deficits()
    assert set(deficits) == ({"gold", "free"} if policy in ("dlpm", "fair", "vtc") else set())
