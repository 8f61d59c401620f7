"""Groups that share a machine: how long steps take is worked out by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from preble_jax.config import SchedSettings
from preble_jax.sched.step_costs import KeyCosts, StepCosts
from preble_jax.sim.cost.base import EngineShape
from preble_jax.sim.cost.profiled import Crowding, ProfiledCost
from preble_jax.sim.record import SimResult
from preble_jax.sim.request import SimRequest, Workload
from preble_jax.sim.settings import Fault, SimSettings
from preble_jax.sim.simulator import Simulator

SHAPE = EngineShape(prefill_tokens=64, max_prefill_seqs=1, max_num_seqs=8, kv_tokens=4096)


def make_cost(prompt_s: float, num_neighbours: int = 1, crowded: float = 2.0) -> ProfiledCost:
    """A step with a prompt takes so long; beside so many busy neighbours, `crowded` times as long."""
    alone = StepCosts(decode_s=((8, 1.0),), mixed_s=((64, prompt_s),), keys=KeyCosts())
    beside = ProfiledCost(name="beside", engine=SHAPE, steps=alone.scaled(crowded))
    return ProfiledCost(name="alone", engine=SHAPE, steps=alone, crowding=Crowding(beside, num_neighbours))


def run(arrivals_s: list[float], cost: ProfiledCost, num_output: int = 1, **settings: Any) -> SimResult:
    """Each request to the next group in turn; with one output token it is one step."""
    requests = [SimRequest(arrival_s=at_s, num_prompt=20, num_output=num_output) for at_s in arrivals_s]
    pair = SimSettings(num_groups=2, groups_per_host=2, sched=SchedSettings(placement="round_robin"))
    simulator = Simulator(replace(pair, **settings), cost)
    result = simulator.run(Workload(name="by hand", block_size=16, requests=requests))
    simulator.validate()
    return result


def ends(result: SimResult) -> list[float | None]:
    return [record.finished_s for record in result.requests]


def test_a_step_goes_on_at_another_pace_when_a_neighbour_begins_and_leaves_off() -> None:
    """The first is half done at 5 s and takes twice as long for the rest, to 15 s; by then the second is half done."""
    result = run([0.0, 5.0], make_cost(10.0))
    assert ends(result) == pytest.approx([15.0, 20.0])
    assert [group.busy_s for group in result.groups] == pytest.approx([15.0, 15.0])


def test_groups_on_machines_of_their_own_do_not_feel_each_other() -> None:
    assert ends(run([0.0, 5.0], make_cost(10.0), groups_per_host=1)) == pytest.approx([10.0, 15.0])
    # Groups 0 and 1 share one machine, group 2 has the other.
    result = run([0.0, 5.0, 5.0], make_cost(10.0), num_groups=3)
    assert ends(result) == pytest.approx([15.0, 20.0, 15.0])


def test_where_nobody_measured_it_neighbours_cost_nothing() -> None:
    cost = make_cost(10.0)
    cost.crowding = None
    assert ends(run([0.0, 5.0], cost)) == pytest.approx([10.0, 15.0])


def test_fewer_busy_neighbours_than_were_measured_slow_down_in_proportion() -> None:
    """Twice as long beside two others: one and a half times beside one."""
    assert ends(run([0.0, 0.0], make_cost(10.0, num_neighbours=2), num_groups=3, groups_per_host=3)) == pytest.approx(
        [15.0, 15.0]
    )


def test_a_neighbour_that_is_killed_costs_nothing_any_more() -> None:
    """At 4 s a fifth of the step is done; the other four take 8 s."""
    result = run([0.0, 0.0], make_cost(10.0), faults=(Fault(at_s=4.0, group=1, kind="kill"),))
    assert result.requests[0].finished_s == pytest.approx(12.0)


def test_dispatches_behind_one_another_are_slowed_down_each() -> None:
    """Alone: a prompt and four more tokens, 10 + 4 s, at 2 s a second group's 14 s; together all of it twice."""
    alone = run([0.0], make_cost(10.0), num_output=5)
    assert ends(alone) == pytest.approx([14.0])
    both = run([0.0, 0.0], make_cost(10.0), num_output=5)
    assert ends(both) == pytest.approx([28.0, 28.0])


def test_a_neighbour_that_costs_nothing_changes_nothing() -> None:
    """Coasting or step by step, on one machine or on two."""
    arrivals = [0.3 * i for i in range(12)]
    together = run(arrivals, make_cost(0.5, crowded=1.0), num_output=40)
    apart = run(arrivals, make_cost(0.5, crowded=1.0), num_output=40, groups_per_host=1)
    assert ends(together) == pytest.approx(ends(apart))
