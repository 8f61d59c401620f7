"""The engine with weights packed for the CPU's kernels: tokens do not depend on the batch, nor differ from XLA's."""

from __future__ import annotations

import numpy as np
import pytest

from kernels_pallas.cpu.usable import has_wide_registers, usable
from preble_jax.model.packed import PackedMatrix
from preble_jax.request import Request
from preble_jax.sampling_params import SamplingParams

pytestmark = pytest.mark.skipif(not (usable() and has_wide_registers()), reason="the processor has no such kernels")

PROMPTS = [list(range(start, start + size)) for start, size in ((1, 3), (30, 17), (60, 40), (100, 33), (7, 1))]


def generate(engine, prompts, max_tokens):
    sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, logprobs=True)
    for i, prompt in enumerate(prompts):
        engine.add(Request(request_id=str(i), prompt_token_ids=prompt, sampling=sampling))
    made = {str(i): ([], []) for i in range(len(prompts))}
    while engine.has_work:
        for output in engine.step():
            for whole, part in zip(made[output.request_id], (output.token_ids, output.logprobs), strict=True):
                whole += part
    return [made[str(i)] for i in range(len(prompts))]


def test_tokens_are_the_same_alone_in_a_batch_and_near_those_of_xla(make_engine):
    engine = make_engine(dtype="bfloat16", prefix_cache=False)
    assert isinstance(engine.runner.params["layers"][0]["mlp"]["down"].get_value(), PackedMatrix)
    together = generate(engine, PROMPTS, 8)
    assert together == [generate(engine, [prompt], 8)[0] for prompt in PROMPTS]
    plain = make_engine(dtype="bfloat16", cpu_kernels="off")
    assert not isinstance(plain.runner.params["layers"][0]["mlp"]["down"].get_value(), PackedMatrix)
    first = [np.array([logprobs[0] for _, logprobs in made]) for made in (together, generate(plain, PROMPTS, 1))]
    np.testing.assert_allclose(first[0], first[1], rtol=0, atol=0.01)
