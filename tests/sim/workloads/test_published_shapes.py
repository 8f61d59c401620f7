"""Preble's five workloads have the lengths and the sharing of the paper's Table 1."""

import numpy as np
import pytest

from preble_jax.sim.workloads import make_workload, shared_ratio
from preble_jax.sim.workloads.catalog import RECIPES
from preble_jax.sim.workloads.preble import TABLE_1


@pytest.mark.parametrize("name", TABLE_1)
def test_table_1(name: str) -> None:
    published = TABLE_1[name]
    shape = RECIPES[name].clients[0].shape
    rounds = 5 if shape.num_lanes else 1  # the first conversations are found in their middle: more weight to the rest
    num_requests = round((shape.num_prefixes or shape.num_lanes) * published.uses * rounds)
    prompts: list[int] = []
    outputs: list[int] = []
    for seed in range(2 if num_requests < 2_000 else 1):
        workload = make_workload(name, rate=10.0, num_requests=num_requests, duration_s=None, num_groups=2, seed=seed)
        prompts += [request.num_prompt for request in workload.requests]
        outputs += [request.num_output for request in workload.requests]
        assert shared_ratio(workload) == pytest.approx(published.shared, abs=0.01)
    assert np.mean(prompts) == pytest.approx(published.prompt.mean, rel=0.03)
    assert np.std(prompts) == pytest.approx(published.prompt.sd, rel=0.06)
    assert np.mean(outputs) == pytest.approx(published.output.mean, rel=0.05)
    assert np.std(outputs) == pytest.approx(published.output.sd, rel=0.15)


def test_the_capped_video_has_no_longer_prefix() -> None:
    workload = make_workload("video_8k", rate=5.0, num_requests=1_000, duration_s=None, num_groups=2, seed=0)
    assert max(len(request.blocks) for request in workload.requests) * workload.block_size == 8192 + 32


def test_bursts_come_like_azures() -> None:
    """In Azure's conversation trace, at 5.5 requests a second, counts of a minute vary by 16 times their mean."""
    workload = make_workload("mixed", rate=5.5, num_requests=20_000, duration_s=None, num_groups=2, seed=0)
    times = np.array([request.arrival_s for request in workload.requests])
    counts = np.bincount((times // 60).astype(int))[:-1]
    assert counts.var() / counts.mean() == pytest.approx(16, rel=0.35)
