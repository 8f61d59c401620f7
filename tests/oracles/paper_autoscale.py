"""Prefix autoscaling as preble_jax/sched/placement/autoscale.py words it, literal: every question is answered from the
list of all reports and from every block of the forest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from oracles.paper_e2 import PaperE2, Sent

Path = tuple[bytes, ...]


class PaperAutoscale:
    """A prefix is the tuple of its blocks."""

    def __init__(self, paper: PaperE2, ratio: float) -> None:
        self.paper = paper
        self.ratio = ratio
        self.reports: list[dict] = []
        self.since_tick: list[Path] = []
        # prefix -> what is known of it; replicas: [group, requests when made, fresh], oldest first
        self.known: dict[Path, dict] = {}
        self.num_replicated = self.num_retired = 0

    def wanted(self, prompt: Sequence[bytes], groups: Sequence[int]) -> int | None:
        known = self.find(prompt)
        if known is None:
            return None
        beyond = prompt[len(known["prefix"])] if len(prompt) > len(known["prefix"]) else None
        target = known["homes"].get(beyond)
        if target is None:
            target = next((r["group"] for r in known["replicas"] if r["fresh"]), None)
        if target is None or target not in groups:
            return None
        for replica in known["replicas"]:
            if replica["group"] == target:
                replica["fresh"] = False
        return target

    def retired(self, prompt: Sequence[bytes]) -> set[int]:
        known = self.find(prompt)
        return known["retired"] if known is not None else set()

    def find(self, prompt: Sequence[bytes]) -> dict | None:
        fitting = [p for p in self.known if tuple(prompt[: len(p)]) == p]
        return self.known[max(fitting, key=len)] if fitting else None

    def report(self, sent: Sent, queue_ns: int, now: float) -> None:
        prefix = self.key_portion(sent)
        if prefix is not None:
            self.reports.append({"at": now, "prefix": prefix, "ns": queue_ns, "old": False})
            if prefix not in self.since_tick:
                self.since_tick.append(prefix)

    def key_portion(self, sent: Sent) -> Path | None:
        known = self.paper.forest.known
        fitting = []
        for run in self.paper.forest.nodes():
            above = known[run[0]].depth - 1
            if run[0] in sent.prompt and len(run) > above and len(known[run[0]].shares) > 1:
                fitting.append(above + len(run))
        return tuple(sent.prompt[: max(fitting)]) if fitting else None

    def tick(self, now: float) -> None:
        for prefix in self.since_tick:
            recent = [r["ns"] for r in self.about(prefix) if r["at"] + self.paper.window_s > now and not r["old"]]
            before = [
                r["ns"]
                for r in self.about(prefix)
                if r["at"] + 2 * self.paper.window_s > now and (r["at"] + self.paper.window_s <= now or r["old"])
            ]
            if average(recent) > self.ratio * average(before):
                self.replicate(prefix, average(recent))
        self.since_tick = []
        for prefix in list(self.known):
            self.retire(prefix)

    def replicate(self, prefix: Path, queue_ns: float) -> None:
        paper = self.paper
        known = self.known.get(prefix, {"prefix": prefix, "replicas": [], "homes": {}, "retired": set()})
        up = range(len(paper.num_pages))
        holders = [i for i in up if prefix[-1] in paper.forest.holds(i) and i not in known["retired"]]
        others = [i for i in up if i not in holders]
        if not holders or not others:
            return
        target = min(others, key=lambda i: (paper.load(i), paper.ranks[i]))
        prefill = paper.prefill_time(len(prefix) * paper.page_size)
        worth_it = queue_ns / self.ratio > prefill
        if not worth_it or paper.load(target) + prefill >= min(paper.load(i) for i in holders):
            return
        known["retired"].discard(target)
        known["replicas"].append({"group": target, "made_at": self.num_requests(prefix), "fresh": True})
        source = max(holders, key=lambda i: (paper.load(i), paper.ranks[i]))
        self.split(known, source, target)
        for report in self.about(prefix):
            report["old"] = True
        self.known[prefix] = known
        self.num_replicated += 1

    def split(self, known: dict, source: int, target: int) -> None:
        blocks = self.paper.forest.known
        end = known["prefix"][-1]
        subtrees = [(block.shares.count(source), name) for name, block in blocks.items() if block.parent == end]
        load = {source: 0, target: 0}
        for num, name in sorted(subtrees, key=lambda subtree: (-subtree[0], subtree[1])):
            if num >= 2:
                side = target if load[target] < load[source] else source
                load[side] += num
                if side == target:
                    known["homes"][name] = target

    def retire(self, prefix: Path) -> None:
        known = self.known[prefix]
        while known["replicas"] and self.num_requests(prefix) <= known["replicas"][-1]["made_at"] / 2:
            group = known["replicas"][-1]["group"]
            known["replicas"] = [r for r in known["replicas"] if r["group"] != group]
            known["homes"] = {name: home for name, home in known["homes"].items() if home != group}
            known["retired"].add(group)
            self.num_retired += 1
        known["retired"] = {i for i in known["retired"] if prefix[-1] in self.paper.forest.holds(i)}
        if not known["replicas"] and not known["retired"]:
            del self.known[prefix]

    def num_requests(self, prefix: Path) -> int:
        block = self.paper.forest.known.get(prefix[-1])
        return len(block.shares) if block is not None else 0

    def about(self, prefix: Path) -> list[dict]:
        return [r for r in self.reports if r["prefix"] == prefix]


def average(values: list[int]) -> float:
    return sum(values) / len(values) if values else 0.0
