"""The compiled steps: what the device does between two visits of the host.

Both programs take (weights, pages, last tokens, a step's vector) and return (pages, last tokens, made). Pages and last
tokens are donated. last tokens [num_slots] int32: what each running sequence's latest step made of it, which its next
step starts from. made [2, K, S] int32: tokens and the bits of their log-probabilities, of K steps; -1: none made.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from preble_jax.engine.arrays import StepInput
from preble_jax.engine.packing import Packing
from preble_jax.model.decoder import AttentionCall
from preble_jax.model.sampling import sample, wants_logits

Pages = tuple[jax.Array, ...]


class StepProgram(NamedTuple):
    """What is fixed when a step is compiled.

    graph, treedef: of the model; weights travel as a flat tuple, because a nested one is flattened at each call.
    no_kv_slot: the slot that stands for nowhere. page_size: tokens. max_steps: K of the decode program.
    """

    graph: Any
    treedef: Any
    call: AttentionCall
    packing: Packing
    page_size: int
    no_kv_slot: int
    max_steps: int

    def mixed_step(
        self, weights: tuple[jax.Array, ...], pages: Pages, last: jax.Array, packed: jax.Array
    ) -> tuple[Pages, jax.Array, jax.Array]:
        """One step: single tokens of sequences that decode, and prompt chunks."""
        inputs: StepInput = self.packing.unpack(packed)
        num_slots = self.call.num_decode_slots
        decoding = inputs.step.token_ids[:num_slots]
        decoding = jnp.where(decoding < 0, last[inputs.slots[:num_slots]], decoding)
        step = inputs.step._replace(token_ids=inputs.step.token_ids.at[:num_slots].set(decoding))
        scores, pages = self._model(weights)(step, pages, self.call, wants_logits(inputs.sampling))
        tokens, logprobs = sample(scores, inputs.sampling)
        made = jnp.stack([tokens, _bits(logprobs)])[:, None]
        return pages, self._replicated(last.at[inputs.slots].set(tokens, mode="drop")), self._replicated(made)

    def decode_steps(
        self, weights: tuple[jax.Array, ...], pages: Pages, last: jax.Array, packed: jax.Array
    ) -> tuple[Pages, jax.Array, jax.Array]:
        """Up to `num_steps` steps in which every sequence decodes, until all have stopped.

        A sequence stops at one of its stop ids or after its `steps_left`; it writes no more keys then. One whose last
        token, made by a step that the host had not seen yet when it planned this one, is a stop id makes none at all.
        """
        inputs: StepInput = self.packing.unpack(packed)
        model, step = self._model(weights), inputs.step
        tokens = jnp.where(step.token_ids < 0, last[inputs.slots], step.token_ids)
        made = jnp.full((2, self.max_steps, tokens.shape[0]), -1, jnp.int32)

        def more(state: tuple[Any, ...]) -> Any:
            return (state[0] < inputs.num_steps[0]) & jnp.any(state[2])

        def advance(state: tuple[Any, ...]) -> tuple[Any, ...]:
            i, tokens, active, pages, made = state
            positions = step.positions + i
            page = jnp.take_along_axis(step.page_table, (positions // self.page_size)[:, None], axis=1)[:, 0]
            now = step._replace(
                token_ids=tokens,
                positions=positions,
                slots=jnp.where(active, page * self.page_size + positions % self.page_size, self.no_kv_slot),
                kv_lens=jnp.where(active, positions + 1, 0),
            )
            scores, pages = model(now, pages, self.call, wants_logits(inputs.sampling))
            sampled, logprobs = sample(scores, inputs.sampling._replace(num_made=inputs.sampling.num_made + i))
            made = made.at[:, i].set(jnp.where(active, jnp.stack([sampled, _bits(logprobs)]), -1))
            tokens = jnp.where(active, sampled, tokens)
            active &= (i + 1 < inputs.steps_left) & ~_stopped(tokens, inputs)
            return i + 1, tokens, active, pages, made

        active = (inputs.steps_left > 0) & ((step.token_ids >= 0) | ~_stopped(tokens, inputs))
        state = (jnp.int32(0), tokens, active, pages, made)
        _, tokens, _, pages, made = jax.lax.while_loop(more, advance, state)
        return pages, self._replicated(last.at[inputs.slots].set(tokens, mode="drop")), self._replicated(made)

    def _model(self, weights: tuple[jax.Array, ...]) -> Any:
        return nnx.merge(self.graph, jax.tree.unflatten(self.treedef, weights))

    def _replicated(self, x: jax.Array) -> jax.Array:
        everywhere = NamedSharding(self.call.mesh, PartitionSpec())
        replicated: jax.Array = jax.lax.with_sharding_constraint(x, everywhere)
        return replicated


def _bits(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, jnp.int32)


def _stopped(tokens: jax.Array, inputs: StepInput) -> jax.Array:
    stopped: jax.Array = jnp.any(tokens[:, None] == inputs.stop_ids, axis=1)
    return stopped
