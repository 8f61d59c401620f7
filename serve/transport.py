"""Channels and servers as every process of a deployment opens them."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from preble_jax.errors import ConfigError

_MIB = 1 << 20

# A restarted peer is found within a second, and a machine that vanished without a word within half a minute.
_OPTIONS: list[tuple[str, Any]] = [
    ("grpc.max_receive_message_length", 64 * _MIB),
    ("grpc.max_send_message_length", 64 * _MIB),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.enable_http_proxy", 0),
]
# Without this Linux lets a second server share a port that is taken, and each gets a part of the calls.
_SERVER_OPTIONS = [*_OPTIONS, ("grpc.so_reuseport", 0)]

Serving = health_pb2.HealthCheckResponse.ServingStatus


def open_channel(address: str) -> grpc.aio.Channel:
    """address: host:port. Connects when first used; plain text, for a trusted network."""
    return grpc.aio.insecure_channel(address, options=_OPTIONS)


def open_sync_channel(address: str) -> grpc.Channel:
    """`open_channel` for callers without an event loop."""
    return grpc.insecure_channel(address, options=_OPTIONS)


class Server:
    """A grpc.aio server with health and reflection. Not serving until `set_serving`.

    add: the `add_...Servicer_to_server` functions, each bound to its servicer.
    """

    def __init__(self, services: Sequence[str], add: Sequence[Callable[[grpc.aio.Server], None]]) -> None:
        self._services = services
        self._server = grpc.aio.server(options=_SERVER_OPTIONS)
        self._health = health.aio.HealthServicer()
        for register in add:
            register(self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection(
            [*services, health.SERVICE_NAME, reflection.SERVICE_NAME],
            self._server,
        )
        self.address = ""

    async def start(self, host: str, port: int, setting: str) -> str:
        """Listens, and returns host:port. Port 0 lets the system choose.

        setting: the configuration key of the port, for the message of the `ConfigError` raised when it is taken.
        """
        require_free_port(host, port, setting)
        await self.set_serving(False)
        bound = self._server.add_insecure_port(f"{host}:{port}")
        await self._server.start()
        self.address = f"{host}:{bound}"
        return self.address

    async def set_serving(self, serving: bool) -> None:
        status = Serving.Value("SERVING" if serving else "NOT_SERVING")
        for service in ("", *self._services):
            await self._health.set(service, status)

    async def stop(self, grace_s: float = 0.0) -> None:
        """Refuses new calls, lets running ones finish for `grace_s`, then cancels them."""
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace_s)


def require_free_port(host: str, port: int, setting: str) -> None:
    """Raises `ConfigError` if this machine cannot listen on host:port. Cheap: done before anything slow is started."""
    if not 0 <= port <= 65_535:
        raise ConfigError(f"{setting}: expected a port in [0, 65535], got {port}")
    try:
        socket.getaddrinfo(host, None, socket.AF_INET)
        with socket.create_server((host, port)):
            pass
    except socket.gaierror as error:
        raise ConfigError(
            f"serve.host: expected an IPv4 address or host name of this machine, got {host!r} ({error.strerror})"
        ) from error
    except OSError as error:
        raise ConfigError(
            f"{setting}: expected an address to listen on, got {host}:{port}, which is taken or not this machine's "
            f"({error.strerror or error}); stop what listens there, or choose another with "
            f"--config.{setting}=PORT (0: any free one)"
        ) from error


def announce(address: str, file: Path | None) -> None:
    """Tells where a server listens: on the log, and in `file` (complete or not there) for whoever launched it."""
    print(f"listening on {address}", file=sys.stderr, flush=True)
    if file is not None:
        partial = file.with_name(file.name + ".partial")
        partial.write_text(address)
        os.replace(partial, file)


def stop_event() -> asyncio.Event:
    """Set by SIGTERM and SIGINT, in place of their usual effect."""
    loop, event = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, event.set)
    return event


async def first_of(*events: asyncio.Event) -> None:
    """Returns when one of the events is set."""
    waiting = [asyncio.create_task(event.wait()) for event in events]
    await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    for task in waiting:
        task.cancel()


def exit_with_parent() -> None:
    """From now on the end of standard input is a SIGTERM: a launcher that dies, however it dies, closes its pipes."""

    def watch() -> None:
        while os.read(sys.stdin.fileno(), 4096):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="exit-with-parent", daemon=True).start()
