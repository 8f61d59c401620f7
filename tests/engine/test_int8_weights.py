"""The engine on int8 weights: the same tokens whatever the batch and the mesh, log-probabilities near native ones."""

from __future__ import annotations

import random

import numpy as np
import pytest

from preble_jax.config import Config
from preble_jax.config_files import from_keywords, load_config, parse_overrides
from preble_jax.errors import ConfigError
from preble_jax.model.quantize import WEIGHT_FORMATS, QuantizedMatrix
from preble_jax.request import Request
from preble_jax.sampling_params import SamplingParams

rng = random.Random(8)
HEAD = [rng.randrange(256) for _ in range(60)]
PROMPTS = [HEAD[: rng.randrange(60)] + [rng.randrange(256) for _ in range(rng.randrange(1, 70))] for _ in range(8)]


def generate(engine, prompts, max_tokens=16):
    """Greedy tokens and their log-probabilities."""
    sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, logprobs=True, ignore_eos=True)
    for i, prompt in enumerate(prompts):
        engine.add(Request(request_id=str(i), prompt_token_ids=prompt, sampling=sampling))
    tokens, logprobs = ({str(i): [] for i in range(len(prompts))} for _ in range(2))
    while engine.has_work:
        for output in engine.step():
            tokens[output.request_id] += output.token_ids
            logprobs[output.request_id] += output.logprobs or []
    return [tokens[str(i)] for i in range(len(prompts))], [logprobs[str(i)] for i in range(len(prompts))]


@pytest.fixture(scope="module")
def alone(make_engine):
    """Each prompt by itself, in decode steps of the smallest bucket."""
    engine = make_engine(weight_format="int8", decode_buckets=(8, 16), prefix_cache=False)
    return [generate(engine, [prompt])[0][0] for prompt in PROMPTS]


@pytest.mark.parametrize("settings", [{}, {"prefill_buckets": (16,), "mesh": {"tensor": 2}}], ids=str)
def test_same_tokens_in_a_batch_in_chunks_and_on_two_devices(make_engine, alone, settings):
    engine = make_engine(weight_format="int8", **settings)
    assert generate(engine, PROMPTS)[0] == alone
    assert isinstance(engine.runner.params["layers"][0]["attention"]["qkv"].get_value(), QuantizedMatrix)
    assert engine.late_compiles == 0


def test_log_probabilities_are_near_native_ones(make_engine):
    tokens, native = generate(make_engine(), PROMPTS, 1)
    int8_tokens, int8 = generate(make_engine(weight_format="int8"), PROMPTS, 1)
    error = np.abs(np.asarray(native) - np.asarray(int8))
    assert 0 < error.max() < 0.02  # random weights: log-probabilities spread by about 0.2
    assert np.mean(np.asarray(tokens) == np.asarray(int8_tokens)) > 0.7


def test_the_setting():
    overrides, _ = parse_overrides(["--config.model.weight_format=int8"])
    assert load_config(None, overrides).model.weight_format == "int8"
    assert Config().model.weight_format == "native"
    for name in WEIGHT_FORMATS:
        assert from_keywords(Config(), weight_format=name).model.weight_format == name
    with pytest.raises(ConfigError, match=r"model\.weight_format: expected one of native, int8, got 'int4'"):
        from_keywords(Config(), weight_format="int4")
