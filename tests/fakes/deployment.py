"""A deployment in one process and one event loop: real servers on loopback, fake engines behind the workers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack

from fakes.engine import FakeEngine
from fakes.tokenizer import byte_tokenizer
from preble_jax.config import Config, KVSettings, ModelSettings, ServeSettings
from serve.client import AsyncClient
from serve.frontend import Frontend
from serve.protos.preble.v1 import scheduler_pb2, scheduler_pb2_grpc
from serve.scheduler import Scheduler
from serve.transport import open_channel
from serve.worker import Worker

CONFIG = Config(
    model=ModelSettings(name="fake"), kv=KVSettings(page_size=4), serve=ServeSettings(report_interval_s=0.02)
)


class Deployment:
    """Use as an async context. engines, workers: by group name.

    scheduler_address: of one that runs elsewhere; None starts one here.
    """

    def __init__(self, num_groups: int = 2, config: Config = CONFIG, scheduler_address: str | None = None) -> None:
        self._config = config
        self._scheduler_address = scheduler_address
        self._stack = AsyncExitStack()
        self.engines = {f"worker-{index}": FakeEngine() for index in range(num_groups)}
        self.workers: dict[str, Worker] = {}

    @property
    def scheduler_address(self) -> str:
        assert self._scheduler_address is not None
        return self._scheduler_address

    async def __aenter__(self) -> Deployment:
        if self._scheduler_address is None:
            self.scheduler = await self._stack.enter_async_context(Scheduler(self._config, 0))
            self._scheduler_address = self.scheduler.address
        for group in self.engines:
            await self.start_worker(group)
        self.frontend = Frontend(byte_tokenizer(), self._config, self.scheduler_address, 0)
        await self._stack.enter_async_context(self.frontend)
        self.client = await self._stack.enter_async_context(AsyncClient(self.frontend.address))
        await self.until_joined(len(self.engines))
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()
        for engine in self.engines.values():
            assert not engine.running, "a request outlived its deployment"

    async def start_worker(self, group: str) -> None:
        worker = Worker(self.engines[group], self._config, group, self.scheduler_address, 0)
        self.workers[group] = await self._stack.enter_async_context(worker)

    async def kill_worker(self, group: str) -> None:
        """As near to SIGKILL as one process allows: its connections break at once."""
        worker = self.workers[group]
        worker._link_task.cancel()
        await worker._server._server.stop(None)

    async def cut_links(self) -> None:
        """The workers go on serving, and say nothing to any scheduler."""
        for worker in self.workers.values():
            worker._link_task.cancel()
        await self.until_state(lambda groups: not groups)

    async def stop_scheduler(self) -> None:
        await self.scheduler.__aexit__()

    async def restart_scheduler(self) -> None:
        """A new one, which knows nothing, at the old one's address."""
        port = int(self.scheduler_address.rpartition(":")[2])
        self.scheduler = await self._stack.enter_async_context(Scheduler(self._config, port))

    async def state(self) -> dict[str, scheduler_pb2.GroupState]:
        async with open_channel(self.scheduler_address) as channel:
            request = scheduler_pb2.GetStateRequest()
            state = await scheduler_pb2_grpc.SchedulerStub(channel).GetState(request, wait_for_ready=True)
        return {group.hello.group.group: group for group in state.groups}

    async def until_joined(self, num_groups: int) -> None:
        await self.until_state(lambda groups: len(groups) == num_groups)
        await until(lambda: len(self.frontend._router.groups) >= num_groups)

    async def until_state(self, holds: Callable[[dict[str, scheduler_pb2.GroupState]], bool]) -> None:
        for _ in range(500):
            if holds(await self.state()):
                return
            await asyncio.sleep(0.01)
        raise AssertionError(f"the scheduler's state never became as expected: {await self.state()}")

    @property
    def running(self) -> dict[str, str]:
        """{request id: group} of what runs now."""
        return {request: group for group, engine in self.engines.items() for request in engine.running}


async def until(holds: Callable[[], bool], timeout_s: float = 5.0) -> None:
    """Returns as soon as `holds()`; AssertionError when it never does."""
    try:
        async with asyncio.timeout(timeout_s):
            while not holds():
                await asyncio.sleep(0.005)
    except TimeoutError:
        raise AssertionError("what was waited for did not happen") from None
