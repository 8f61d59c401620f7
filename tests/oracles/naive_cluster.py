"""What routers look at, worked out from the bare history whenever it is asked for: nothing is kept incrementally."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from fractions import Fraction

from oracles.naive_forest import NaiveForest


@dataclass
class Asked:
    tenant: str
    max_tokens: int


@dataclass
class Sent:
    """started: its first token came."""

    name: str
    at: float
    group: int
    num_tokens: int
    missed: int
    pages: int
    own_pages: int
    path: list
    started: bool = False
    ended: bool = False


class NaiveCluster:
    """ranks: who wins between equals. max_num_seqs: sequences that a group runs at a time."""

    def __init__(
        self,
        *,
        page_size: int,
        window_s: float,
        ttl_s: float,
        ranks: Sequence[float],
        num_pages: Sequence[int],
        max_num_seqs: int,
    ) -> None:
        self.page_size = page_size
        self.window_s = window_s
        self.ranks = ranks
        self.num_pages = num_pages
        self.max_num_seqs = max_num_seqs
        self.forest = NaiveForest(ttl_s=ttl_s)
        self.asked: dict[str, Asked] = {}
        self.sent: list[Sent] = []
        self.outputs: list[tuple[float, int, int]] = []
        self.history: list[tuple[Sent, int | None]] = []  # what was sent, and what ended with how many output tokens
        self.now = 0.0

    def pass_time(self, now: float) -> None:
        for old in [s for s in self.sent if s.path and s.at + self.window_s <= now]:
            self.forest.unshare(old.path, old.group)
            old.path = []
        self.forest.expire(now)
        self.now = now

    def ask(self, name: str, tenant: str, max_tokens: int) -> None:
        self.asked[name] = Asked(tenant, max_tokens)

    def send(self, name: str, prompt: Sequence[bytes], num_tokens: int, group: int) -> None:
        missed = num_tokens - self.cached(prompt, num_tokens, group)
        expected = self.expected_output([group], self.asked[name].max_tokens)
        pages = -(-(num_tokens + expected) // self.page_size)
        own_pages = pages - (num_tokens - missed) // self.page_size
        path = self.forest.assign(prompt, group, self.now)
        sent = Sent(name, self.now, group, num_tokens, missed, pages, own_pages, path)
        self.sent.append(sent)
        self.history.append((sent, None))

    def start(self, name: str) -> None:
        (sent,) = (s for s in self.sent if s.name == name)
        sent.started = True

    def finish(self, name: str, output_tokens: int) -> None:
        (sent,) = (s for s in self.sent if s.name == name)
        sent.ended = True
        self.history.append((sent, output_tokens))
        self.outputs.append((self.now, sent.group, output_tokens))

    # --- what there is to know

    def cached(self, prompt: Sequence[bytes], num_tokens: int, i: int) -> int:
        """Prompt tokens group i holds; the last token is always computed."""
        return min(self.forest.match(prompt, i), (num_tokens - 1) // self.page_size) * self.page_size

    def running(self, i: int) -> list[Sent]:
        return [s for s in self.sent if s.group == i and not s.ended]

    def queue(self, i: int) -> int:
        return len(self.running(i))

    def queued_tokens(self, i: int) -> int:
        return sum(s.missed for s in self.running(i) if not s.started)

    def decode_pages(self, i: int) -> int:
        return sum(s.pages for s in self.running(i))

    def recent_outputs(self, i: int) -> list[int]:
        return [tokens for at, group, tokens in self.outputs if group == i and at + self.window_s > self.now]

    def expected_output(self, groups: Collection[int], max_tokens: int) -> int:
        outputs = [tokens for i in groups for tokens in self.recent_outputs(i)]
        expected = -(-sum(outputs) // len(outputs)) if outputs else 0
        return min(expected, max_tokens) if max_tokens else expected

    def expected_anywhere(self, max_tokens: int) -> int:
        """Of all groups; a budget is an output that was seen once."""
        seen = [tokens for i in range(len(self.num_pages)) for tokens in self.recent_outputs(i)]
        seen += [max_tokens] * (max_tokens > 0)
        mean = Fraction(sum(seen), len(seen)) if seen else Fraction(0)
        return min(math.ceil(mean), max_tokens or math.ceil(mean))

    def shortest_queue(self, groups: Collection[int]) -> int:
        return min(groups, key=lambda i: (self.queue(i), self.ranks[i]))
