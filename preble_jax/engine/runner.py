"""The compiled side of a device group: weights, pages, and one program per step shape."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from preble_jax.config import Config
from preble_jax.engine.arrays import ArrayBuilder, StepVector
from preble_jax.engine.attention import choose_attention
from preble_jax.engine.programs import StepProgram
from preble_jax.engine.shapes import StepShape, StepShapes
from preble_jax.errors import ConfigError
from preble_jax.kv.device import allocate_pages, pages_sharding
from preble_jax.model.config import ModelConfig
from preble_jax.model.decoder import AttentionCall, Decoder
from preble_jax.model.rope import rotation_table
from preble_jax.model.weights.load import Params
from preble_jax.progress import Progress
from preble_jax.sched.sequence import StepPlan

# XLA for CPUs would move what it can out of the decode loop: copies of whole weight arrays in another dtype or layout,
# made anew at each dispatch.
_CPU_DECODE_OPTIONS: dict[str, str | bool] = {
    "xla_disable_hlo_passes": "while-loop-invariant-code-motion,while-loop-expensive-invariant-code-motion"
}


@dataclass(frozen=True)
class Dispatched:
    """A plan that the device works on. vector: what it reads meanwhile. made: see `programs`; index: which of its
    columns are the plan's rows."""

    plan: StepPlan
    vector: StepVector
    made: jax.Array
    index: np.ndarray


class ModelRunner:
    """Runs step plans on a mesh. Call `compile` first: a shape that was not compiled is a KeyError, never a compile."""

    def __init__(self, config: Config, model: ModelConfig, params: Params, mesh: Mesh) -> None:
        self.mesh = mesh
        self.shapes = StepShapes(config.engine)
        self._dtype = jnp.dtype(config.model.dtype)
        attention = choose_attention(config, model, mesh, self.shapes)
        self.backend = attention.backend
        self.num_pages = attention.layout.num_pages
        self.max_model_len = attention.max_model_len
        num_slots = 2 * config.engine.max_num_seqs  # as many as the scheduler's
        self._arrays = ArrayBuilder(
            self.num_pages, config.kv.page_size, attention.pages_per_seq, num_slots, attention.planner
        )
        self._max_steps = config.engine.decode_steps
        self._page_size = config.kv.page_size
        self._everywhere = NamedSharding(mesh, PartitionSpec())
        rotation = jax.device_put(rotation_table(model, self.max_model_len), self._everywhere)
        self._graph, self.params = nnx.split(Decoder(model, params, rotation))
        weights, self._treedef = jax.tree.flatten(self.params)
        self._weights = tuple(weights)
        self.pages = allocate_pages(attention.layout, model.num_layers, pages_sharding(mesh, attention.heads))
        self._last_tokens = jax.device_put(np.zeros(num_slots, np.int32), self._everywhere)
        self.programs: dict[StepShape, Any] = {}
        self._is_elsewhere = mesh.devices.flat[0].platform != "cpu"  # than in the host's memory

    def compile(self, progress: Progress) -> None:
        """Compiles every step shape, in parallel; afterwards nothing compiles any more."""
        shapes = self.shapes.all()
        with (
            progress.task("compiling steps", total=len(shapes)) as task,
            ThreadPoolExecutor(min(len(shapes), os.cpu_count() or 1)) as pool,
        ):
            futures = {pool.submit(self._compile, shape): shape for shape in shapes}
            for future in as_completed(futures):
                self.programs[futures[future]] = future.result()
                task.advance()

    def build(self, plan: StepPlan) -> StepVector:
        """The plan's arrays, for `dispatch`."""
        return self._arrays.build(plan, self.shapes.fit(plan))

    def dispatch(self, plan: StepPlan, vector: StepVector) -> Dispatched:
        """Puts the plan behind what the device has to do already, and does not wait."""
        program = self.programs[vector.shape]
        self.pages, self._last_tokens, made = program(self._weights, self.pages, self._last_tokens, vector.packed)
        if self._is_elsewhere:
            made.copy_to_host_async()
        return Dispatched(plan, vector, made, self._arrays.index(plan, vector.shape))

    def results(self, dispatched: Dispatched) -> tuple[list[list[int]], list[list[float]], int]:
        """Waits for a plan to be carried out. Returns what each row of it made, log-probabilities beside it, and the
        number of steps the device ran."""
        made = np.asarray(dispatched.made.block_until_ready())[:, : dispatched.plan.num_steps, dispatched.index]
        self._arrays.take_back(dispatched.vector)
        counts = (made[0] >= 0).sum(axis=0).tolist()
        tokens = [row[:count] for row, count in zip(made[0].T.tolist(), counts, strict=True)]
        logprobs = [row[:count] for row, count in zip(made[1].view(np.float32).T.tolist(), counts, strict=True)]
        return tokens, logprobs, max(counts)

    def _compile(self, shape: StepShape) -> Any:
        call = AttentionCall(self.mesh, shape.num_decode_slots, self.backend, self._dtype)
        packing = self._arrays.packing(shape)
        program = StepProgram(
            graph=self._graph,
            treedef=self._treedef,
            call=call,
            packing=packing,
            page_size=self._page_size,
            no_kv_slot=self._arrays.no_kv_slot,
            max_steps=self._max_steps,
        )
        packed = jax.ShapeDtypeStruct((packing.size,), jnp.int32, sharding=self._everywhere)
        decodes = not shape.num_prefill_tokens
        run = jax.jit(program.decode_steps if decodes else program.mixed_step, donate_argnums=(1, 2))
        options = _CPU_DECODE_OPTIONS if decodes and not self._is_elsewhere else None
        return run.lower(self._weights, self.pages, self._last_tokens, packed).compile(options)


def make_mesh(tensor: int) -> Mesh:
    """The device group's mesh: the first `tensor` devices of this process."""
    devices = jax.devices()
    if not 1 <= tensor <= len(devices):
        raise ConfigError(f"mesh.tensor: expected 1 to {len(devices)} (the devices of this process), got {tensor}")
    return Mesh(np.asarray(devices[:tensor]), ("tensor",))
