"""What each command of the command line does. Heavy imports happen inside, so that every process loads only its own."""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

from preble_jax.config import Config
from preble_jax.config_files import OFFLINE_CONFIG, load_config
from preble_jax.errors import ConfigError, GroupUnavailableError

WATCH_S = 0.5


def scheduler(arguments: argparse.Namespace) -> int:
    from serve.scheduler import run_scheduler

    config = _begin(arguments)
    port = config.serve.scheduler_port if arguments.port is None else arguments.port
    asyncio.run(run_scheduler(config, port, arguments.address_file))
    return 0


def worker(arguments: argparse.Namespace) -> int:
    from preble_jax.progress import make_progress
    from serve.cores import pin_to_cores
    from serve.transport import require_free_port

    config = _as_worker(_begin(arguments))
    port = config.serve.worker_port if arguments.port is None else arguments.port
    require_free_port(config.serve.host, port, "serve.worker_port")  # before minutes of reading and compiling
    if arguments.cores:
        pin_to_cores(arguments.cores)

    progress = make_progress()
    with progress.task("importing JAX"):
        from preble_jax.engine.service import EngineService
        from serve.worker import run_worker

    engine = EngineService.create(config, progress)
    scheduler_address = _scheduler_address(arguments, config)
    asyncio.run(run_worker(engine, config, arguments.group, scheduler_address, port, arguments.address_file))
    return 0


def frontend(arguments: argparse.Namespace) -> int:
    from preble_jax.model.registry import resolve
    from preble_jax.model.tokenizer import load_tokenizer
    from preble_jax.progress import make_progress
    from serve.frontend import run_frontend

    config = _begin(arguments)
    port = config.serve.frontend_port if arguments.port is None else arguments.port
    tokenizer = load_tokenizer(resolve(config.model.name, make_progress()))
    scheduler_address = _scheduler_address(arguments, config)
    asyncio.run(run_frontend(tokenizer, config, scheduler_address, port, arguments.address_file))
    return 0


def _stop_on_signals() -> None:
    """SIGTERM stops the children first, as Ctrl-C does; SIGINT too where a shell's `&` has set it to be ignored."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.default_int_handler)


def serve(arguments: argparse.Namespace) -> int:
    """Until Ctrl-C (0) or until no device group is left."""
    from serve.cluster import Cluster

    _stop_on_signals()
    with Cluster(arguments.config, arguments.overrides, run_dir=arguments.run_dir) as cluster:
        reported: set[str] = set()
        try:
            print(_how_to_call(cluster.frontend_address, cluster.config, cluster.run_dir), flush=True)
            while True:
                time.sleep(WATCH_S)
                for child in cluster.dead():
                    if child.name == "scheduler":
                        print(f"{child.fate()}; starting another", file=sys.stderr, flush=True)
                        cluster.restart_scheduler()
                    elif child.name not in reported:
                        reported.add(child.name)
                        print(f"{child.fate()} (log: {child.log_path})", file=sys.stderr, flush=True)
                if reported.issuperset(cluster.groups) or "frontend" in reported:
                    raise GroupUnavailableError(f"nothing is left to serve with; see the logs in {cluster.run_dir}")
        except KeyboardInterrupt:
            print("stopping", file=sys.stderr)
    return 0


def _how_to_call(address: str, config: Config, run_dir: Path) -> str:
    call = f"Client('{address}').generate('The capital of France is').text"
    return (
        f"\nserving {config.model.name} on {address} with {config.serve.groups} device groups; logs in {run_dir}\n"
        f"  talk to it:  preble-jax chat --address {address}\n"
        f'  from Python: python -c "from serve import Client; print({call})"\n'
        f'  from a shell: grpcurl -plaintext -d \'{{"text": "The capital of France is"}}\' {address} '
        "preble.v1.Inference/Generate\n"
        "Ctrl-C stops it."
    )


def demo(arguments: argparse.Namespace) -> int:
    from serve.demo.run import run_demo

    _stop_on_signals()
    return run_demo(arguments)


def chat(arguments: argparse.Namespace) -> int:
    from preble_jax.sampling_params import SamplingParams
    from serve.chat import run_chat
    from serve.client import Client
    from serve.status import TransportError

    settings = load_config(arguments.config, arguments.overrides).serve
    address = arguments.address or f"{settings.host}:{settings.frontend_port}"
    sampling = SamplingParams(max_tokens=arguments.max_tokens, temperature=arguments.temperature)
    try:
        with Client(address) as client:
            run_chat(client, sampling, arguments.system)
    except TransportError as error:
        raise GroupUnavailableError(
            f"expected a frontend at {address}, got none ({error}); start one: preble-jax serve"
        ) from error
    return 0


def profile(arguments: argparse.Namespace) -> int:
    from serve.output_file import require_writable
    from serve.profile import run_profile

    if arguments.rounds < 1:
        raise ConfigError(f"--rounds: expected at least 1, got {arguments.rounds}; leave it out for 3")
    require_writable("--output", arguments.output)  # before minutes of measuring
    config = _as_worker(load_config(arguments.config, arguments.overrides))
    return run_profile(config, arguments.output, arguments.cores, arguments.rounds, arguments.neighbours)


def bench(arguments: argparse.Namespace) -> int:
    from serve.bench import run_bench

    config = load_config(arguments.config or OFFLINE_CONFIG, arguments.overrides)
    return run_bench(config, arguments.workloads, arguments.seed, arguments.rounds, arguments.json)


def sim(arguments: argparse.Namespace) -> int:
    from serve.sim import print_names, run_sim
    from serve.sim_sweep import run_sweep

    if arguments.list:
        return print_names()
    return run_sweep(arguments) if arguments.mode == "sweep" else run_sim(arguments)


def plot(arguments: argparse.Namespace) -> int:
    from serve.plot import run_plot

    return run_plot(arguments)


def compile_programs(arguments: argparse.Namespace) -> int:
    """Named so because `compile` is a builtin."""
    from serve.precompile import run_compile

    return run_compile(_as_worker(load_config(arguments.config, arguments.overrides)))


def fetch(arguments: argparse.Namespace) -> int:
    from preble_jax.model.registry import resolve
    from preble_jax.progress import make_progress

    name = arguments.model or load_config(arguments.config, arguments.overrides).model.name
    print(resolve(name, make_progress()))
    return 0


def _begin(arguments: argparse.Namespace) -> Config:
    """What the long-lived processes have in common."""
    from serve.transport import exit_with_parent

    if arguments.exit_with_parent:
        exit_with_parent()
    return load_config(arguments.config, arguments.overrides)


def _as_worker(config: Config) -> Config:
    """All workers of a deployment on one machine size their pages from the same memory."""
    if config.kv.memory_sharers:
        return config
    return replace(config, kv=replace(config.kv, memory_sharers=config.serve.groups))


def _scheduler_address(arguments: argparse.Namespace, config: Config) -> str:
    return arguments.scheduler or f"{config.serve.host}:{config.serve.scheduler_port}"
