"""D2LPM's pseudo-code (arXiv 2501.14312, algorithm 2) as preble_jax/sched/placement/d2lpm.py amends it, slow and
literal: the refill is a loop, and every deficit is written down."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from oracles.naive_forest import NaiveForest


@dataclass
class Sent:
    tenant: str
    group: int
    num_tokens: int
    extend: int
    life: int  # of the group: how often it had started


class PaperD2LPM:
    """weight: of a tenant. up: the groups that exist now; a group that comes (back) has to be given to `group_up`."""

    def __init__(
        self,
        *,
        quantum: float,
        extend_weight: float,
        output_weight: float,
        weight: Callable[[str], float],
        page_size: int,
        ttl_s: float,
        ranks: Sequence[float],
    ) -> None:
        self.quantum = quantum
        self.extend_weight = extend_weight
        self.output_weight = output_weight
        self.weight = weight
        self.page_size = page_size
        self.ranks = ranks
        self.forest = NaiveForest(ttl_s=ttl_s)
        self.outstanding: list[Sent] = []
        self.q: dict[str, dict[int, float]] = {}
        self.refilled: dict[str, bool] = {}
        self.life = [0] * len(ranks)

    def group_up(self, group: int) -> None:
        """Unused: 0 before a tenant's first refill, then a quantum."""
        self.forest.clear(group)
        self.life[group] += 1
        for tenant, deficits in self.q.items():
            deficits[group] = self.quantum * self.weight(tenant) if self.refilled[tenant] else 0.0

    def dispatch(
        self, tenant: str, prompt: Sequence[bytes], num_tokens: int, groups: Collection[int], now: float
    ) -> tuple[int, Sent]:
        self.forest.expire(now)
        if tenant not in self.q:
            self.q[tenant], self.refilled[tenant] = dict.fromkeys(range(len(self.ranks)), 0.0), False
        q, quantum = self.q[tenant], self.quantum * self.weight(tenant)
        limit = (num_tokens - 1) // self.page_size
        cached = {w: min(self.forest.match(prompt, w), limit) * self.page_size for w in groups}
        longest = [w for w in groups if cached[w] == max(cached.values())]
        while not [w for w in groups if q[w] > 0]:
            unused = not self.refilled[tenant]
            for w in q:
                if w in groups or unused:
                    q[w] += quantum
            self.refilled[tenant] = True
        available = [w for w in groups if q[w] > 0]
        candidates = [w for w in longest if w in available] or available
        chosen = min(candidates, key=lambda w: (sum(s.group == w for s in self.outstanding), self.ranks[w]))
        sent = Sent(tenant, chosen, num_tokens, num_tokens - cached[chosen], self.life[chosen])
        q[chosen] -= self.extend_weight * sent.extend
        self.forest.assign(prompt, chosen, now)
        self.outstanding.append(sent)
        return chosen, sent

    def finish(self, sent: Sent, output_tokens: int, cached_tokens: int, failed: bool) -> None:
        self.outstanding = [s for s in self.outstanding if s is not sent]
        if sent.life != self.life[sent.group]:
            return  # charged on a process that is gone
        q = self.q[sent.tenant]
        q[sent.group] -= self.output_weight * output_tokens
        if not failed:
            q[sent.group] += self.extend_weight * (sent.extend - (sent.num_tokens - cached_tokens))
        q[sent.group] = min(q[sent.group], self.quantum * self.weight(sent.tenant))
