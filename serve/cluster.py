"""A whole deployment on this machine: scheduler, workers and frontend as child processes.

with Cluster("local", {"serve.groups": "2"}) as cluster:
    Client(cluster.frontend_address).generate(...)
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from preble_jax.config_files import load_config
from preble_jax.env import cache_dir
from preble_jax.errors import ConfigError, GroupUnavailableError, PrebleError
from preble_jax.model.registry import resolve
from preble_jax.progress import Progress, make_progress
from serve.children import Child
from serve.cores import cores_by_group
from serve.protos.preble.v1 import scheduler_pb2, scheduler_pb2_grpc
from serve.status import transport_errors
from serve.transport import Serving, open_sync_channel, require_free_port

POLL_S = 0.1
RPC_TIMEOUT_S = 2.0
KEPT_RUNS = 20


class Cluster:
    """Use as a context: inside, everything is up and healthy; afterwards, everything is gone.

    config_file, overrides: as for `load_config`; the children are given the same.
    run_dir: folder for logs and addresses, made if missing; default: a new one in the cache folder.
    echo: shows a line to the user. Children's lines are echoed until the cluster is up.
    Entering raises `PrebleError` with a child's own message when one fails to start.
    """

    def __init__(
        self,
        config_file: str | None = None,
        overrides: Mapping[str, str] | None = None,
        *,
        run_dir: Path | None = None,
        progress: Progress | None = None,
        echo: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True),
    ) -> None:
        self._overrides = dict(overrides or {})
        self.config = load_config(config_file, self._overrides)
        self._config_arguments = [
            *(["--config", config_file] if config_file is not None else []),
            *(f"--config.{key}={value}" for key, value in self._overrides.items()),
        ]
        self.run_dir = new_run_dir() if run_dir is None else run_dir
        self._progress = make_progress() if progress is None else progress
        self._echo = echo
        self._starting = True
        self.children: dict[str, Child] = {}
        self.scheduler_address = ""
        self.frontend_address = ""

    @property
    def groups(self) -> list[str]:
        return [f"worker-{index}" for index in range(self.config.serve.groups)]

    def __enter__(self) -> Cluster:
        self._require_free_ports()
        resolve(self.config.model.name, self._progress)  # before the children do, which would fetch it all at once
        try:
            self.run_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"{self.run_dir}: expected a folder for logs that can be made: {error.strerror}"
            ) from error
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        self._starting = False
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Ends all children. Safe to call twice."""
        self._starting = False
        for child in self.children.values():
            child.terminate()
        for child in self.children.values():
            child.stop()

    def dead(self) -> list[Child]:
        """Children that ended though nobody asked them to."""
        return [child for child in self.children.values() if not child.running]

    def _require_free_ports(self) -> None:
        serve = self.config.serve
        require_free_port(serve.host, serve.frontend_port, "serve.frontend_port")
        require_free_port(serve.host, serve.scheduler_port, "serve.scheduler_port")
        for index in range(serve.groups):
            require_free_port(serve.host, self._worker_port(index), "serve.worker_port")

    def _worker_port(self, index: int) -> int:
        first = self.config.serve.worker_port
        return first + index if first else 0

    def _start(self) -> None:
        deadline = time.monotonic() + self.config.serve.start_timeout_s
        self._echo(f"starting a scheduler, a frontend and {len(self.groups)} device groups; logs in {self.run_dir}")
        self._launch("scheduler", "scheduler")
        self.scheduler_address = self._wait_address("scheduler", deadline)
        link = ["--scheduler", self.scheduler_address]
        self._launch("frontend", "frontend", *link)
        cores = cores_by_group(len(self.groups))
        for index, group in enumerate(self.groups):
            pin = ["--cores", ",".join(map(str, cores[index]))] if cores else []
            self._launch(group, "worker", *link, "--group", group, "--port", str(self._worker_port(index)), *pin)
        self.frontend_address = self._wait_address("frontend", deadline)
        self._wait_healthy(deadline)

    def _launch(self, name: str, command: str, *arguments: str) -> None:
        self._address_file(name).unlink(missing_ok=True)
        arguments = (command, *arguments, "--address-file", str(self._address_file(name)), *self._config_arguments)
        self.children[name] = Child(name, arguments, self.run_dir / f"{name}.log", self._hear)

    def _hear(self, line: str) -> None:
        if self._starting:
            self._echo(line)

    def _address_file(self, name: str) -> Path:
        return self.run_dir / f"{name}.address"

    def _wait_address(self, name: str, deadline: float) -> str:
        file = self._address_file(name)
        while not file.exists():
            self._pause(deadline)
        return file.read_text()

    def _wait_healthy(self, deadline: float) -> None:
        """Until every group has joined and the frontend, having heard of one, reports itself as serving."""
        with (
            open_sync_channel(self.scheduler_address) as scheduler,
            open_sync_channel(self.frontend_address) as frontend,
        ):
            while _num_groups(scheduler) < len(self.groups) or not _serving(frontend):
                self._pause(deadline)

    def _pause(self, deadline: float) -> None:
        """Raises `GroupUnavailableError` when a child is gone or time is up."""
        for child in self.dead():
            raise GroupUnavailableError(f"{child.fate()} (log: {child.log_path})")
        if time.monotonic() > deadline:
            raise GroupUnavailableError(
                f"expected the cluster to be up within serve.start_timeout_s={self.config.serve.start_timeout_s:g} "
                f"seconds, it is not; see the logs in {self.run_dir}"
            )
        time.sleep(POLL_S)


def _serving(channel: grpc.Channel) -> bool:
    with suppress(PrebleError), transport_errors():
        answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=RPC_TIMEOUT_S)
        return bool(answer.status == Serving.Value("SERVING"))
    return False


def _num_groups(channel: grpc.Channel) -> int:
    with suppress(PrebleError), transport_errors():
        stub = scheduler_pb2_grpc.SchedulerStub(channel)
        return len(stub.GetState(scheduler_pb2.GetStateRequest(), timeout=RPC_TIMEOUT_S).groups)
    return 0


def new_run_dir() -> Path:
    """A path not used before; of older ones the last few are kept."""
    runs = cache_dir() / "runs"
    for old in sorted(path for path in runs.glob("*") if path.is_dir())[: -KEPT_RUNS + 1]:
        shutil.rmtree(old, ignore_errors=True)
    return runs / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
