"""How much of a workload there is to share."""

from __future__ import annotations

from preble_jax.sim.request import Workload


def shared_ratio(workload: Workload) -> float:
    """Share of the prompt tokens that earlier prompts began with, too: the hit ratio of one cache without bound, in
    whole blocks, when every request comes after the end of those before it, but for answers that come back."""
    seen: set[int] = set()
    shared = 0
    for request in workload.requests:
        blocks = request.blocks
        # An id stands for everything before it: the known ones are a beginning, and its end can be searched for.
        low, high = 0, len(blocks)
        while low < high:
            middle = (low + high) // 2
            if blocks[middle] in seen:
                low = middle + 1
            else:
                high = middle
        seen.update(blocks[low:])
        shared += min(low * workload.block_size, request.num_prompt)
    return shared / max(workload.num_prompt_tokens, 1)
