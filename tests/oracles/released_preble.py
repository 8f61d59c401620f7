"""The released Preble global scheduler (multi_node/global_scheduler_with_time.py of its repository), what it does in
our words: a tree of prompts, every load summed up over all of it at every decision.

Pages stand for tokens. Two signals are replaced as preble_jax.sched.placement.preble_released says, and what no request
of the window used is forgotten.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from oracles.naive_cluster import NaiveCluster
from oracles.paper_routers import Router
from preble_jax.config import SchedSettings


@dataclass(eq=False)
class TreeNode:
    value: list[bytes]
    parent: TreeNode | None
    children: list[TreeNode] = field(default_factory=list)
    gpus: set[int] = field(default_factory=set)

    @property
    def context_length(self) -> int:
        return len(self.value) + (self.parent.context_length if self.parent else 0)

    @property
    def is_large(self) -> bool:
        return len(self.value) > self.context_length - len(self.value)

    def path(self) -> list[TreeNode]:
        return [self, *(self.parent.path() if self.parent else [])]


@dataclass
class Booked:
    at: float
    important: TreeNode
    leaf: TreeNode
    new: int
    prompt: int
    gpu: int
    wait: int


class ReleasedPreble(Router):
    def __init__(
        self,
        cluster: NaiveCluster,
        settings: SchedSettings,
        prefill_time: Callable[[int], int],
        decode_time: Callable[[float], int],
    ) -> None:
        super().__init__(cluster, settings)
        self.prefill_time = prefill_time
        self.decode_time = decode_time
        self.root = TreeNode([], None)
        self.histogram: list[Booked] = []
        self.seen: list[TreeNode] = []  # important nodes, in the order in which they became so
        self.counter = 0
        self.decision = ""

    def route(self, prompt: Sequence[bytes], num_tokens: int, name: str, groups: list[int]) -> int:
        now = self.cluster.now
        self.remove_old_entries(now)
        leaf = self.insert(list(prompt))
        if len(leaf.value) < leaf.context_length - len(leaf.value):
            self.decision, gpus = "exploit", self.parent_allocation(leaf, groups)
        else:
            costs = [self.cost(i, leaf, prompt) for i in groups]
            self.decision, gpus = "explore", {groups[costs.index(min(costs))]}
        (selected, *more) = sorted(gpus)
        if more:
            costs = [self.cost(i, leaf, prompt) for i in sorted(gpus)]
            selected = groups[costs.index(min(costs))]  # not sorted(gpus)[...]
        wait = self.prefill_time(
            self.cluster.queued_tokens(selected) + num_tokens - self.cluster.cached(prompt, num_tokens, selected)
        )
        if prompt:
            important = next(node for node in leaf.path() if node.is_large)
            if not any(b.important is important for b in self.histogram):
                self.seen.append(important)
            self.histogram.append(Booked(now, important, leaf, len(leaf.value), leaf.context_length, selected, wait))
            for node in leaf.path():
                node.gpus |= gpus
        self.counter += 1
        if self.counter >= self.settings.released_min_requests:
            self.steal(groups, now)
        return selected

    # --- tree

    def insert(self, key: list[bytes]) -> TreeNode:
        node = self.root
        while key:
            child = next((c for c in node.children if c.value[0] == key[0]), None)
            if child is None:
                child = TreeNode(key, node)
                node.children.append(child)
                return child
            common = sum(a == b for a, b in zip(child.value, key, strict=False))
            if common < len(child.value):
                self.split(child, common)
                child = child.parent
            node, key = child, key[common:]
        return node

    def split(self, child: TreeNode, length: int) -> None:
        new = TreeNode(child.value[:length], child.parent, [child], set(child.gpus))
        child.parent.children[child.parent.children.index(child)] = new
        child.parent, child.value = new, child.value[length:]
        if new.is_large and not child.is_large:
            for booked in self.histogram:
                if booked.important is child:
                    booked.important = new
            self.seen = [new if node is child else node for node in self.seen]

    def parent_allocation(self, node: TreeNode, groups: Collection[int]) -> set[int]:
        return next((step.gpus & set(groups) for step in node.path() if step.gpus & set(groups)), set(groups))

    def remove_old_entries(self, now: float) -> None:
        for old in [b for b in self.histogram if b.at + self.settings.window_s <= now]:
            self.histogram.remove(old)
            if not any(b.important is old.important for b in self.histogram):
                old.important.gpus = set()
                self.seen.remove(old.important)
        used = {id(node) for b in self.histogram for node in b.leaf.path()}

        def forget(node: TreeNode) -> None:
            node.children = [c for c in node.children if id(c) in used]
            for child in node.children:
                forget(child)

        forget(self.root)

    # --- loads

    def booked(self, node: TreeNode) -> list[Booked]:
        return [b for b in self.histogram if b.important is node]

    def node_cost(self, node: TreeNode) -> int:
        mine = self.booked(node)
        missed, prompts = sum(b.new for b in mine), sum(b.prompt for b in mine)
        tokens = len(node.value) * self.cluster.page_size
        return missed * len(mine) * self.prefill_time(tokens) // (prompts * max(1, len(node.gpus)))

    def decode_cost(self, i: int) -> int:
        outputs = self.cluster.recent_outputs(i)
        return self.cluster.queue(i) * self.decode_time(sum(outputs) / len(outputs)) if outputs else 0

    def allocation(self, i: int, least: int = 1) -> int:
        nodes = [node for node in self.seen if i in node.gpus and len(self.booked(node)) >= least]
        return sum(self.node_cost(node) for node in nodes) + self.decode_cost(i)

    def cost(self, i: int, leaf: TreeNode, prompt: Sequence[bytes]) -> int:
        return self.allocation(i) + self.virtual_evict(i, len(leaf.value), prompt)

    def virtual_evict(self, i: int, num_pages: int, prompt: Sequence[bytes]) -> int:
        """E2's M, large nodes only."""
        forest, known = self.cluster.forest, self.cluster.forest.known
        room = num_pages - max(0, self.cluster.num_pages[i] - len(forest.holds(i)))
        window = [s for s in self.cluster.sent if s.group == i and s.at + self.cluster.window_s > self.cluster.now]
        nodes = [node for node in forest.nodes() if i in known[node[0]].until and node[0] not in prompt]
        nodes.sort(key=lambda node: (known[node[0]].last[i], -known[node[0]].depth))
        lost = 0
        for node in nodes:
            if room <= 0:
                break
            evicted = min(len(node), room)
            if len(node) > known[node[0]].depth - 1:
                lost += self.prefill_time(evicted * self.cluster.page_size) * known[node[0]].shares.count(i)
            room -= evicted
        return lost // len(window) if window else 0

    # --- stealing

    def steal(self, groups: list[int], now: float) -> None:
        devices = sorted(((i, self.allocation(i, least=2)) for i in groups), key=lambda device: -device[1])
        while len(devices) > 1:
            (larger, larger_cost), (smaller, smaller_cost) = devices[0], devices[-1]
            if larger_cost < self.settings.released_high_load * smaller_cost:
                return
            nodes = [n for n in self.seen if larger in n.gpus and n.is_large and len(self.booked(n)) > 1]
            nodes.sort(key=self.node_cost)
            if len(nodes) == 1:
                (node,) = nodes
                if smaller not in node.gpus and self.is_overloaded(node, larger, now):
                    smaller_cost += self.node_cost(node) // 2
                    node.gpus.add(smaller)
                    for booked in self.booked(node):
                        if booked.gpu == larger:
                            booked.wait = -1  # its data points are deleted
            else:
                for node, cost in [(node, self.node_cost(node)) for node in nodes]:
                    if larger_cost - cost < smaller_cost + cost:
                        break
                    larger_cost -= cost
                    smaller_cost += cost
                    self.move(node, smaller)
            devices = [*devices[1:-1], (smaller, smaller_cost)]

    def move(self, node: TreeNode, gpu: int) -> None:
        node.gpus = {gpu}
        for child in node.children:
            self.move(child, gpu)

    def is_overloaded(self, node: TreeNode, gpu: int, now: float) -> bool:
        """Twice the wait in the second half of the window."""
        points = [(b.at, b.wait) for b in self.booked(node) if b.gpu == gpu and b.wait >= 0]
        cutoff = now - self.settings.window_s / 2
        first = [wait for at, wait in points if at < cutoff]
        second = [wait for at, wait in points if at >= cutoff]
        return bool(first and second) and sum(second) / len(second) >= 2 * sum(first) / len(first)
