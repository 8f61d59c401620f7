"""The routers that are there for comparison, each as its source describes it, slow and literal.

Every one is a class whose `route(prompt, num_tokens, name, groups)` names a group of the sorted list `groups`, given a
NaiveCluster that is up to date.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from hashlib import blake2b

from oracles.naive_cluster import NaiveCluster
from preble_jax.config import SchedSettings


class Router:
    def __init__(self, cluster: NaiveCluster, settings: SchedSettings) -> None:
        self.cluster = cluster
        self.settings = settings
        self.random = random.Random(settings.seed)

    def route(self, prompt: Sequence[bytes], num_tokens: int, name: str, groups: list[int]) -> int:
        raise NotImplementedError


class LeastLoaded(Router):
    def route(self, prompt: Sequence[bytes], num_tokens: int, name: str, groups: list[int]) -> int:
        return self.cluster.shortest_queue(groups)


class ConsistentHashing(Router):
    """Algorithm of arXiv 1608.01350, section 2: walk clockwise to the first bin that is not full."""

    def route(self, prompt: Sequence[bytes], num_tokens: int, name: str, groups: list[int]) -> int:
        balls = sum(self.cluster.queue(i) for i in groups) + 1
        capacity = math.ceil((1 + self.settings.hash_epsilon) * balls / len(groups))
        ring = sorted((self.hash(f"{i}/{k}".encode()), i) for i in groups for k in range(self.settings.hash_points))
        key = self.hash(prompt[: self.settings.hash_blocks][-1] if prompt else name.encode())
        clockwise = [i for at, i in ring if at >= key] + [i for at, i in ring if at < key]
        return next(i for i in clockwise if self.cluster.queue(i) < capacity)

    def hash(self, key: bytes) -> int:
        return int(blake2b(key, digest_size=8).hexdigest(), 16)


class CacheAware(Router):
    def route(self, prompt: Sequence[bytes], num_tokens: int, name: str, groups: list[int]) -> int:
        loads = [self.cluster.queue(i) for i in groups]
        imbalanced = max(loads) - min(loads) > self.settings.cache_aware_balance_abs and max(
            loads
        ) > self.settings.cache_aware_balance_rel * min(loads)
        if imbalanced:
            return self.cluster.shortest_queue(groups)
        matched = {i: self.cluster.cached(prompt, num_tokens, i) for i in groups}
        longest = max(matched.values())
        if longest and longest > self.settings.cache_aware_threshold * num_tokens:
            return self.cluster.shortest_queue([i for i in groups if matched[i] == longest])
        return self.cluster.shortest_queue(groups)


class DynamoCost(Router):
    def route(self, prompt: Sequence[bytes], num_tokens: int, name: str, groups: list[int]) -> int:
        costs = [self.cost(prompt, num_tokens, i) for i in groups]
        temperature = self.settings.dynamo_temperature
        if not temperature:
            return min(groups, key=lambda i: (costs[groups.index(i)], self.cluster.ranks[i]))
        low, high = min(costs), max(costs)
        scaled = [-(cost - low) / (high - low) / temperature if high > low else 0.0 for cost in costs]
        total = sum(math.exp(logit) for logit in scaled)
        drawn, reached = self.random.random(), 0.0
        for i, logit in zip(groups, scaled, strict=True):
            reached += math.exp(logit) / total
            if drawn < reached:
                return i
        return groups[-1]

    def cost(self, prompt: Sequence[bytes], num_tokens: int, i: int) -> float:
        overlap_credit = self.settings.dynamo_overlap_credit * self.cluster.cached(prompt, num_tokens, i)
        prefill_tokens = max(self.cluster.queued_tokens(i) + (num_tokens - overlap_credit), 0)
        prefill_blocks = prefill_tokens / self.cluster.page_size
        return self.settings.dynamo_prefill_scale * prefill_blocks + self.cluster.decode_pages(i)


class LMetric(Router):
    def route(self, prompt: Sequence[bytes], num_tokens: int, name: str, groups: list[int]) -> int:
        def score(i: int) -> tuple[int, int, float]:
            uncached = num_tokens - self.cluster.cached(prompt, num_tokens, i)
            return (self.cluster.queued_tokens(i) + uncached) * self.cluster.queue(i), uncached, self.cluster.ranks[i]

        return min(groups, key=score)


class CacheRoute(Router):
    def __init__(self, cluster: NaiveCluster, settings: SchedSettings) -> None:
        super().__init__(cluster, settings)
        self.destinations: dict[bytes, set[int]] = {}
        self.interval: list[tuple[bytes | None, list[int]]] = []
        self.began: float | None = None

    def route(self, prompt: Sequence[bytes], num_tokens: int, name: str, groups: list[int]) -> int:
        now = self.cluster.now
        if self.began is None:
            self.began = now
        if now - self.began >= self.settings.cacheroute_interval_s:
            self.plan(now - self.began)
            self.began, self.interval = now, []
        key = prompt[: self.settings.cacheroute_key_blocks][-1] if prompt else None
        self.interval.append((key, groups))
        warm = [i for i in groups if key is not None and i in self.destinations.get(key, ())]
        if warm:
            return self.cluster.shortest_queue(warm)
        return self.cluster.shortest_queue(self.random.sample(groups, min(2, len(groups))))

    def plan(self, elapsed: float) -> None:
        keys = [key for key, _ in self.interval if key is not None]
        groups = sorted({i for _, groups in self.interval for i in groups})
        rate = {key: keys.count(key) / elapsed for key in keys if keys.count(key) >= 2}
        slots = dict.fromkeys(groups, self.settings.cacheroute_warm_slots)
        copies: dict[bytes, int] = {}
        for key in sorted(rate, key=lambda key: (-rate[key], key)):
            k = min(max(1, math.ceil(rate[key] / self.settings.cacheroute_q_cap)), len(groups))
            if sum(copies.values()) + k > sum(slots.values()):
                break
            copies[key] = k
        mean = sum(rate[key] for key in copies) / len(groups)
        load = dict.fromkeys(groups, 0.0)
        before, self.destinations = self.destinations, {}
        for key in sorted(copies, key=lambda key: (-rate[key] / copies[key], key)):
            had = sorted(i for i in before.get(key, ()) if i in load and slots[i] and load[i] <= mean)
            chosen = had[: copies[key]]
            for i in sorted(groups, key=lambda i: (load[i], i)):
                if len(chosen) < copies[key] and slots[i] and i not in chosen:
                    chosen.append(i)
            for i in chosen:
                load[i] += rate[key] / copies[key]
                slots[i] -= 1
            self.destinations[key] = set(chosen)
