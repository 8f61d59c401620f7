"""How much memory reading weights takes at its highest, in a process of its own: at most 1.3 times the weights."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import quantize
from safetensors.numpy import save_file

from fakes.checkpoints import TINY, gguf_metadata, gguf_tensors, write_gguf
from preble_jax import env
from preble_jax.model.params import param_table

ROOT = Path(__file__).resolve().parents[3]
# 202 MB in bfloat16. The two largest parameters are a fifth of it each, as in the default model.
MODEL = replace(
    TINY,
    vocab_size=40_000,
    hidden_size=512,
    intermediate_size=1536,
    num_layers=20,
    num_kv_heads=4,
    head_dim=64,
)
ALLOWED = 1.3
LOAD = """
import json, sys
from pathlib import Path
import jax, jax.numpy as jnp
from preble_jax.model.weights import load_params, open_checkpoint

def kib(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))

jax.block_until_ready(jnp.zeros(8) + 1)
checkpoint = open_checkpoint(sys.argv[1])
Path("/proc/self/clear_refs").write_text("5")  # the highest so far is forgotten
before = kib("VmRSS")
weight_format = "native" if sys.argv[2] == "packed" else sys.argv[2]
params = load_params(checkpoint, None, jnp.bfloat16, weight_format=weight_format, packed=sys.argv[2] == "packed")
checkpoint.close()
peak, after = kib("VmHWM") - before, kib("VmRSS") - before
weights = sum(array.nbytes for array in jax.tree.leaves(params)) / 1024
print(json.dumps({"weights_mib": weights / 1024, "peak": peak / weights, "after": after / weights}))
"""


def tensors() -> dict[str, np.ndarray]:
    """Hugging Face name -> bfloat16; one row of noise for all, because drawing 200 MB takes seconds."""
    noise = np.random.default_rng(0).standard_normal(4096).astype(ml_dtypes.bfloat16)
    return {
        name: np.resize(noise, shape)
        for spec in param_table(MODEL)
        for name, shape in zip(spec.hf, spec.source_shapes, strict=True)
    }


def safetensors_folder(folder: Path) -> Path:
    (folder / "config.json").write_text(json.dumps(MODEL.to_hf()))
    save_file(tensors(), folder / "model.safetensors")
    return folder


def gguf_file(folder: Path) -> Path:
    """Q8_0, norms in float32, as converters write it."""
    blocks, types = {}, {}
    for name, tensor in gguf_tensors(MODEL, tensors()).items():
        values = tensor[:8].astype(np.float32) if tensor.ndim == 2 else tensor.astype(np.float32)
        if tensor.ndim == 2:  # the other rows repeat the first ones: quantising 200 MB takes seconds
            types[name] = GGMLQuantizationType.Q8_0
            values = quantize(values, types[name])
            values = np.resize(values, (tensor.shape[0], values.shape[1]))
        blocks[name] = values
    return write_gguf(folder / "model.gguf", blocks, gguf_metadata(MODEL), types)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc to see a process's peak")
@pytest.mark.parametrize(("weight_format", "least_mib"), [("packed", 180), ("native", 180), ("int8", 90)])
@pytest.mark.parametrize("make", [safetensors_folder, gguf_file])
def test_the_peak_is_bounded_by_the_weights(make, weight_format: str, least_mib: int, tmp_path: Path) -> None:
    child = subprocess.run(
        [sys.executable, "-c", LOAD, str(make(tmp_path)), weight_format],
        env=env.child_environment({"PYTHONPATH": str(ROOT)}),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert child.returncode == 0, child.stderr
    seen = json.loads(child.stdout)
    assert seen["weights_mib"] > least_mib
    assert seen["after"] > 0.95, f"the weights themselves were not seen: {seen}"
    assert seen["peak"] < ALLOWED, seen
