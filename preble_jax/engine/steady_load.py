"""Work without end for an engine: what a busy device group does, for measuring another one beside it."""

from __future__ import annotations

import itertools
import random

from preble_jax.engine.engine import Engine
from preble_jax.request import Request
from preble_jax.sampling_params import SamplingParams

NUM_REQUESTS, PROMPT_TOKENS, OUTPUT_TOKENS = 3, 256, 16


class SteadyLoad:
    """So many requests at a time, each with a prompt that nobody has cached: prompts take about two thirds of the
    time, decoding the rest. Uses an idle engine alone."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._random = random.Random(0)
        self._numbers = itertools.count()
        limits, pool = engine.limits, engine.cache.pool.num_pages * engine.config.kv.page_size
        room = min(limits.max_model_len, pool // NUM_REQUESTS - engine.config.kv.page_size)
        self._num_prompt = max(1, min(PROMPT_TOKENS, room - OUTPUT_TOKENS))

    def step(self) -> None:
        """One dispatch, of requests in every state."""
        engine = self._engine
        while engine.scheduler.num_unfinished < NUM_REQUESTS:
            prompt = [self._random.randrange(engine.limits.vocab_size) for _ in range(self._num_prompt)]
            sampling = SamplingParams(temperature=0.0, max_tokens=OUTPUT_TOKENS, ignore_eos=True)
            engine.add(Request(request_id=f"load-{next(self._numbers)}", prompt_token_ids=prompt, sampling=sampling))
        engine.step()

    def rest(self) -> None:
        """What the device still works on is waited for; nothing runs afterwards until the next step."""
        self._engine.drain()
