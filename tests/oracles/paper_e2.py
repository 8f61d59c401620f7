"""E2 as the Preble paper writes it (arXiv 2407.00023), slow and literal: every decision looks at every request of the
window, every block and every group. Nothing is kept between decisions but the history itself.

All times are whole nanoseconds, so that sums do not depend on their order.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from oracles.naive_forest import Block, NaiveForest
from oracles.paper_autoscale import PaperAutoscale


@dataclass
class Sent:
    at: float
    group: int
    missed: int
    path: list[Block]
    prompt: Sequence[bytes]


class PaperE2:
    """ranks: who wins between groups of equal cost; num_pages: of each group."""

    def __init__(
        self,
        *,
        window_s: float,
        ttl_s: float,
        imbalance_ratio: float,
        rebalance_ratio: float | None,
        autoscale_ratio: float | None,
        page_size: int,
        prefill_time: Callable[[int], int],
        decode_time: Callable[[float], int],
        num_pages: Sequence[int],
        ranks: Sequence[float],
    ) -> None:
        self.window_s = window_s
        self.imbalance_ratio = imbalance_ratio
        self.rebalance_ratio = rebalance_ratio
        self.autoscale = PaperAutoscale(self, autoscale_ratio) if autoscale_ratio is not None else None
        self.page_size = page_size
        self.prefill_time = prefill_time
        self.decode_time = decode_time
        self.num_pages = num_pages
        self.ranks = ranks
        self.forest = NaiveForest(ttl_s=ttl_s)
        self.sent: list[Sent] = []
        self.outputs: list[tuple[float, int, int]] = []
        self.outstanding: list[int] = []  # the group of each

    def schedule_request(
        self, prompt: Sequence[bytes], num_tokens: int, groups: Collection[int], now: float
    ) -> tuple[int, str, int]:
        """(group, decision, cached tokens there); records the assignment."""
        self.pass_time(now)
        cached = {i: self.cached_tokens(prompt, num_tokens, i) for i in groups}
        longest = max(cached.values())
        if num_tokens - longest < longest:
            decision, chosen = self.exploit(prompt, num_tokens, cached)
        elif decoding := [i for i in groups if self.decode_ratio(i) > self.imbalance_ratio]:
            decision, chosen = "balance", min(decoding, key=lambda i: (-self.decode_ratio(i), self.ranks[i]))
        else:
            decision = "explore"
            chosen = min(groups, key=lambda i: (self.load_cost(i, prompt, num_tokens - cached[i]), self.ranks[i]))
        path = self.forest.assign(prompt, chosen, now)
        self.sent.append(Sent(now, chosen, num_tokens - cached[chosen], path, prompt))
        self.outstanding.append(chosen)
        return chosen, decision, cached[chosen]

    def exploit(self, prompt: Sequence[bytes], num_tokens: int, cached: dict[int, int]) -> tuple[str, int]:
        def cost(i: int) -> int:
            return self.load_cost(i, prompt, num_tokens - cached[i])

        longest = max(cached.values())
        kept = cached
        if self.autoscale is not None:
            wanted = self.autoscale.wanted(prompt, list(cached))
            if wanted is not None:
                return ("exploit" if cached[wanted] == longest else "replicate"), wanted
            used = {i: cached[i] for i in cached if i not in self.autoscale.retired(prompt)}
            if used and num_tokens - max(used.values()) < max(used.values()):
                kept = used
        candidates = [i for i in kept if kept[i] == max(kept.values())]
        chosen = min(candidates, key=lambda i: (cost(i), self.ranks[i]))
        heaviest = max(cached, key=lambda i: (self.load(i), self.ranks[i]))
        lightest = min(cached, key=lambda i: (self.load(i), self.ranks[i]))
        if self.rebalance_ratio is not None and chosen == heaviest:
            waits = self.outstanding.count(heaviest) > self.outstanding.count(lightest)
            if waits and cost(heaviest) > self.rebalance_ratio * cost(lightest):
                return "rebalance", lightest
        return "exploit", chosen

    def report_queue(self, sent: Sent, queue_ns: int, now: float) -> None:
        if self.autoscale is not None:
            self.autoscale.report(sent, queue_ns, now)

    def tick(self, now: float) -> None:
        self.pass_time(now)
        if self.autoscale is not None:
            self.autoscale.tick(now)

    def finish(self, group: int, output_tokens: int, now: float) -> None:
        self.outputs.append((now, group, output_tokens))
        self.outstanding.remove(group)

    def pass_time(self, now: float) -> None:
        for old in [s for s in self.sent if s.at + self.window_s <= now]:
            self.forest.unshare(old.path, old.group)
            self.sent.remove(old)
        self.outputs = [o for o in self.outputs if o[0] + self.window_s > now]
        self.forest.expire(now)

    # --- the pieces

    def cached_tokens(self, prompt: Sequence[bytes], num_tokens: int, i: int) -> int:
        """The last token is always computed."""
        return min(self.forest.match(prompt, i), (num_tokens - 1) // self.page_size) * self.page_size

    def requests_on(self, i: int) -> list[Sent]:
        return [s for s in self.sent if s.group == i]

    def average_decode_time(self, i: int) -> int:
        seen = [tokens for _, group, tokens in self.outputs if group == i]
        return self.decode_time(sum(seen) / len(seen)) if seen else 0

    def load(self, i: int) -> int:
        """L_i."""
        return sum(self.prefill_time(s.missed) + self.average_decode_time(i) for s in self.requests_on(i))

    def decode_ratio(self, i: int) -> float:
        decode = sum(self.average_decode_time(i) for _ in self.requests_on(i))
        return decode / self.load(i) if self.load(i) else 0.0

    def load_cost(self, i: int, prompt: Sequence[bytes], missed: int) -> int:
        return self.load(i) + self.eviction_cost(i, prompt, missed) + self.prefill_time(missed)

    def eviction_cost(self, i: int, prompt: Sequence[bytes], missed: int) -> int:
        """M_i."""
        free = max(0, self.num_pages[i] - len(self.forest.holds(i)))
        room = -(-missed // self.page_size) - free
        lost = 0
        known = self.forest.known
        nodes = [node for node in self.forest.nodes() if i in known[node[0]].until and node[0] not in prompt]
        nodes.sort(key=lambda node: (known[node[0]].last[i], -known[node[0]].depth))
        for node in nodes:
            if room <= 0:
                break
            evicted = min(len(node), room)
            lost += self.prefill_time(evicted * self.page_size) * known[node[0]].shares.count(i)
            room -= evicted
        return lost // len(self.requests_on(i)) if self.requests_on(i) else 0
