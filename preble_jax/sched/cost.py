"""What work costs a device group: regressions of seconds over tokens, handed out in whole nanoseconds.

Integers, because loads are running sums that terms enter and leave for days: they stay exact, whatever the order, so
two schedulers that saw the same requests decide alike.
"""

from __future__ import annotations

from typing import Protocol

from preble_jax.config import SchedSettings

NS_PER_S = 1_000_000_000


class CostModel(Protocol):
    """Nanoseconds of one device group. `preble-jax profile` measures one, step_fit.StepFit refines it online."""

    def prefill_ns(self, num_tokens: int) -> int:
        """Time to compute that many prompt tokens; 0 for none."""
        ...

    def decode_ns(self, num_tokens: float) -> int:
        """Time that many output tokens of one request cost (an average may be fractional)."""
        ...


class LinearCostModel:
    """prefill = base + per token, decode = per token; in seconds. Not to be changed: make a new one."""

    def __init__(self, *, prefill_base_s: float, prefill_token_s: float, decode_token_s: float) -> None:
        self.prefill_base_s = prefill_base_s
        self.prefill_token_s = prefill_token_s
        self.decode_token_s = decode_token_s

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
