"""Other device groups of this machine, as processes that compute when they are told to.

Groups that have cores of their own still share caches, memory and clocks: a step takes longer while others compute.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection

from preble_jax.config import Config
from preble_jax.errors import GroupUnavailableError
from preble_jax.progress import NullProgress
from serve.cores import pin_to_cores

START_TIMEOUT_S = 300.0
ANSWER_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 8.0


class Neighbours:
    """An engine for each of `cores`, as a context: inside, they are ready, and idle but for `busy`.

    Raises GroupUnavailableError when one does not start, or does not answer.
    """

    def __init__(self, config: Config, cores: Sequence[tuple[int, ...]]) -> None:
        self._spawn = multiprocessing.get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes = []
        for share in cores:
            here, there = self._spawn.Pipe()
            process = self._spawn.Process(target=_neighbour, args=(there, config, share), daemon=True)
            self._pipes.append(here)
            self._processes.append((process, there))

    def __len__(self) -> int:
        return len(self._pipes)

    def __enter__(self) -> Neighbours:
        for process, there in self._processes:
            process.start()
            there.close()
        try:
            self._await_all(START_TIMEOUT_S)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for pipe in self._pipes:
            pipe.close()  # which is what ends them
        for process, _there in self._processes:
            process.join(STOP_TIMEOUT_S)
            if process.is_alive():
                process.kill()
                process.join()

    @contextmanager
    def busy(self) -> Iterator[None]:
        """Inside, all of them compute."""
        self._tell(True)
        try:
            yield
        finally:
            self._tell(False)

    def _tell(self, works: bool) -> None:
        for pipe in self._pipes:
            with suppress(OSError):  # it is gone, as the answer will say
                pipe.send(works)
        self._await_all(ANSWER_TIMEOUT_S)

    def _await_all(self, timeout_s: float) -> None:
        for pipe in self._pipes:
            try:
                answered = pipe.poll(timeout_s)
                if answered:
                    pipe.recv()
            except (EOFError, OSError):
                answered = False
            if not answered:
                raise GroupUnavailableError("a neighbour that should compute beside this engine has stopped")


def _neighbour(pipe: Connection, config: Config, cores: tuple[int, ...]) -> None:
    """The other process: answers when it is ready, and whenever it has begun or left off."""
    pin_to_cores(cores)  # before JAX is imported
    from preble_jax.engine.engine import Engine
    from preble_jax.engine.steady_load import SteadyLoad

    load = SteadyLoad(Engine.create(config, NullProgress()))
    with suppress(EOFError, OSError, KeyboardInterrupt):  # nobody is there any more
        pipe.send(None)
        while True:
            if pipe.recv():
                load.step()
                pipe.send(None)
                while not pipe.poll():
                    load.step()
            else:
                load.rest()
                pipe.send(None)
