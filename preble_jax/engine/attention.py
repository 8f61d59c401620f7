"""Which attention backend serves a model on a mesh, and the pages it wants."""

from __future__ import annotations

import logging
from typing import NamedTuple

import jax.numpy as jnp
from jax.sharding import Mesh

from kernels_pallas import PageLayout, resolve_backend
from kernels_pallas.backends import load
from kernels_pallas.families import FamilyPlanner
from kernels_pallas.family_costs import family_costs
from preble_jax import env
from preble_jax.config import Config
from preble_jax.engine.shapes import StepShapes
from preble_jax.errors import ConfigError
from preble_jax.kv.device import sized_layout
from preble_jax.model.config import ModelConfig
from preble_jax.model.decoder import AttentionCall
from preble_jax.model.params import spec_for

logger = logging.getLogger(__name__)


class Attention(NamedTuple):
    """backend: a name in `kernels_pallas.BACKENDS`. layout: of one layer's pages. max_model_len: tokens of a sequence.
    heads: the mesh axis that splits key heads; None: every device has them all. planner: None: nobody shares a read."""

    backend: str
    layout: PageLayout
    max_model_len: int
    heads: str | None
    planner: FamilyPlanner | None

    @property
    def pages_per_seq(self) -> int:
        return -(-self.max_model_len // self.layout.page_size)


def choose_attention(config: Config, model: ModelConfig, mesh: Mesh, shapes: StepShapes) -> Attention:
    """The backend that the environment, the configuration or the device names, if it can serve the model.

    What cannot be served falls back to jnp, with one line in the log, where nobody asked for the backend by name.
    Raises ConfigError otherwise, and where memory is short. Call it when the weights are on the devices.
    """
    setting = env.attention_backend(config.engine.attention)
    try:
        backend = resolve_backend(setting, mesh.devices.flat[0])
    except ValueError as error:
        raise ConfigError(f"engine.attention: {error}") from None
    try:
        return _serve(backend, config, model, mesh, shapes)
    except ConfigError:  # a ValueError that has nothing to do with the backend: memory is short
        raise
    except ValueError as error:
        if setting != "auto" or backend == "jnp":
            raise ConfigError(f"engine.attention, backend {backend}: {error}") from None
        logger.warning("attention backend: %s cannot serve this: %s; jnp does, which is slower", backend, error)
    return _serve("jnp", config, model, mesh, shapes)


def _serve(backend: str, config: Config, model: ModelConfig, mesh: Mesh, shapes: StepShapes) -> Attention:
    """Raises ValueError, naming the limit, for what the backend cannot do."""
    heads = spec_for(("kv_heads",), (model.num_kv_heads,), mesh.shape)[0]
    max_model_len = min(config.model.max_model_len or model.max_position, model.max_position)
    dtype = jnp.dtype(config.model.dtype)
    layout = sized_layout(
        config.kv,
        num_layers=model.num_layers,
        num_kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        dtype=dtype,
        num_shards=mesh.shape["tensor"] if heads else 1,
        max_tokens=config.engine.max_num_seqs * max_model_len,
        device=mesh.devices.flat[0],
        backend=backend,
    )
    planner = FamilyPlanner(page_size=config.kv.page_size, costs=family_costs(backend))
    chosen = Attention(
        backend,
        layout,
        min(max_model_len, layout.num_pages * layout.page_size),
        heads,
        planner if config.engine.shared_prefix else None,
    )
    for shape in shapes.all():
        call = AttentionCall(mesh, shape.num_decode_slots, backend, dtype)
        geometry = call.geometry(
            model,
            num_tokens=shape.num_tokens,
            num_seqs=shape.num_seqs,
            pages_per_seq=chosen.pages_per_seq,
            page_size=layout.page_size,
            page_dtype=layout.dtype,
        )
        load(backend).check(geometry, sliding_window=None, soft_cap=None)
        if chosen.planner is not None:
            families = chosen.planner.empty(
                num_decode_slots=shape.num_decode_slots, num_tokens=shape.num_tokens, num_seqs=shape.num_seqs
            )
            load(backend).check(families.geometry(geometry), sliding_window=None, soft_cap=None)
    return chosen
