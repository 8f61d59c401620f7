"""What work costs a device group: regressions of seconds over tokens, handed out in whole nanoseconds.

Integers, because loads are running sums that terms enter and leave for days: they stay exact, whatever the order, so
two schedulers that saw the same requests decide alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from preble_jax.config import SchedSettings
from preble_jax.errors import InvariantError

NS_PER_S = 1_000_000_000
# Decode rows a step over which its base is spread, where nobody has seen how many there are; what a profile uses.
PROFILED_ROWS = 8.0


class CostModel(Protocol):
    """Nanoseconds of one device group. `preble-jax profile` measures one, step_fit.StepFit refines it online."""

    def prefill_ns(self, num_tokens: int) -> int:
        """Time to compute that many prompt tokens; 0 for none."""
        ...

    def decode_ns(self, num_tokens: float) -> int:
        """Time that many output tokens of one request cost (an average may be fractional), with their shares of the
        steps that make them."""
        ...

    def row_ns(self, num_tokens: float) -> int:
        """Time by which that many output tokens lengthen steps that are run in any case."""
        ...

    def slot_ns(self, num_tokens: float, num_slots: int) -> int:
        """Time until one of num_slots decode slots is free, when all are taken by outputs of that many tokens on
        average, which began at any time."""
        ...


class LinearCostModel:
    """prefill = base + per token, decode = per token; in seconds. Not to be changed: make a new one.

    decode_row_s: what a decoding sequence adds to a step; None: decode_token_s less a share of the base in a step of
    PROFILED_ROWS, and at least a tenth of it.
    """

    def __init__(
        self,
        *,
        prefill_base_s: float,
        prefill_token_s: float,
        decode_token_s: float,
        decode_row_s: float | None = None,
    ) -> None:
        self.prefill_base_s = prefill_base_s
        self.prefill_token_s = prefill_token_s
        self.decode_token_s = decode_token_s
        if decode_row_s is None:
            decode_row_s = max(decode_token_s - prefill_base_s / PROFILED_ROWS, 0.1 * decode_token_s)
        self.decode_row_s = decode_row_s

    @classmethod
    def from_settings(cls, settings: SchedSettings) -> LinearCostModel:
        return cls(
            prefill_base_s=settings.prefill_base_s,
            prefill_token_s=settings.prefill_token_s,
            decode_token_s=settings.decode_token_s,
        )

    def prefill_ns(self, num_tokens: int) -> int:
        if num_tokens <= 0:
            return 0
        return round((self.prefill_base_s + self.prefill_token_s * num_tokens) * NS_PER_S)

    def decode_ns(self, num_tokens: float) -> int:
        return round(self.decode_token_s * num_tokens * NS_PER_S)

    def row_ns(self, num_tokens: float) -> int:
        return round(self.decode_row_s * num_tokens * NS_PER_S)

    def slot_ns(self, num_tokens: float, num_slots: int) -> int:
        """An output takes num_tokens steps of base + num_slots * row seconds; num_slots of them end meanwhile."""
        return round((self.prefill_base_s / num_slots + self.decode_row_s) * num_tokens * NS_PER_S)


_PARTS = ("prefill_base_s", "prefill_token_s", "decode_token_s", "decode_row_s")
_FS_PER_S = 10**15


class MeanCost:
    """The mean of models that come and go. Sums of whole femtoseconds: they stay exact."""

    def __init__(self) -> None:
        self._sums = [0] * len(_PARTS)
        self._count = 0

    def add(self, cost: LinearCostModel, sign: int = 1) -> None:
        """sign: -1 takes one out that is in."""
        self._count += sign
        for i, part in enumerate(_PARTS):
            self._sums[i] += sign * round(getattr(cost, part) * _FS_PER_S)

    def validate(self, costs: Sequence[LinearCostModel]) -> None:
        """Raises InvariantError if it is not of these."""
        expected = MeanCost()
        for cost in costs:
            expected.add(cost)
        if (self._count, self._sums) != (expected._count, expected._sums):
            raise InvariantError(f"mean cost: kept of {self._count} models, not of the {len(costs)} that there are")

    def mean(self) -> LinearCostModel:
        """Of at least one."""
        return LinearCostModel(
            **{part: total / (self._count * _FS_PER_S) for part, total in zip(_PARTS, self._sums, strict=True)}
        )
