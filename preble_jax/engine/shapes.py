"""The few shapes a step is compiled for."""

from __future__ import annotations

from dataclasses import dataclass

from preble_jax.config import EngineSettings
from preble_jax.errors import ConfigError
from preble_jax.sched.sequence import StepPlan


@dataclass(frozen=True, order=True)
class StepShape:
    """Decode slots and prompt tokens of a compiled step; sequences = decode slots + prompt chunks."""

    num_decode_slots: int
    num_prefill_tokens: int
    num_prefill_seqs: int

    @property
    def num_tokens(self) -> int:
        return self.num_decode_slots + self.num_prefill_tokens

    @property
    def num_seqs(self) -> int:
        return self.num_decode_slots + self.num_prefill_seqs


class StepShapes:
    """Decode alone in each decode bucket; prompts in each prefill bucket, always beside the largest decode bucket.

    Empty decode slots cost rows of a matrix product and no attention; a second program for each prefill bucket would
    cost seconds at every first start.
    """

    def __init__(self, settings: EngineSettings) -> None:
        self._decode = _buckets("decode_buckets", settings.decode_buckets or _decode_buckets(settings.max_num_seqs))
        if self._decode[-1] != settings.max_num_seqs:
            raise ConfigError(
                f"engine.decode_buckets: expected the largest to be max_num_seqs {settings.max_num_seqs}, "
                f"got {self._decode[-1]}"
            )
        self._prefill = _buckets("prefill_buckets", settings.prefill_buckets)
        self._max_prefill_seqs = settings.max_prefill_seqs

    @property
    def decode_slots(self) -> tuple[int, ...]:
        """Of the shapes that only decode, smallest first."""
        return self._decode

    @property
    def prefill_sizes(self) -> tuple[int, ...]:
        """Prompt tokens of the shapes that have any, smallest first."""
        return self._prefill

    @property
    def prefill_tokens(self) -> int:
        """The step's prompt-token budget."""
        return self._prefill[-1]

    def all(self) -> list[StepShape]:
        """Every shape a plan can have, largest first: they take longest to compile."""
        decode = [StepShape(slots, 0, 0) for slots in self._decode]
        mixed = [StepShape(self._decode[-1], tokens, self._max_prefill_seqs) for tokens in self._prefill]
        return sorted(decode + mixed, key=lambda shape: -shape.num_tokens)

    def fit(self, plan: StepPlan) -> StepShape:
        """The smallest shape that holds the plan."""
        if not plan.prefill:
            return StepShape(_smallest(self._decode, len(plan.decode)), 0, 0)
        return StepShape(self._decode[-1], _smallest(self._prefill, plan.num_prefill_tokens), self._max_prefill_seqs)


def _decode_buckets(max_num_seqs: int) -> tuple[int, ...]:
    """8, 32 and so on by factors of 4. Never below 8: a matrix product of fewer rows costs the same, or more."""
    buckets, size = [], 8
    while size < max_num_seqs:
        buckets.append(size)
        size *= 4
    return (*buckets, max_num_seqs)


def _buckets(name: str, sizes: tuple[int, ...]) -> tuple[int, ...]:
    if not sizes or min(sizes) < 1 or list(sizes) != sorted(set(sizes)):
        raise ConfigError(f"engine.{name}: expected increasing sizes of at least 1, got {sizes}")
    return sizes


def _smallest(buckets: tuple[int, ...], size: int) -> int:
    return next(bucket for bucket in buckets if bucket >= size)
