"""The parameter table: packing is exact and reversible, and means what the decoder takes it to mean."""

from __future__ import annotations

import logging
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from fakes.checkpoints import TINY, packed, random_hf_tensors
from preble_jax.model.config import ModelConfig
from preble_jax.model.params import LOGICAL_RULES, param_table, spec_for

CONFIGS = [TINY, replace(TINY, tie_embeddings=True), replace(TINY, num_kv_heads=8), replace(TINY, num_kv_heads=1)]


@pytest.mark.parametrize("config", CONFIGS)
def test_packing_is_a_bijection_onto_the_stated_shapes(config: ModelConfig) -> None:
    tensors = random_hf_tensors(config)
    paths = [spec.path for spec in param_table(config)]
    assert len(set(paths)) == len(paths)
    assert ("lm_head" in paths) == (not config.tie_embeddings)
    for spec in param_table(config):
        sources = [tensors[name] for name in spec.hf]
        param = spec.pack(config, sources)
        assert param.shape == spec.shape, spec.path
        assert len(spec.axes) == len(spec.shape)
        assert len(spec.gguf) == len(spec.hf) == len(spec.source_shapes)
        for source, back in zip(sources, spec.unpack(config, param), strict=True):
            np.testing.assert_array_equal(back, source)


def test_packed_matrices_compute_what_the_separate_ones_do() -> None:
    """Hugging Face: y = W x, heads in rows, query head h reads key/value head h // G."""
    config, tensors = TINY, random_hf_tensors(TINY)
    params, groups, dim = packed(config, tensors), config.num_query_groups, config.head_dim
    x = np.random.default_rng(1).standard_normal(config.hidden_size).astype(np.float32)
    layer = "model.layers.1"
    columns = np.einsum("e,ekc->kc", x, params["layers.1.qkv"])
    halves = columns[:, :-dim].reshape(config.num_kv_heads, 2, groups + 1, dim // 2)
    turned = np.concatenate([halves[:, 0], halves[:, 1]], axis=-1)  # [K, G + 1, D]: the queries, then the key
    q = (tensors[f"{layer}.self_attn.q_proj.weight"] @ x).reshape(config.num_heads, dim)
    k = (tensors[f"{layer}.self_attn.k_proj.weight"] @ x).reshape(config.num_kv_heads, dim)
    v = (tensors[f"{layer}.self_attn.v_proj.weight"] @ x).reshape(config.num_kv_heads, dim)
    for head in range(config.num_heads):
        np.testing.assert_allclose(turned[head // groups, head % groups], q[head], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(turned[:, groups], k, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(columns[:, -dim:], v, rtol=1e-4, atol=1e-4)

    out = np.einsum("kgd,kgde->e", q.reshape(config.num_kv_heads, groups, dim), params["layers.1.out"])
    np.testing.assert_allclose(out, tensors[f"{layer}.self_attn.o_proj.weight"] @ q.reshape(-1), rtol=1e-3, atol=1e-3)

    gate_up = np.einsum("e,ecf->cf", x, params["layers.1.gate_up"])
    np.testing.assert_allclose(gate_up[0], tensors[f"{layer}.mlp.gate_proj.weight"] @ x, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(gate_up[1], tensors[f"{layer}.mlp.up_proj.weight"] @ x, rtol=1e-4, atol=1e-4)
    down = gate_up[0] @ params["layers.1.down"]
    np.testing.assert_allclose(down, tensors[f"{layer}.mlp.down_proj.weight"] @ gate_up[0], rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(x @ params["lm_head"], tensors["lm_head.weight"] @ x, rtol=1e-4, atol=1e-4)


def test_every_logical_axis_has_a_rule() -> None:
    for spec in param_table(TINY):
        assert {axis for axis in spec.axes if axis is not None} <= set(LOGICAL_RULES), spec.path


def test_only_norms_stay_float32() -> None:
    kept = {spec.path for spec in param_table(TINY) if spec.dtype(jnp.bfloat16) == np.float32}
    assert kept == {"final_norm", *(f"layers.{i}.{n}_norm" for i in range(2) for n in ("attention", "mlp"))}


def test_axes_are_split_where_the_mesh_divides_them(caplog: pytest.LogCaptureFixture) -> None:
    axes, shape = ("embed", "kv_heads", None, None), (48, 6, 4, 8)
    assert spec_for(axes, shape, {"tensor": 2}) == P(None, "tensor", None, None)
    assert spec_for(axes, shape, {"tensor": 1}) == P(None, None, None, None)
    assert spec_for(axes, shape, {}) == P(None, None, None, None)
    assert spec_for(("mlp", "embed"), (64, 48), {"data": 2, "tensor": 4}) == P("tensor", None)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert spec_for(("kv_heads", None), (7, 8), {"tensor": 4}) == P(None, None)
    assert [r.getMessage() for r in caplog.records if "size 7" in r.getMessage()] == [
        "axis 'kv_heads' of size 7 does not divide over 4 devices of mesh axis 'tensor': every device keeps all of it"
    ]
