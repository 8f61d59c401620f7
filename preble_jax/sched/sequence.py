"""A request inside a device group: its tokens, how far they are computed, and the pages that hold them."""

from __future__ import annotations

from dataclasses import dataclass

from preble_jax.kv.hashing import BlockHasher
from preble_jax.kv.prefix_cache import SequencePages
from preble_jax.request import Request


class Sequence:
    """One request's state. `tokens` is prompt and output; `tokens[:num_computed]` have keys and values in pages.

    order:          arrival number; decides who is first come and who is preempted.
    pages:          None while waiting.
    num_cached:     prompt tokens that pages held at the first admission; None before it.
    num_reached:    the most that `num_computed` has ever been: beyond it, nothing was computed twice.
    queue_s:        seconds it had waited when its first step was planned; None before that.
    """

    def __init__(self, request: Request, order: int, page_size: int, arrival_s: float, seed: int) -> None:
        self.request = request
        self.order = order
        self.arrival_s = arrival_s
        self.seed = seed
        self.tokens = list(request.prompt_token_ids)
        self.num_prompt = len(self.tokens)
        self.num_computed = 0
        self.num_cached: int | None = None
        self.num_reached = 0
        self.queue_s: float | None = None
        self.pages: SequencePages | None = None
        self._hasher = BlockHasher(page_size, request.cache_salt)
        self._page_size = page_size

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def num_uncomputed(self) -> int:
        return len(self.tokens) - self.num_computed

    @property
    def can_decode(self) -> bool:
        """A single token is left to compute: it fits a decode slot."""
        return self.num_uncomputed == 1

    def hashes(self) -> list[bytes]:
        """Block hashes of all full pages of `tokens`."""
        return self._hasher.extend(self.tokens)

    def matchable_hashes(self) -> list[bytes]:
        """Those whose pages may come from the cache: at least one token is always computed, for its logits."""
        limit = (len(self.tokens) - 1) // self._page_size
        hashes = self.hashes()
        return hashes if len(hashes) <= limit else hashes[:limit]


@dataclass(frozen=True)
class PlannedRow:
    """`num_tokens` tokens of `sequence` from `start` on are computed in a step.

    samples: they are its last ones, so that the step makes its next token.
    """

    sequence: Sequence
    start: int
    num_tokens: int
    samples: bool

    @classmethod
    def next_of(cls, sequence: Sequence, max_tokens: int) -> PlannedRow:
        count = min(max_tokens, sequence.num_uncomputed)
        return cls(sequence, sequence.num_computed, count, count == sequence.num_uncomputed)


@dataclass(frozen=True)
class StepPlan:
    """One step: single tokens first, then prompt chunks. Rows of results come in the same order."""

    decode: tuple[PlannedRow, ...]
    prefill: tuple[PlannedRow, ...]

    @property
    def rows(self) -> tuple[PlannedRow, ...]:
        return self.decode + self.prefill

    @property
    def num_prefill_tokens(self) -> int:
        return sum(row.num_tokens for row in self.prefill)
