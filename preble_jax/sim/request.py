"""What is simulated: requests with their prompts as chains of block ids, and when they are sent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from preble_jax.sampling_params import SamplingParams

_DEFAULT_MAX_TOKENS = SamplingParams().max_tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class SimRequest:
    """One request. Its outcome in tokens is known beforehand; nobody who decides anything is told `num_output`, only
    its tenant's budget (`Workload.output_budgets`).

    arrival_s: seconds after the workload's begin at which it is sent (at the earliest, when it follows another one).
    num_prompt, num_output: tokens, each at least 1.
    blocks: ids of the prompt's blocks, `Workload.block_size` tokens each, the last one may be partial or left out. An
        id stands for a block and for everything before it: wherever an id occurs, the ids before it are the same.
        Tokens that no block covers are nobody else's.
    follows: index in the workload of the request that must have ended before this one is sent (a later turn of a
        conversation, a later step of an agent); it is sent think_s seconds after that. Where this prompt begins with
        that one's blocks and is long enough for its output, too, it contains it.
    """

    arrival_s: float
    num_prompt: int
    num_output: int
    blocks: tuple[int, ...] = ()
    tenant: str = "default"
    follows: int | None = None
    think_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Workload:
    """requests: by arrival; a request comes after the one it follows. block_size: tokens a block id stands for.
    length_scale: of a trace, what its lengths have been multiplied by."""

    name: str
    block_size: int
    requests: Sequence[SimRequest]
    length_scale: float = 1.0

    @property
    def num_prompt_tokens(self) -> int:
        return sum(request.num_prompt for request in self.requests)

    def output_budgets(self) -> dict[str, int]:
        """`max_tokens` that each tenant asks for: with all its requests what its longest answer needs, and the default
        where that is enough."""
        budgets: dict[str, int] = {}
        for request in self.requests:
            budgets[request.tenant] = max(budgets.get(request.tenant, _DEFAULT_MAX_TOKENS), request.num_output)
        return budgets
