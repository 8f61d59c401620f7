"""A turn finds what the turns before it left behind, answers included."""

from __future__ import annotations

from fakes.sim import LinearCost
from preble_jax.sim.request import SimRequest, Workload
from preble_jax.sim.settings import SimSettings
from preble_jax.sim.simulator import Simulator
from preble_jax.sim.workloads import make_workload

PAGE_SIZE = 16


def cached(workload):
    """Prompt tokens of each request that one group with room for everything had cached."""
    simulator = Simulator(SimSettings(num_groups=1, page_size=PAGE_SIZE), LinearCost(kv_tokens=1_000_000))
    result = simulator.run(workload)
    simulator.validate()
    assert {record.status for record in result.requests} == {"finished"}
    return [record.cached_tokens for record in result.requests]


def whole_pages(num_tokens):
    return num_tokens // PAGE_SIZE * PAGE_SIZE


def test_chat_has_the_hit_ratio_of_a_naive_model():
    """A turn begins with all that was computed in the turn before it, a conversation with the system prompt."""
    workload = make_workload("chat", rate=0.5, num_requests=150, duration_s=None, num_groups=1, seed=0)
    requests = workload.requests
    num_common = len(set.intersection(*(set(request.blocks) for request in requests)))
    expected = []
    for index, request in enumerate(requests):
        if request.follows is not None:
            earlier = requests[request.follows]
            num_computed = earlier.num_prompt + earlier.num_output - 1  # nobody asked what comes after the last token
        else:
            num_computed = num_common * workload.block_size if index else 0
        expected.append(min(whole_pages(num_computed), whole_pages(request.num_prompt - 1)))
    assert sum(request.follows is not None for request in requests) > 80
    assert cached(workload) == expected


def test_only_a_prompt_with_the_answer_in_it_finds_the_answer():
    first = SimRequest(arrival_s=0.0, num_prompt=64, num_output=65, blocks=(1, 2, 3, 4))
    after = {"arrival_s": 0.0, "num_output": 1, "follows": 0}
    answered = SimRequest(num_prompt=160, blocks=(1, 2, 3, 4, 5, 6, 7, 8, 9, 10), **after)
    shorter = SimRequest(num_prompt=128, blocks=(1, 2, 3, 4, 5, 6, 7, 8), **after)
    another = SimRequest(num_prompt=160, blocks=(1, 2, 3, 11, 12, 13, 14, 15, 16, 17), **after)
    unnamed = SimRequest(num_prompt=160, blocks=(1, 2, 3, 4, 5, 6), **after)
    for second, hit in ((answered, 128), (shorter, 64), (another, 48), (unnamed, 96)):
        assert cached(Workload(name="w", block_size=16, requests=[first, second])) == [0, hit]
