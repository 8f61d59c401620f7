"""Health, reflection, and ports that are taken."""

from __future__ import annotations

import asyncio
import socket
from contextlib import closing

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from fakes.deployment import CONFIG, Deployment, until
from fakes.tokenizer import byte_tokenizer
from preble_jax.errors import ConfigError
from serve.frontend import Frontend
from serve.scheduler import Scheduler
from serve.transport import Server, open_channel, require_free_port

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


async def health_of(address: str, service: str = "") -> int:
    async with open_channel(address) as channel:
        request = health_pb2.HealthCheckRequest(service=service)
        return int((await health_pb2_grpc.HealthStub(channel).Check(request)).status)


async def services_of(address: str) -> set[str]:
    async with open_channel(address) as channel:
        call = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo()
        await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
        answer = await call.read()
        call.cancel()
    return {service.name for service in answer.list_services_response.service}


async def test_every_process_answers_health_and_reflection(deployment: Deployment) -> None:
    for address, service in (
        (deployment.frontend.address, "preble.v1.Inference"),
        (deployment.scheduler.address, "preble.v1.Scheduler"),
        (deployment.workers["worker-0"].address, "preble.v1.Worker"),
    ):
        assert await health_of(address) == SERVING
        assert await health_of(address, service) == SERVING
        assert await services_of(address) >= {service, "grpc.health.v1.Health"}


async def test_a_frontend_is_not_healthy_before_it_knows_a_group() -> None:
    async with Scheduler(CONFIG, 0) as scheduler, Frontend(byte_tokenizer(), CONFIG, scheduler.address, 0) as frontend:
        assert await health_of(frontend.address) == NOT_SERVING


async def test_a_frontend_is_unhealthy_once_its_last_group_is_gone(
    deployment: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    router = deployment.frontend._router
    monkeypatch.setattr(router, "_forget_s", 0.0)
    monkeypatch.setattr(router, "_poll_s", 0.01)
    for group in tuple(deployment.workers):
        assert await health_of(deployment.frontend.address) == SERVING
        await deployment.kill_worker(group)
    await until(lambda: not router.groups)
    assert await health_of(deployment.frontend.address) == NOT_SERVING
    await deployment.start_worker("worker-0")
    await until(lambda: bool(router.groups))
    assert await health_of(deployment.frontend.address) == SERVING


async def test_a_server_that_stops_says_so_first() -> None:
    server = Server(["preble.v1.Inference"], [])
    address = await server.start("127.0.0.1", 0, "serve.frontend_port")
    await server.set_serving(True)
    seen: list[int] = []

    async def watch() -> None:
        async with open_channel(address) as channel:
            async for answer in health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest()):
                seen.append(answer.status)

    watcher = asyncio.create_task(watch())
    await until(lambda: seen == [SERVING])
    await server.stop(1.0)
    assert seen[-1] == NOT_SERVING
    watcher.cancel()


async def test_a_port_that_is_taken_is_a_clear_error() -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"serve\.scheduler_port.*127\.0\.0\.1:{port}.*taken.*PORT"):
            async with Scheduler(CONFIG, port):
                pass


async def test_two_servers_never_share_a_port() -> None:
    async with Scheduler(CONFIG, 0) as first:
        port = int(first.address.rpartition(":")[2])
        with pytest.raises(ConfigError, match="taken"):
            async with Scheduler(CONFIG, port):
                pass


def test_an_address_of_another_machine_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"not this machine's"):
        require_free_port("192.0.2.1", 0, "serve.worker_port")
