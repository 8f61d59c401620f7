"""Least added delay as its module's text defines it, slow and literal: every group is looked at, every number is worked
out from the bare history, and in fractions."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction

from oracles.naive_cluster import NaiveCluster
from oracles.paper_routers import Router
from preble_jax.config import SchedSettings
from preble_jax.sched.cost import LinearCostModel

LEAST_REQUESTS = 32  # a group: of fewer, nothing can be said of a prefix's share


class LeastAddedDelay(Router):
    """cost_of: what a group's work costs by now. order: of the last decision, best first."""

    def __init__(
        self,
        cluster: NaiveCluster,
        settings: SchedSettings,
        weights: Mapping[str, float],
        cost_of: Callable[[int], LinearCostModel],
    ) -> None:
        super().__init__(cluster, settings)
        self.cost_of = cost_of
        self.weights = weights
        self.placed: list[tuple[float, int, int]] = []  # (time, group, expected prefill time)
        self.order: list[int] = []
        self.decision = ""

    def route(self, prompt: Sequence[bytes], num_tokens: int, name: str, groups: list[int]) -> int:
        asked = self.cluster.asked[name]
        cached = {i: self.cluster.cached(prompt, num_tokens, i) for i in groups}
        prices = self.prices()
        output = self.cluster.expected_anywhere(asked.max_tokens)
        everything = [s.missed for i in self.everybody for s in self.cluster.running(i) if not s.started]
        a_request_has_queued = Fraction(sum(everything), len(everything)) if everything else Fraction(1)

        given, tolerance = self.given(), self.settings.d2lpm_quantum_tokens * len(self.everybody)
        mine = given.get(asked.tenant, min(given.values(), default=0))
        better_served = {tenant for tenant, units in given.items() if units > mine + tolerance}
        outstanding = [self.cluster.asked[s.name].tenant for i in self.everybody for s in self.cluster.running(i)]
        no_less = [tenant for tenant in outstanding if given[tenant] >= mine - tolerance]
        due = Fraction(len(no_less) + 1, len(outstanding) + 1)

        def dear(i: int) -> int:
            """Tokens between what i holds and the longest match, a stretch after the other of those that the same
            groups hold, each by how much another copy of its end would be too many."""
            lengths = sorted({0, *cached.values()})
            stretches = [(low, high) for low, high in itertools.pairwise(lengths) if low >= cached[i]]
            return sum(math.floor((high - low) * self.surplus(prompt, high, cached)) for low, high in stretches)

        def added_delay(i: int) -> Fraction:
            missed = num_tokens - cached[i]
            queued = self.queued(i)
            weights = {tenant: Fraction(self.weights.get(tenant, 1)) for tenant in queued.keys() | {asked.tenant}}
            turns = sum(weights.values()) / weights[asked.tenant]
            ahead = min(queued.total(), math.floor((queued[asked.tenant] + missed) * turns))
            theirs = sum(tokens for tenant, tokens in queued.items() if tenant in better_served)
            waiting = self.cost_of(i).prefill_ns(ahead) + self.wait_for_slot(i, ahead, queued.total(), output)
            own = self.cost_of(i).prefill_ns(missed)
            token_ns = prices.prefill_ns(queued.total() + missed) - prices.prefill_ns(queued.total())
            ahead_of = {tenant: math.floor(ahead * weights[tenant] / sum(weights.values())) for tenant in weights}
            behind = sum(max(0, queued[tenant] - ahead_of[tenant]) for tenant in queued.keys() - better_served)
            behind = min(behind, queued.total() - ahead)
            overtaken = math.floor(token_ns * behind / a_request_has_queued)
            a_group_has = Fraction(sum(self.cluster.queue(j) for j in self.everybody), len(self.everybody))
            others = Fraction(self.settings.delay_others) * a_group_has * prices.prefill_ns(dear(i))
            if theirs:
                others *= 1 - min(Fraction(theirs * len(self.everybody), sum(everything)), Fraction(1))
            rows = prices.row_ns(output)
            decoding = Fraction(self.settings.delay_decoding) * self.cluster.queue(i) * rows
            return math.floor(waiting * due) + own + overtaken + others + decoding

        self.order = sorted(groups, key=lambda i: (added_delay(i), self.work(i), self.cluster.ranks[i]))
        best = self.order[0]
        self.placed.append((self.cluster.now, best, self.cost_of(best).prefill_ns(num_tokens - cached[best])))
        self.decision = "exploit" if cached[best] > num_tokens / 2 else "explore"
        return best

    def given(self) -> dict[str, Fraction]:
        """Service units of the tenants that have requests outstanding: since they have any, and on top of the least of
        those that were there then."""
        units: dict[str, Fraction] = {}
        there: Counter[str] = Counter()
        for sent, output in self.cluster.history:
            tenant = self.cluster.asked[sent.name].tenant
            if output is None:
                units.setdefault(tenant, min(units.values(), default=Fraction(0)))
                units[tenant] += Fraction(sent.missed) / Fraction(self.weights.get(tenant, 1))
                there[tenant] += 1
            else:
                extend = sent.num_tokens - sent.missed + 2 * output
                units[tenant] += Fraction(extend) / Fraction(self.weights.get(tenant, 1))
                there[tenant] -= 1
                if not there[tenant]:
                    del units[tenant]
        return units

    def wait_for_slot(self, i: int, ahead: int, queued: int, output: int) -> int:
        """Every sequence that has to end takes as long as an output in a full batch, over their number."""
        slots, running = self.cluster.max_num_seqs, self.cluster.running(i)
        wanted = sum(sent.own_pages for sent in running)
        if wanted > self.cluster.num_pages[i]:
            mean = Fraction(wanted, len(running))
            slots = min(slots, max(1, math.floor(self.cluster.num_pages[i] / mean)))
        if self.cluster.queue(i) < slots:
            return 0
        share = Fraction(ahead, queued) if queued else Fraction(0)
        return math.floor((1 + (self.cluster.queue(i) - slots) * share) * self.cost_of(i).slot_ns(output, slots))

    def surplus(self, prompt: Sequence[bytes], length: int, cached: Mapping[int, int]) -> Fraction:
        """0: the prefix of that many tokens wants another copy. 1: it has as many as it wants, at least."""
        recent = sum(at + self.cluster.window_s > self.cluster.now for at, _, _ in self.placed)
        uses = len(self.cluster.forest.known[prompt[length // self.cluster.page_size - 1]].shares)
        wanted = len(cached) * Fraction(uses, max(recent, LEAST_REQUESTS * len(cached)))
        holders = sum(tokens >= length for tokens in cached.values())
        return min(max(holders + 1 - wanted, Fraction(0)), Fraction(1))

    def prices(self) -> LinearCostModel:
        """The mean of all groups' costs, to a femtosecond; to the last bit where all are the same."""
        costs = [self.cost_of(i) for i in self.everybody]
        parts = ("prefill_base_s", "prefill_token_s", "decode_token_s", "decode_row_s")
        femtoseconds = {part: sum(round(getattr(cost, part) * 10**15) for cost in costs) for part in parts}
        mean = {part: float(Fraction(total, len(costs) * 10**15)) for part, total in femtoseconds.items()}
        return costs[0] if all(cost is costs[0] for cost in costs) else LinearCostModel(**mean)

    @property
    def everybody(self) -> range:
        return range(len(self.cluster.num_pages))

    def queued(self, i: int) -> Counter[str]:
        """Tokens still to be computed, by tenant."""
        found: Counter[str] = Counter()
        for sent in self.cluster.running(i):
            if not sent.started:
                found[self.cluster.asked[sent.name].tenant] += sent.missed
        return found

    def work(self, i: int) -> int:
        """Of the window: prompts, and decoding of the average output for each."""
        prefill = [ns for at, group, ns in self.placed if group == i and at + self.cluster.window_s > self.cluster.now]
        outputs = self.cluster.recent_outputs(i)
        average = math.fsum(outputs) / len(outputs) if outputs else 0.0
        return sum(prefill) + len(prefill) * self.cost_of(i).decode_ns(average)
