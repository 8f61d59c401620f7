"""What a step costs a device group: the simulator's stand-in for the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol


class StepWork(NamedTuple):
    """What one step computes, in tokens.

    num_decode: sequences that decode a token each. decode_context: sum of their lengths, the new tokens included.
    chunks: (extend tokens, length up to and with them) of each prompt chunk.
    unique_context: distinct tokens that all of them read, shared prefixes counted once.
    longest_decode: length of the longest sequence that decodes; 0: not known, the mean is taken for it. Backends that
        read a batch in lockstep wait for the longest.
    num_steps: decode steps of the dispatch that it is one of.
    """

    num_decode: int
    decode_context: int
    chunks: Sequence[tuple[int, int]]
    unique_context: int
    longest_decode: int = 0
    num_steps: int = 1

    @property
    def num_extend(self) -> int:
        return sum(extend for extend, _ in self.chunks)


@dataclass(frozen=True, kw_only=True)
class EngineShape:
    """The engine that a cost model was measured with, or is meant for: StepLimits without the model's own.

    prefill_tokens: prompt tokens a step. max_prefill_seqs: prompt chunks a step. max_num_seqs: running sequences.
    kv_tokens: room for keys and values, in tokens; what `--kv-tokens` overrides.
    """

    prefill_tokens: int
    max_prefill_seqs: int
    max_num_seqs: int
    kv_tokens: int


class StepCost(Protocol):
    """One device group of one kind. Pure: equal work costs the same, in any order."""

    @property
    def name(self) -> str: ...

    @property
    def engine(self) -> EngineShape: ...

    def step_s(self, work: StepWork) -> float:
        """Seconds of the step, finite and above 0."""
        ...
