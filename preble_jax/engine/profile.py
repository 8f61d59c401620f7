"""What a device group's time goes to: seconds for a prompt of n tokens, seconds for an output token. Measured, fitted.

`preble-jax profile` writes the result; `sched.cost_file` makes the scheduler reckon with it.
"""

from __future__ import annotations

import itertools
import random
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from preble_jax.engine.engine import Engine
from preble_jax.progress import Progress
from preble_jax.request import Request
from preble_jax.sampling_params import SamplingParams
from preble_jax.sched.step_fit import PROFILED_ROWS

PROMPT_TOKENS = (64, 128, 256, 512, 1024, 2048)
BATCHES = (1, 4, int(PROFILED_ROWS), 16)
CONTEXT_TOKENS = 1024
OUTPUT_TOKENS = 24


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Medians over rounds, seconds. prefill_s: by prompt tokens. decode_step_s: by sequences that decode together, each
    with context_tokens behind it. devices: kinds of the mesh's."""

    prefill_s: Mapping[int, float]
    decode_step_s: Mapping[int, float]
    context_tokens: int
    devices: tuple[str, ...] = ()

    def costs(self) -> dict[str, float]:
        """The settings of the sched section that it amounts to."""
        base_s, token_s = fit_line(self.prefill_s)
        rows = min(self.decode_step_s, key=lambda batch: abs(batch - PROFILED_ROWS))
        return {
            "prefill_base_s": round(base_s, 6),
            "prefill_token_s": round(token_s, 8),
            "decode_token_s": round(self.decode_step_s[rows] / rows, 8),
        }

    def prefill_errors(self) -> dict[int, float]:
        """By prompt tokens: fitted over measured, less 1. Attention makes long prompts dearer than a line says."""
        base_s, token_s = fit_line(self.prefill_s)
        return {num: (base_s + token_s * num) / seconds - 1.0 for num, seconds in self.prefill_s.items()}


def measure(engine: Engine, num_rounds: int, progress: Progress) -> Profile:
    """Runs prompts nobody has cached, and batches that decode. The engine must be idle; what it cached is forgotten.

    Lengths and batches beyond the engine's limits are left out. Rounds are interleaved, so that a machine that is slow
    for a while is slow for all of them.
    """
    prober = _Prober(engine)
    room = engine.limits.max_model_len - OUTPUT_TOKENS - 1
    pool = engine.cache.pool.num_pages * engine.config.kv.page_size
    context = min(CONTEXT_TOKENS, room, pool // 2)
    prompts = [num for num in PROMPT_TOKENS if num <= min(room, pool)] or [max(1, min(room, pool))]
    batches = [num for num in BATCHES if num <= engine.config.engine.max_num_seqs]
    prefill: dict[int, list[float]] = {num: [] for num in prompts}
    decode: dict[int, list[float]] = {num: [] for num in batches}
    with progress.task("measuring steps", total=num_rounds * (len(prompts) + len(batches))) as task:
        for _ in range(num_rounds):
            for num in prompts:
                prefill[num].append(prober.prefill_s(num))
                task.advance()
            for num in batches:
                decode[num].append(prober.decode_step_s(num, context))
                task.advance()
    engine.reset_prefix_cache()
    return Profile(
        prefill_s=_medians(prefill),
        decode_step_s=_medians(decode),
        context_tokens=context,
        devices=tuple(device.device_kind for device in engine.runner.mesh.devices.flat),
    )


class _Prober:
    """Runs requests of random tokens on an engine and times them."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._random = random.Random(0)
        self._numbers = itertools.count()

    def prefill_s(self, num_tokens: int) -> float:
        """A prompt up to its first token."""
        self._add(self._tokens(num_tokens), 1)
        start = time.perf_counter()
        while self._engine.has_work:
            self._engine.step()
        return time.perf_counter() - start

    def decode_step_s(self, batch: int, context: int) -> float:
        """Median step in which `batch` sequences decode; they share their context's pages."""
        prefix = self._tokens(context - 1)
        for _ in range(batch):
            self._add([*prefix, *self._tokens(1)], OUTPUT_TOKENS)
        ledger, steps = self._engine.ledger, []
        while self._engine.has_work:
            num_steps, rows, seconds = ledger.steps, ledger.decode_rows, ledger.step_s
            self._engine.step()
            num_steps = ledger.steps - num_steps
            if num_steps and ledger.decode_rows - rows == num_steps * batch:
                steps.append((ledger.step_s - seconds) / num_steps)
        return statistics.median(steps)

    def _tokens(self, num: int) -> list[int]:
        return [self._random.randrange(self._engine.limits.vocab_size) for _ in range(num)]

    def _add(self, prompt: Sequence[int], max_tokens: int) -> None:
        sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
        self._engine.add(
            Request(request_id=f"profile-{next(self._numbers)}", prompt_token_ids=list(prompt), sampling=sampling)
        )


def _medians(samples: Mapping[int, Sequence[float]]) -> dict[int, float]:
    return {num: round(statistics.median(values), 6) for num, values in samples.items()}


def fit_line(points: Mapping[int, float]) -> tuple[float, float]:
    """(base, slope): least squares of relative errors, base at least 0. A single point is all slope."""
    weights = {x: 1 / y**2 for x, y in points.items()}
    total = sum(weights.values())
    mean_x = sum(w * x for x, w in weights.items()) / total
    mean_y = sum(weights[x] * y for x, y in points.items()) / total
    spread = sum(w * (x - mean_x) ** 2 for x, w in weights.items())
    slope = sum(weights[x] * (x - mean_x) * (y - mean_y) for x, y in points.items()) / spread if spread else 0.0
    if slope > 0.0 and mean_y > slope * mean_x:
        return mean_y - slope * mean_x, slope
    # The line through 0 that is best in the same sense.
    return 0.0, sum(weights[x] * x * y for x, y in points.items()) / sum(w * x * x for x, w in weights.items())
