"""Greedy tokens in float32 equal those of Hugging Face transformers on the same weights.

They are compared up to the first step where the oracle itself was undecided: its two best logits closer than 0.02. The
goldens are made by scripts/make_goldens.py.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from preble_jax import LLM, SamplingParams

GOLDENS = Path(__file__).parent.parent / "goldens"
UNDECIDED = 0.02
SMOLLM2 = json.loads((GOLDENS / "smollm2_greedy.json").read_text())["prompts"]
TINY = json.loads((GOLDENS / "tiny_llama3" / "greedy.json").read_text())["prompts"]


def decided(golden):
    """How many leading steps the oracle was sure of."""
    return next((i for i, gap in enumerate(golden["top2_gap"]) if gap < UNDECIDED), len(golden["top2_gap"]))


def check(goldens, outputs):
    for golden, output in zip(goldens, outputs, strict=True):
        steps = decided(golden)
        assert output.token_ids[:steps] == golden["output_token_ids"][:steps], golden["name"]
        if "logprobs" in golden:
            assert output.logprobs[:steps] == pytest.approx(golden["logprobs"][:steps], abs=2e-3), golden["name"]


def generate(llm: LLM, goldens):
    length = len(goldens[0]["output_token_ids"])
    sampling = SamplingParams(temperature=0.0, max_tokens=length, ignore_eos=True, logprobs=True)
    return llm.generate([golden["prompt_token_ids"] for golden in goldens], sampling)


def test_the_goldens_decide_enough():
    assert len(SMOLLM2) >= 16
    assert sum(decided(golden) for golden in SMOLLM2) > 0.6 * sum(len(golden["top2_gap"]) for golden in SMOLLM2)


def test_smollm2_all_at_once(smollm2: LLM):
    """One batch: prompts of 1 to 1,600 tokens, three of which share 1,500."""
    smollm2.reset_prefix_cache()
    outputs = generate(smollm2, SMOLLM2)
    check(SMOLLM2, outputs)
    assert sum(output.cached_tokens for output in outputs) > 2 * 1400


def test_smollm2_from_the_cache(smollm2: LLM):
    generate(smollm2, SMOLLM2)
    outputs = generate(smollm2, SMOLLM2)
    check(SMOLLM2, outputs)
    for output in outputs:
        num_prompt = len(output.prompt_token_ids)
        assert output.cached_tokens == (num_prompt - 1) // 16 * 16


@pytest.mark.parametrize("golden", SMOLLM2[:4], ids=lambda golden: golden["name"])
def test_smollm2_alone(smollm2: LLM, golden):
    smollm2.reset_prefix_cache()
    check([golden], generate(smollm2, [golden]))


def test_llama3_rope_scaling_gqa_and_untied_output(tiny: LLM):
    check(TINY, generate(tiny, TINY))
