"""A device of a device group: the next token is a checksum of those before. Counts what it computes, by tenant."""

from __future__ import annotations

import zlib
from collections import Counter

from preble_jax.request import Request
from preble_jax.sampling_params import SamplingParams
from preble_jax.sched.local_scheduler import LocalScheduler


def request(name: str, prompt: list[int], max_tokens: int, tenant: str = "default") -> Request:
    return Request(
        request_id=name,
        prompt_token_ids=prompt,
        sampling=SamplingParams(max_tokens=max_tokens, temperature=0.0),
        tenant=tenant,
    )


class TokenDevice:
    """extend_tokens, output_tokens: by tenant, each token counted once however often it was computed."""

    def __init__(self, scheduler: LocalScheduler, vocab_size: int) -> None:
        self.scheduler = scheduler
        self.vocab_size = vocab_size
        self.computed: dict[str, set[int]] = {}  # request -> prompt positions
        self.extend_tokens: Counter[str] = Counter()
        self.output_tokens: Counter[str] = Counter()
        self.ended: list[str] = []

    def run_step(self) -> bool:
        """False: there was nothing to do."""
        plan = self.scheduler.schedule(0.0)
        if plan is None:
            return False
        tokens = [zlib.crc32(bytes(row.sequence.tokens)) % self.vocab_size for row in plan.rows]
        tenant_of = {}
        for row in plan.rows:
            sequence, request = row.sequence, row.sequence.request
            tenant_of[request.request_id] = request.tenant
            positions = self.computed.setdefault(request.request_id, set())
            for position in range(row.start, min(row.start + row.num_tokens, sequence.num_prompt)):
                if position >= sequence.num_cached and position not in positions:
                    positions.add(position)
                    self.extend_tokens[request.tenant] += 1
        self.scheduler.started(plan)
        for output in self.scheduler.settle(plan, [[token] for token in tokens], [[0.0]] * len(tokens)):
            self.output_tokens[tenant_of[output.request_id]] += len(output.token_ids)
            if output.finished:
                self.ended.append(output.request_id)
        return True
