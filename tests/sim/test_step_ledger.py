"""What a cost model is asked, and how the answers add up."""

from __future__ import annotations

import pytest

from fakes.sim import LinearCost
from preble_jax.sim.cost.base import StepWork
from preble_jax.sim.request import SimRequest, Workload
from preble_jax.sim.settings import SimSettings
from preble_jax.sim.simulator import Simulator


class AskedCost(LinearCost):
    """Remembers what it was asked."""

    def __init__(self, **sizes):
        super().__init__(**sizes)
        self.asked: list[StepWork] = []

    def step_s(self, work):
        self.asked.append(work)
        return super().step_s(work)


def simulate(cost, requests, **changes):
    settings = SimSettings(**{"num_groups": 1, "page_size": 8, "coast": False, **changes})
    return Simulator(settings, cost).run(Workload(name="w", block_size=8, requests=requests))


def test_chunks_and_rows_are_told_with_their_lengths():
    cost = AskedCost(prefill_tokens=16)
    result = simulate(cost, [SimRequest(arrival_s=0.0, num_prompt=40, num_output=3)])
    pages = 40  # of all of the prompt, from its admission on; the output fills the sixth one
    assert cost.asked == [
        StepWork(0, 0, [(16, 16)], pages),
        StepWork(0, 0, [(16, 32)], pages),
        StepWork(0, 0, [(8, 40)], pages),
        StepWork(1, 41, [], pages + 8),
        StepWork(1, 42, [], pages + 8),
    ]
    assert result.groups[0].busy_s == pytest.approx(sum(LinearCost.step_s(cost, work) for work in cost.asked))
    assert result.groups[0].num_steps == 5
    assert result.requests[0].finished_s == pytest.approx(result.groups[0].busy_s)


def test_what_is_shared_counts_once():
    cost = AskedCost()
    blocks = tuple(range(8))
    requests = [SimRequest(arrival_s=0.0, num_prompt=64, num_output=40, blocks=blocks) for _ in range(2)]
    simulate(cost, requests)
    both = next(work for work in cost.asked if work.num_decode == 2)
    # Seven pages of the prompt, its last one (computed by each, then kept once), and one of output each.
    assert both.decode_context > both.unique_context
    assert both.unique_context <= (8 + 1 + 2) * 8


def test_steps_that_share_a_dispatch_are_asked_for_one_by_one():
    cost = AskedCost(base_s=0.001, row_s=1e-3)
    requests = [SimRequest(arrival_s=0.0, num_prompt=8, num_output=num) for num in (20, 40)]
    result = simulate(cost, requests)
    single = AskedCost(base_s=0.001, row_s=1e-3)
    again = simulate(single, requests, decode_steps=1)
    assert [work[:2] for work in cost.asked] == [work[:2] for work in single.asked]
    assert result.groups[0].num_steps == again.groups[0].num_steps
    assert result.groups[0].busy_s == pytest.approx(again.groups[0].busy_s)
