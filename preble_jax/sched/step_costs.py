"""What a step of a real engine takes: a table by compiled shape, and terms for the keys that are read on top.

An engine pads its batches to a few shapes, so a step costs at least what the smallest shape that holds it costs, filled
or not; backends that leave the padding out pay for tokens on top. `preble-jax profile` measures and fits the numbers;
the simulator adds them up.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, NamedTuple


class StepKind(NamedTuple):
    """What is in a step, as far as its time depends on it.

    num_decode, decode_context, longest_decode: sequences that decode, their lengths together, and the longest.
    num_shared: tokens that all of them have in common (nearly: on average). chunks: (extend tokens, length up to and
    with them) of each prompt chunk. num_steps: decode steps of the dispatch that it is one of.
    """

    num_decode: int = 0
    decode_context: float = 0
    longest_decode: float = 0
    num_shared: float = 0
    chunks: Sequence[tuple[int, int]] = ()
    num_steps: int = 1

    @property
    def num_extend(self) -> int:
        return sum(extend for extend, _ in self.chunks)


@dataclass(frozen=True, kw_only=True)
class KeyCosts:
    """Seconds of what is in a step. Which of the terms count is a matter of the backend.

    row_s: a sequence that decodes. key_s: one of its own keys. slot_key_s: a decode slot of the compiled shape, taken
    or not, a key of the longest sequence's own: what backends pay that read all slots in lockstep. shared_key_s: a key
    that is read once for all that share it.
    token_s: a prompt token that is computed. chunk_s: a prompt chunk. chunk_key_s: a key before or in it. pair_s: a
    prompt token looking at a key; tokens come in tiles, see StepCosts.
    """

    row_s: float = 0.0
    key_s: float = 0.0
    slot_key_s: float = 0.0
    shared_key_s: float = 0.0
    chunk_s: float = 0.0
    chunk_key_s: float = 0.0
    pair_s: float = 0.0
    token_s: float = 0.0


KEY_TERMS = tuple(field.name for field in fields(KeyCosts))


@dataclass(frozen=True, kw_only=True)
class StepCosts:
    """decode_s: (slots, seconds) of each shape that only decodes, by slots. mixed_s: (prompt tokens, seconds) of each
    shape with prompts; it has the most decode slots. keys: on top. min_sharers: sequences from which on shared keys are
    read once; 0: never. tile: prompt tokens that attention computes together; a chunk takes whole tiles. dispatch_s: of
    decode steps: what a dispatch takes however many of them it is; with chunks it is part of mixed_s."""

    decode_s: tuple[tuple[int, float], ...]
    mixed_s: tuple[tuple[int, float], ...]
    keys: KeyCosts
    min_sharers: int = 0
    tile: int = 1
    dispatch_s: float = 0.0

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> StepCosts:
        """Raises KeyError, TypeError or ValueError for what `to_json` did not write."""
        costs = cls(
            decode_s=_table(value["decode_s"]),
            mixed_s=_table(value["mixed_s"]),
            keys=KeyCosts(**value["keys"]),
            min_sharers=int(value["min_sharers"]),
            tile=int(value["tile"]),
            dispatch_s=float(value.get("dispatch_s", 0.0)),
        )
        if costs.tile < 1:
            raise ValueError(f"expected a tile of at least 1 token, got {costs.tile}")
        shapes = [seconds for _, seconds in (*costs.decode_s, *costs.mixed_s)]
        if not costs.decode_s or not costs.mixed_s or not all(0.0 < seconds < math.inf for seconds in shapes):
            raise ValueError(f"expected seconds > 0 of at least one shape of either kind, got {shapes}")
        if not all(0.0 <= float(seconds) < math.inf for seconds in (*asdict(costs.keys).values(), costs.dispatch_s)):
            raise ValueError(f"expected seconds >= 0, got {costs.keys}, {costs.dispatch_s}")
        return costs

    def scaled(self, factor: float) -> StepCosts:
        """Of a machine on which everything takes so many times as long."""
        return replace(
            self,
            decode_s=tuple((slots, factor * seconds) for slots, seconds in self.decode_s),
            mixed_s=tuple((tokens, factor * seconds) for tokens, seconds in self.mixed_s),
            keys=KeyCosts(**{name: factor * seconds for name, seconds in asdict(self.keys).items()}),
            dispatch_s=factor * self.dispatch_s,
        )

    def with_row(self, row_s: float) -> StepCosts:
        """With so much more for each sequence that decodes."""
        return replace(self, keys=replace(self.keys, row_s=self.keys.row_s + row_s))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def max_num_seqs(self) -> int:
        return self.decode_s[-1][0]

    @property
    def prefill_tokens(self) -> int:
        return self.mixed_s[-1][0]

    def shape(self, num_decode: int, num_extend: int) -> tuple[int, float]:
        """(decode slots, seconds) of the compiled shape; beyond the largest, in proportion to it."""
        if not num_extend:
            return _smallest(self.decode_s, num_decode)
        return max(self.max_num_seqs, num_decode), _smallest(self.mixed_s, num_extend)[1]

    def pairs(self, extend: int, length: int) -> float:
        """Of prompt tokens, tiles filled up, and the keys they see, themselves included."""
        return -(-extend // self.tile) * self.tile * (length - (extend - 1) / 2)

    def seconds(self, kind: StepKind) -> float:
        num_decode, context, longest, num_shared, chunks, num_steps = kind
        num_extend, chunk_s = 0, 0.0
        keys = self.keys
        for extend, length in chunks:
            num_extend += extend
            chunk_s += keys.chunk_s + keys.chunk_key_s * length + keys.pair_s * self.pairs(extend, length)
        slots, total_s = self.shape(num_decode, num_extend)
        if num_decode:
            if num_shared and 0 < self.min_sharers <= num_decode:
                total_s += keys.shared_key_s * num_shared
                context -= num_decode * num_shared
                longest -= num_shared
            total_s += keys.row_s * num_decode + keys.key_s * context + keys.slot_key_s * slots * longest
        if not num_extend:
            total_s += self.dispatch_s / num_steps
        return total_s + chunk_s + keys.token_s * num_extend


def _smallest(table: tuple[tuple[int, float], ...], size: int) -> tuple[int, float]:
    for row in table:
        if row[0] >= size:
            return row
    largest, seconds = table[-1]
    return size, seconds * size / largest


def _table(rows: Sequence[Sequence[float]]) -> tuple[tuple[int, float], ...]:
    table = tuple((int(size), float(seconds)) for size, seconds in rows)
    sizes = [size for size, _ in table]
    if sizes != sorted(set(sizes)):
        raise ValueError(f"expected increasing sizes, got {sizes}")
    return table
