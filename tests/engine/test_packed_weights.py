"""The engine with weights packed for the CPU's kernels; that their tokens are the reference's the goldens say."""

from __future__ import annotations

import pytest

from kernels_pallas.cpu.usable import has_wide_registers, usable
from preble_jax.model.packed import PackedMatrix
from preble_jax.model.packed_int8 import PackedInt8Matrix
from preble_jax.request import Request
from preble_jax.sampling_params import SamplingParams

pytestmark = pytest.mark.skipif(not (usable() and has_wide_registers()), reason="the processor has no such kernels")

PROMPTS = [list(range(start, start + size)) for start, size in ((1, 3), (30, 17), (60, 40), (100, 33), (7, 1))]


def generate(engine, prompts):
    sampling = SamplingParams(temperature=0.0, max_tokens=8, logprobs=True)
    for i, prompt in enumerate(prompts):
        engine.add(Request(request_id=str(i), prompt_token_ids=prompt, sampling=sampling))
    made = {str(i): ([], []) for i in range(len(prompts))}
    while engine.has_work:
        for output in engine.step():
            for whole, part in zip(made[output.request_id], (output.token_ids, output.logprobs), strict=True):
                whole += part
    return [made[str(i)] for i in range(len(prompts))]


@pytest.mark.parametrize(("weight_format", "kind"), [("native", PackedMatrix), ("int8", PackedInt8Matrix)])
def test_tokens_do_not_depend_on_the_batch(make_engine, weight_format, kind):
    engine = make_engine(dtype="bfloat16", weight_format=weight_format, prefix_cache=False)
    assert type(engine.runner.params["layers"][0]["mlp"]["down"].get_value()) is kind
    together = generate(engine, PROMPTS)
    assert together == [generate(engine, [prompt])[0] for prompt in PROMPTS]
