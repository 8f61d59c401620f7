"""The compiled side of a device group: weights, pages, and one program per step shape."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from preble_jax.config import Config
from preble_jax.engine.arrays import ArrayBuilder
from preble_jax.engine.shapes import StepShape, StepShapes
from preble_jax.errors import ConfigError
from preble_jax.kv.device import allocate_pages, pages_sharding, sized_layout
from preble_jax.model.config import ModelConfig
from preble_jax.model.decoder import AttentionCall, Decoder, StepArrays
from preble_jax.model.params import spec_for
from preble_jax.model.sampling import SamplingArrays, sample
from preble_jax.progress import Progress
from preble_jax.sched.sequence import StepPlan


class ModelRunner:
    """Runs step plans on a mesh. Call `compile` first: a shape that was not compiled is a KeyError, never a compile."""

    def __init__(self, config: Config, model: ModelConfig, params: dict[str, jax.Array], mesh: Mesh) -> None:
        self.mesh = mesh
        self.shapes = StepShapes(config.engine)
        self._attention = config.engine.attention
        heads = spec_for(("kv_heads",), (model.num_kv_heads,), mesh.shape)[0]
        layout = sized_layout(
            config.kv,
            num_layers=model.num_layers,
            num_kv_heads=model.num_kv_heads,
            head_dim=model.head_dim,
            dtype=jnp.dtype(config.model.dtype),
            num_shards=mesh.shape["tensor"] if heads else 1,
        )
        self.num_pages = layout.num_pages
        capacity = self.num_pages * config.kv.page_size
        self.max_model_len = min(config.model.max_model_len or model.max_position, model.max_position, capacity)
        pages_per_seq = -(-self.max_model_len // config.kv.page_size)
        self._arrays = ArrayBuilder(self.num_pages, config.kv.page_size, pages_per_seq)
        self._graph, self.params = nnx.split(Decoder(model, params))
        self.pages = allocate_pages(layout, model.num_layers, pages_sharding(mesh, heads))
        self.programs: dict[StepShape, Any] = {}

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

    def run(self, plan: StepPlan) -> tuple[list[int], list[float]]:
        """Computes a step and waits for it. Returns a token and its log-probability for each row of `plan.rows`."""
        shape = self.shapes.fit(plan)
        step, settings = self._arrays.build(plan, shape)
        self.pages, tokens, logprobs = self.programs[shape](self.params, self.pages, step, settings)
        rows = self._arrays.rows(plan, shape)
        return np.asarray(tokens)[rows].tolist(), np.asarray(logprobs)[rows].tolist()

    def _compile(self, shape: StepShape) -> Any:
        try:
            call = AttentionCall.resolve(self.mesh, shape.num_decode_slots, self._attention)
        except ValueError as error:
            raise ConfigError(f"engine.attention: {error}") from None
        run = jax.jit(partial(_run_step, self._graph, call), donate_argnums=1)
        everywhere = NamedSharding(self.mesh, PartitionSpec())
        step, settings = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere),
            self._arrays.build(StepPlan((), ()), shape),
        )
        return run.lower(self.params, self.pages, step, settings).compile()


def _run_step(
    graph: Any,
    call: AttentionCall,
    state: Any,
    pages: tuple[jax.Array, ...],
    step: StepArrays,
    settings: SamplingArrays,
) -> tuple[tuple[jax.Array, ...], jax.Array, jax.Array]:
    """Model and sampler. Returns the pages, tokens [S] int32, log-probabilities [S] float32."""
    logits, pages = nnx.merge(graph, state)(step, pages, call)
    everywhere = NamedSharding(call.mesh, PartitionSpec())
    tokens, logprobs = sample(jax.lax.with_sharding_constraint(logits, everywhere), settings)
    return pages, tokens, logprobs


def make_mesh(tensor: int) -> Mesh:
    """The device group's mesh: the first `tensor` devices of this process."""
    devices = jax.devices()
    if not 1 <= tensor <= len(devices):
        raise ConfigError(f"mesh.tensor: expected 1 to {len(devices)} (the devices of this process), got {tensor}")
    return Mesh(np.asarray(devices[:tensor]), ("tensor",))
