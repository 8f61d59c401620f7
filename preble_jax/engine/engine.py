"""One device group: continuous batching of ragged steps over one model."""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass

import jax.numpy as jnp

from preble_jax import env
from preble_jax.config import Config
from preble_jax.engine.compile_cache import enable_compile_cache, num_compiles
from preble_jax.engine.ledger import Ledger, StepTimes
from preble_jax.engine.runner import Dispatched, ModelRunner, make_mesh
from preble_jax.kv.prefix_cache import PrefixCache
from preble_jax.model import registry
from preble_jax.model.packed import can_pack
from preble_jax.model.weights import load_params, open_checkpoint
from preble_jax.progress import NullProgress, Progress
from preble_jax.request import FinishReason, Request, RequestOutput
from preble_jax.sched.limits import StepLimits
from preble_jax.sched.local_scheduler import LocalScheduler
from preble_jax.sched.queues import make_queue
from preble_jax.sched.sequence import StepPlan


class Engine:
    """Not thread safe: one thread adds, steps and cancels. `EngineService` gives it a thread and an asyncio face.

    ledger: what was done since the engine started.
    late_compiles: programs this process compiled after the engine was ready; if the engine's, a defect.
    """

    def __init__(
        self, config: Config, runner: ModelRunner, vocab_size: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.config = config
        self.runner = runner
        self.clock = clock
        self.ledger = Ledger()
        self.late_compiles = 0
        self._num_compiles = num_compiles()
        self._in_flight: _InFlight | None = None
        self._ready_at = -math.inf  # when the last results came
        self.cache = PrefixCache(
            runner.num_pages, config.kv.page_size, enabled=config.kv.prefix_cache, generation=time.time_ns()
        )
        self.limits = StepLimits(
            vocab_size=vocab_size,
            max_model_len=runner.max_model_len,
            prefill_tokens=runner.shapes.prefill_tokens,
            max_prefill_seqs=config.engine.max_prefill_seqs,
            max_num_seqs=config.engine.max_num_seqs,
            max_waiting=config.queue.max_waiting,
        )
        self.scheduler = LocalScheduler(self.limits, self.cache, make_queue(config.queue, config.tenants))

    @classmethod
    def create(cls, config: Config, progress: Progress | None = None) -> Engine:
        """Finds (and fetches) the model, reads its weights, compiles every step. Raises PrebleError."""
        progress = progress or NullProgress()
        enable_compile_cache(env.cache_dir())
        mesh = make_mesh(config.mesh.tensor)
        checkpoint = open_checkpoint(registry.resolve(config.model.name, progress))
        try:
            model = checkpoint.model_config
            dtype = jnp.dtype(config.model.dtype)
            weight_format = config.model.weight_format
            packed = env.cpu_kernels(config.engine.cpu_kernels) and can_pack(dtype, mesh, weight_format)
            params = load_params(checkpoint, mesh, dtype, progress, weight_format, packed=packed)
        finally:
            checkpoint.close()
        runner = ModelRunner(config, model, params, mesh)
        runner.compile(progress)
        return cls(config, runner, model.vocab_size)

    @property
    def has_work(self) -> bool:
        return self.scheduler.num_unfinished > 0 or self._in_flight is not None

    def add(self, request: Request) -> None:
        """Queues a request. Raises InvalidRequestError, PromptTooLongError or OverloadedError."""
        seed = request.sampling.seed
        self.scheduler.add(request, self.clock(), secrets.randbits(32) if seed is None else seed)

    def cancel(self, request_id: str, reason: FinishReason = "cancelled") -> RequestOutput | None:
        """Ends a request between two steps and frees its pages. None if it has ended already."""
        return self.scheduler.cancel(request_id, reason)

    def step(self) -> list[RequestOutput]:
        """One iteration: plan and dispatch; then wait for what was dispatched before, which ran meanwhile, and settle
        it. The first of all dispatches has none before it, and its outputs come from the next call."""
        before, now = self._in_flight, self.clock()
        outputs = self.scheduler.expire(now)
        plan = self.scheduler.schedule(now, self._max_steps())
        self._in_flight = None if plan is None else self._dispatch(plan, now)
        return outputs if before is None else outputs + self._settle(before)

    def drain(self) -> list[RequestOutput]:
        """Waits for what the device works on and settles it; nothing new is planned."""
        before, self._in_flight = self._in_flight, None
        return [] if before is None else self._settle(before)

    def reset_prefix_cache(self) -> bool:
        """Forgets all cached pages that no running request uses. True if nothing is cached any more."""
        return self.cache.clear()

    def _max_steps(self) -> int:
        """Decode steps in a dispatch. A request that comes while one runs waits for it and for the one behind it."""
        settings, step_s = self.config.engine, self.ledger.decode_step_s
        if not step_s:
            return 1
        return max(1, min(settings.decode_steps, int(settings.max_dispatch_s / (2 * step_s))))

    def _dispatch(self, plan: StepPlan, began: float) -> _InFlight:
        planned = self.clock()
        self.ledger.planned(plan, began)
        vector = self.runner.build(plan)
        built = self.clock()
        dispatched = self.runner.dispatch(plan, vector)
        self.scheduler.started(plan)
        done = self.clock()
        self.late_compiles = num_compiles() - self._num_compiles
        times = StepTimes(plan_s=planned - began, arrays_s=built - planned, dispatch_s=done - built)
        return _InFlight(dispatched, times, began, done)

    def _settle(self, step: _InFlight) -> list[RequestOutput]:
        times, asked = step.times, self.clock()
        tokens, logprobs, num_steps = self.runner.results(step.dispatched)
        ready = self.clock()
        outputs = self.scheduler.settle(step.dispatched.plan, tokens, logprobs)
        times.wait_s = ready - asked
        times.device_s = ready - max(step.dispatched_at, self._ready_at)
        times.step_s = ready - max(step.began, self._ready_at)
        times.settle_s = self.clock() - ready
        self._ready_at = ready
        self.ledger.ran(step.dispatched.plan, outputs, num_steps, times)
        return outputs


@dataclass
class _InFlight:
    """began, dispatched_at: when it was planned, and when the device had it."""

    dispatched: Dispatched
    times: StepTimes
    began: float
    dispatched_at: float
