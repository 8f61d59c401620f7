"""Small things to simulate."""

from __future__ import annotations

import random

from preble_jax.sim.cost.base import EngineShape, StepWork
from preble_jax.sim.request import SimRequest, Workload


class LinearCost:
    """Seconds of a step: base + prompt tokens + decode rows + context, at a fixed price each."""

    name = "linear"

    def __init__(self, *, base_s=0.02, extend_s=1e-4, row_s=4e-4, context_s=1e-7, **shape):
        self.prices = base_s, extend_s, row_s, context_s
        sizes = {"prefill_tokens": 64, "max_prefill_seqs": 4, "max_num_seqs": 8, "kv_tokens": 4096}
        self.engine = EngineShape(**{**sizes, **shape})

    def step_s(self, work: StepWork) -> float:
        base_s, extend_s, row_s, context_s = self.prices
        return base_s + extend_s * work.num_extend + row_s * work.num_decode + context_s * work.decode_context


def shared_workload(num, rate, *, seed=0, prefixes=4, prompt=100, output=12, block_size=8, tenants=2, turns=1):
    """Prompts that begin with one of a few prefixes, Poisson arrivals, each with so many turns."""
    draw = random.Random(seed)
    now, fresh, requests = 0.0, 1_000_000, []
    for index in range(num):
        now += draw.expovariate(rate)
        num_prompt = draw.randint(prompt // 2, prompt * 3 // 2)
        num_blocks = num_prompt // block_size
        prefix = draw.randrange(prefixes)
        num_shared = min(num_blocks, prompt // 2 // block_size)
        blocks = (*range(100 * prefix, 100 * prefix + num_shared), *range(fresh, fresh + num_blocks - num_shared))
        fresh += num_blocks
        for turn in range(turns):
            requests.append(
                SimRequest(
                    arrival_s=now,
                    num_prompt=num_prompt,
                    num_output=draw.randint(1, 2 * output),
                    blocks=blocks,
                    tenant=f"tenant-{index % tenants}",
                    follows=len(requests) - 1 if turn else None,
                    think_s=draw.random() if turn else 0.0,
                )
            )
            if turn + 1 < turns:
                num_prompt += requests[-1].num_output + draw.randint(0, prompt // 2)
                num_more = num_prompt // block_size - len(blocks)
                blocks = (*blocks, *range(fresh, fresh + num_more))
                fresh += num_more
    return Workload(name="shared", block_size=block_size, requests=requests)
