"""One device group: continuous batching of ragged steps over one model."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable

import jax.numpy as jnp

from preble_jax import env
from preble_jax.config import Config
from preble_jax.engine.compile_cache import enable_compile_cache, num_compiles
from preble_jax.engine.ledger import Ledger
from preble_jax.engine.runner import ModelRunner, make_mesh
from preble_jax.kv.prefix_cache import PrefixCache
from preble_jax.model import registry
from preble_jax.model.weights import load_params, open_checkpoint
from preble_jax.progress import NullProgress, Progress
from preble_jax.request import FinishReason, Request, RequestOutput
from preble_jax.sched.limits import StepLimits
from preble_jax.sched.local_scheduler import LocalScheduler
from preble_jax.sched.queues import make_queue


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
            params = load_params(checkpoint, mesh, jnp.dtype(config.model.dtype), progress)
        finally:
            checkpoint.close()
        runner = ModelRunner(config, model, params, mesh)
        runner.compile(progress)
        return cls(config, runner, model.vocab_size)

    @property
    def has_work(self) -> bool:
        return self.scheduler.num_unfinished > 0

    def add(self, request: Request) -> None:
        """Queues a request. Raises InvalidRequestError, PromptTooLongError or OverloadedError."""
        seed = request.sampling.seed
        self.scheduler.add(request, self.clock(), secrets.randbits(32) if seed is None else seed)

    def cancel(self, request_id: str, reason: FinishReason = "cancelled") -> RequestOutput | None:
        """Ends a request between two steps and frees its pages. None if it has ended already."""
        return self.scheduler.cancel(request_id, reason)

    def step(self) -> list[RequestOutput]:
        """One iteration: schedule, run, settle."""
        start = self.clock()
        outputs = self.scheduler.expire(start)
        plan = self.scheduler.schedule(start)
        if plan is not None:
            self.ledger.planned(plan, start)
            tokens, logprobs = self.runner.run(plan)
            outputs += self.scheduler.settle(plan, tokens, logprobs, self.clock())
            self.ledger.ran(plan, outputs, self.clock() - start)
            self.late_compiles = num_compiles() - self._num_compiles
        return outputs

    def reset_prefix_cache(self) -> bool:
        """Forgets all cached pages that no running request uses. True if nothing is cached any more."""
        return self.cache.clear()
