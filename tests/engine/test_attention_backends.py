"""The engine on the Pallas kernels, interpreted: the same tokens as on jnp, from families, chunks and single tokens.

pytest --backend tpu-interpret tests/engine     runs the engine's other tests that take their engine from `make_engine`
on that backend, with a model and pages of sizes that it serves; tests that ask for other sizes are skipped. It is slow
in an interpreter: -k picks some.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.families import FamilyPlanner, SharedPrefixes
from kernels_pallas.family_costs import COSTS, FamilyCosts
from preble_jax.config import Config
from preble_jax.config_files import from_keywords
from preble_jax.engine.engine import Engine
from preble_jax.engine.runner import ModelRunner, make_mesh
from preble_jax.model.config import ModelConfig
from preble_jax.model.weights import random_params
from preble_jax.progress import NullProgress, Progress
from preble_jax.request import Request
from preble_jax.sampling_params import SamplingParams

MODEL = ModelConfig(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=64,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    max_position=256,
    tie_embeddings=False,
)
ALWAYS = FamilyCosts(prompt_tile=1, prompt_pass=1.0, family_tile=1, family_pass=0.01, row=0, family=0, step=0)


@pytest.fixture
def quick_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs of the engine are compiled as they are: most of the time here is XLA's, with the interpreter's loops."""
    compile_all = ModelRunner.compile

    def compile_quickly(runner: ModelRunner, progress: Progress) -> None:
        jax.config.update("jax_disable_most_optimizations", True)
        try:
            compile_all(runner, progress)
        finally:
            jax.config.update("jax_disable_most_optimizations", False)

    monkeypatch.setattr(ModelRunner, "compile", compile_quickly)


@cache
def weights() -> Any:
    return random_params(MODEL, 3, jnp.dtype("bfloat16"), make_mesh(1))


def generate(backend: str, prompts: list[list[int]], num_tokens: int) -> list[tuple[list[int], list[float]]]:
    config = from_keywords(
        Config(),
        attention=backend,
        dtype="bfloat16",
        page_size=16,
        num_pages=64,
        max_num_seqs=8,
        prefill_buckets=(32,),
        max_prefill_seqs=2,
    )
    runner = ModelRunner(config, MODEL, weights(), make_mesh(1))
    runner.compile(NullProgress())
    engine = Engine(config, runner, MODEL.vocab_size)
    sampling = SamplingParams(max_tokens=num_tokens, temperature=0.0, logprobs=True)
    for i, prompt in enumerate(prompts):
        engine.add(Request(request_id=str(i), prompt_token_ids=prompt, sampling=sampling))
    made: list[tuple[list[int], list[float]]] = [([], []) for _ in prompts]
    while engine.has_work:
        for output in engine.step():
            tokens, logprobs = made[int(output.request_id)]
            tokens += output.token_ids
            logprobs += output.logprobs
    return made


def check_against_jnp(backend: str, prompts: list[list[int]], num_tokens: int) -> None:
    for (tokens, logprobs), (expected, expected_logprobs) in zip(
        generate(backend, prompts, num_tokens), generate("jnp", prompts, num_tokens), strict=True
    ):
        assert tokens == expected
        np.testing.assert_allclose(logprobs, expected_logprobs, atol=2e-2)


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> list[tuple[FamilyCosts, int]]:
    """Families always pay on the kernels; every step's costs and number of families."""
    for name in ("tpu", "gpu"):
        monkeypatch.setitem(COSTS, name, ALWAYS)
    plan, steps = FamilyPlanner.plan, list[tuple[FamilyCosts, int]]()

    def recorded(planner: FamilyPlanner, *args: Any, **how: Any) -> SharedPrefixes:
        shared = plan(planner, *args, **how)
        steps.append((planner.costs, int(shared.num_families[0])))
        return shared

    monkeypatch.setattr(FamilyPlanner, "plan", recorded)
    return steps


@pytest.mark.usefixtures("quick_compiles")
def test_tpu_kernels_make_the_tokens_of_jnp(planned: list[tuple[FamilyCosts, int]]) -> None:
    head = [(7 * i) % 250 for i in range(40)]
    check_against_jnp("tpu-interpret", [[*head, i, 5, 9 * i] for i in range(3)], num_tokens=4)
    assert max(num for costs, num in planned if costs is ALWAYS) > 0, "no step of the kernels had a family"


@pytest.mark.usefixtures("quick_compiles")
def test_gpu_kernels_make_the_tokens_of_jnp(request: pytest.FixtureRequest) -> None:
    if not request.config.getoption("--backend").startswith("gpu"):
        pytest.skip("half a minute in the interpreter: run with --backend gpu-interpret")
    check_against_jnp("gpu-interpret", [[(7 * i) % 250 for i in range(20)]], num_tokens=2)
