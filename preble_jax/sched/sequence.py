"""A request inside a device group: its tokens, how far they are computed, and the pages that hold them."""

from __future__ import annotations

import sys
from collections.abc import MutableSequence
from typing import NamedTuple

from preble_jax.kv.hashing import BlockHasher
from preble_jax.kv.prefix_cache import SequencePages
from preble_jax.request import Request


class Sequence:
    """One request's state. `tokens` is prompt and output as far as it is known.

    A step is planned while the one before it runs, so that the device is ahead of what is known here. Its steps run in
    order; whatever they were told to do counts as done for those that follow.

    order:          arrival number; decides who is first come and who is preempted.
    max_total:      tokens, prompt and output, at which it ends by length.
    pages:          None while waiting.
    slot:           its row in the tables of whoever builds a step's arrays; -1 while waiting.
    num_computed:   tokens whose keys and values are in pages once the steps in flight have run.
    num_pending:    output tokens that steps in flight make.
    num_cached:     prompt tokens that pages held at the first admission; None before it.
    num_reached:    the most that `num_computed` has ever been: beyond it, nothing was computed twice.
    queue_s:        seconds it had waited when its first step was planned; None before that.
    """

    def __init__(
        self,
        request: Request,
        order: int,
        page_size: int,
        arrival_s: float,
        seed: int,
        max_model_len: int = sys.maxsize,
    ) -> None:
        self.request = request
        self.order = order
        self.arrival_s = arrival_s
        self.seed = seed
        prompt = request.prompt_token_ids
        # A vocabulary of bytes takes a byte a token.
        self.tokens: MutableSequence[int] = bytearray(prompt) if isinstance(prompt, bytes) else list(prompt)
        self.num_prompt = len(self.tokens)
        self.max_total = min(self.num_prompt + request.sampling.max_tokens, max_model_len)
        self.num_computed = 0
        self.num_pending = 0
        self.num_cached: int | None = None
        self.num_reached = 0
        self.queue_s: float | None = None
        self.pages: SequencePages | None = None
        self.slot = -1
        self._hasher = BlockHasher(page_size, request.cache_salt, request.block_hashes or ())
        self._page_size = page_size

    @property
    def num_total(self) -> int:
        """Tokens, with those that steps in flight make."""
        return len(self.tokens) + self.num_pending

    @property
    def num_output(self) -> int:
        return self.num_total - self.num_prompt

    @property
    def num_uncomputed(self) -> int:
        return self.num_total - self.num_computed

    @property
    def can_decode(self) -> bool:
        """A single token is left to compute, and another to be made of it: it fits a decode slot."""
        return self.num_uncomputed == 1 and not self.is_ending

    @property
    def is_ending(self) -> bool:
        """The steps in flight make its last token: nothing is left to plan."""
        return self.num_total >= self.max_total

    def hashes(self) -> list[bytes]:
        """Block hashes of all full pages of `tokens`."""
        return self._hasher.extend(self.tokens)

    def matchable_hashes(self) -> list[bytes]:
        """Those whose pages may come from the cache: at least one token is always computed, for its logits."""
        limit = (len(self.tokens) - 1) // self._page_size
        hashes = self.hashes()
        return hashes if len(hashes) <= limit else hashes[:limit]


class PlannedRow(NamedTuple):
    """`num_tokens` tokens of `sequence` from `start` on are computed in a dispatch, one after the other if it decodes.

    num_made: tokens it makes at most: of a prompt 1 if its last one is among those computed, decoding one a step.
    """

    sequence: Sequence
    start: int
    num_tokens: int
    num_made: int

    @classmethod
    def chunk(cls, sequence: Sequence, max_tokens: int) -> PlannedRow:
        """The next part of a prompt."""
        start = sequence.num_computed
        left = len(sequence.tokens) + sequence.num_pending - start
        return cls(sequence, start, max_tokens, 0) if max_tokens < left else cls(sequence, start, left, 1)

    @classmethod
    def decode(cls, sequence: Sequence, num_steps: int) -> PlannedRow:
        return cls(sequence, sequence.num_computed, num_steps, num_steps)


class StepPlan:
    """One dispatch: rows that decode first, then prompt chunks. Rows of results come in the same order. Not to be
    changed.

    rows: all of them. num_steps: more than one only where nothing but decoding is done.
    """

    __slots__ = ("decode", "num_steps", "prefill", "rows")

    def __init__(self, decode: tuple[PlannedRow, ...], prefill: tuple[PlannedRow, ...]) -> None:
        self.decode = decode
        self.prefill = prefill
        self.rows = decode + prefill
        self.num_steps = max([num_made for _, _, _, num_made in decode], default=1)

    @property
    def num_prefill_tokens(self) -> int:
        return sum([row.num_tokens for row in self.prefill])
