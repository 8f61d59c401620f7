"""What the schedulers are told of a cost model: seconds of a prompt by its tokens, seconds of an output token."""

from __future__ import annotations

from preble_jax.sched.cost import LinearCostModel
from preble_jax.sched.line_fit import fit_line
from preble_jax.sched.step_fit import PROFILED_ROWS
from preble_jax.sim.cost.base import StepCost, StepWork

PROMPT_TOKENS = (64, 128, 256, 512, 1024, 2048)
CONTEXT_TOKENS = 1024


def scheduler_costs(cost: StepCost) -> LinearCostModel:
    """As `preble-jax profile` fits them to what it measures: the line through single prompts, nothing cached; and a
    step in which PROFILED_ROWS sequences decode, each with CONTEXT_TOKENS of its own, shared among them."""
    base_s, token_s = fit_line({num: prompt_s(cost, num) for num in PROMPT_TOKENS})
    rows = int(PROFILED_ROWS)
    context = rows * CONTEXT_TOKENS
    step_s = cost.step_s(StepWork(num_decode=rows, decode_context=context, chunks=(), unique_context=context))
    return LinearCostModel(prefill_base_s=base_s, prefill_token_s=token_s, decode_token_s=step_s / rows)


def prompt_s(cost: StepCost, num_tokens: int) -> float:
    """A prompt of that many tokens, alone, in chunks."""
    seconds, length, budget = 0.0, 0, cost.engine.prefill_tokens
    while length < num_tokens:
        extend = min(budget, num_tokens - length)
        length += extend
        seconds += cost.step_s(
            StepWork(num_decode=0, decode_context=0, chunks=((extend, length),), unique_context=length)
        )
    return seconds
