"""What a device group's time goes to: seconds for a prompt of n tokens, seconds for an output token. Measured, fitted.

`preble-jax profile` writes the result; `sched.cost_file` makes the scheduler reckon with it.
"""

from __future__ import annotations

import itertools
import random
import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from kernels_pallas.family_costs import FamilyCosts, family_costs
from preble_jax.engine.engine import Engine
from preble_jax.engine.step_cost_fit import fit_step_costs
from preble_jax.engine.step_probe import StepProber
from preble_jax.progress import Progress
from preble_jax.request import Request
from preble_jax.sampling_params import SamplingParams
from preble_jax.sched.line_fit import fit_line
from preble_jax.sched.step_costs import StepCosts, StepKind
from preble_jax.sched.step_fit import PROFILED_ROWS

PROMPT_TOKENS = (64, 128, 256, 512, 1024, 2048)
BATCHES = (1, 4, int(PROFILED_ROWS), 16)
CONTEXT_TOKENS = 1024
OUTPUT_TOKENS = 24


class Crowd(Protocol):
    """Other device groups of this machine, idle until they are told to compute."""

    def __len__(self) -> int: ...

    def busy(self) -> AbstractContextManager[None]:
        """Inside, all of them compute."""
        ...


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Medians over rounds, seconds. prefill_s: by prompt tokens. decode_step_s: by sequences that decode together, each
    with context_tokens behind it. devices: kinds of the mesh's.

    step_s: by what was in a step; step_costs: fitted to it. crowded_step_s, crowded_step_costs: the same beside
    num_neighbours other groups that were busy. engine: the engine's limits, as preble_jax.sim calls them.
    """

    prefill_s: Mapping[int, float]
    decode_step_s: Mapping[int, float]
    context_tokens: int
    devices: tuple[str, ...] = ()
    step_s: Mapping[StepKind, float] = field(default_factory=dict)
    step_costs: StepCosts | None = None
    crowded_step_s: Mapping[StepKind, float] = field(default_factory=dict)
    crowded_step_costs: StepCosts | None = None
    num_neighbours: int = 0
    engine: Mapping[str, int] = field(default_factory=dict)

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

    def step_errors(self) -> dict[StepKind, float]:
        """Fitted over measured, less 1."""
        return _errors(self.step_costs, self.step_s)

    def crowded_step_errors(self) -> dict[StepKind, float]:
        return _errors(self.crowded_step_costs, self.crowded_step_s)


def _errors(costs: StepCosts | None, step_s: Mapping[StepKind, float]) -> dict[StepKind, float]:
    if costs is None:
        return {}
    return {kind: costs.seconds(kind) / seconds - 1.0 for kind, seconds in step_s.items()}


def measure(engine: Engine, num_rounds: int, progress: Progress, crowd: Crowd | None = None) -> Profile:
    """Runs prompts nobody has cached, and batches that decode. The engine must be idle; what it cached is forgotten.

    Lengths and batches beyond the engine's limits are left out. Rounds are interleaved, so that a machine that is slow
    for a while is slow for all of them. crowd: with any in it, steps are measured beside them, too.
    """
    prober, steps = _Prober(engine), StepProber(engine)
    room = engine.limits.max_model_len - OUTPUT_TOKENS - 1
    pool = engine.cache.pool.num_pages * engine.config.kv.page_size
    context = min(CONTEXT_TOKENS, room, pool // 2)
    prompts = [num for num in PROMPT_TOKENS if num <= min(room, pool)] or [max(1, min(room, pool))]
    batches = [num for num in BATCHES if num <= engine.config.engine.max_num_seqs]
    probes = steps.choose()
    prefill: dict[int, list[float]] = {num: [] for num in prompts}
    decode: dict[int, list[float]] = {num: [] for num in batches}
    step: dict[StepKind, list[float]] = {probe.kind: [] for probe in probes}
    crowded: dict[StepKind, list[float]] = {probe.kind: [] for probe in probes if crowd}
    num_measured = len(prompts) + len(batches) + len(step) + len(crowded)
    for num in prompts:  # what runs for the first time takes longer
        prober.prefill_s(num)
    with progress.task("measuring steps", total=num_rounds * num_measured) as task:
        for _ in range(num_rounds):
            for num in prompts:
                prefill[num].append(prober.prefill_s(num))
                task.advance()
            for num in batches:
                decode[num].append(prober.decode_step_s(num, context))
                task.advance()
            for probe in probes:  # after the others, so that what it caches stays for all of them
                step[probe.kind].append(steps.step_s(probe))
                task.advance()
            if crowd:
                with crowd.busy():
                    for probe in probes:
                        crowded[probe.kind].append(steps.step_s(probe))
                        task.advance()
    engine.reset_prefix_cache()
    step_s, crowded_step_s = _medians(step), _medians(crowded)
    return Profile(
        prefill_s=_medians(prefill),
        decode_step_s=_medians(decode),
        context_tokens=context,
        devices=tuple(device.device_kind for device in engine.runner.mesh.devices.flat),
        step_s=step_s,
        step_costs=_fit(engine, step_s),
        crowded_step_s=crowded_step_s,
        crowded_step_costs=_fit(engine, crowded_step_s) if crowd else None,
        num_neighbours=len(crowd) if crowd else 0,
        engine={
            "prefill_tokens": engine.limits.prefill_tokens,
            "max_prefill_seqs": engine.limits.max_prefill_seqs,
            "max_num_seqs": engine.limits.max_num_seqs,
            "kv_tokens": pool,
        },
    )


def _fit(engine: Engine, step_s: Mapping[StepKind, float]) -> StepCosts:
    shapes = engine.runner.shapes
    costs = family_costs(engine.runner.backend)
    return fit_step_costs(
        step_s,
        decode_slots=shapes.decode_slots,
        prefill_tokens=shapes.prefill_sizes,
        min_sharers=min_sharers(costs) if engine.config.engine.shared_prefix else 0,
        tile=costs.prompt_tile,
    )


def min_sharers(costs: FamilyCosts) -> int:
    """Sequences that decode and share CONTEXT_TOKENS keys, from which on the planner has them read once; 0: never."""
    return next((num for num in range(2, 1024) if costs.saved(float(num), num, CONTEXT_TOKENS) > costs.step), 0)


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


K = TypeVar("K")


def _medians(samples: Mapping[K, Sequence[float]]) -> dict[K, float]:
    return {num: round(statistics.median(values), 6) for num, values in samples.items()}
