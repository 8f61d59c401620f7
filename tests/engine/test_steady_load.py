"""Work without end, and the neighbour's process around it, run here in a thread."""

from __future__ import annotations

import threading
from multiprocessing import Pipe

import pytest

import serve.neighbours
from preble_jax.config import Config
from preble_jax.engine.engine import Engine
from preble_jax.engine.steady_load import NUM_REQUESTS, OUTPUT_TOKENS, SteadyLoad
from preble_jax.errors import GroupUnavailableError
from serve.neighbours import Neighbours


def test_it_computes_prompts_and_decodes_and_never_ends(make_engine) -> None:
    engine = make_engine()
    load = SteadyLoad(engine)
    for _ in range(40):
        load.step()
    assert engine.ledger.finished > NUM_REQUESTS
    assert engine.ledger.decode_rows > 2 * OUTPUT_TOKENS
    assert engine.scheduler.num_cached_tokens == 0, "prompts nobody has cached"
    load.rest()
    dispatches = engine.ledger.dispatches
    load.rest()
    assert engine.ledger.dispatches == dispatches


def test_a_neighbour_computes_when_it_is_told_to(make_engine, monkeypatch) -> None:
    engine = make_engine()
    monkeypatch.setattr(Engine, "create", lambda config, progress: engine)
    monkeypatch.setattr(serve.neighbours, "pin_to_cores", lambda cores: None)
    here, there = Pipe()
    thread = threading.Thread(target=serve.neighbours._neighbour, args=(there, Config(), (0,)), daemon=True)
    thread.start()

    def answer(works: bool | None = None) -> int:
        if works is not None:
            here.send(works)
        assert here.poll(60.0)
        here.recv()
        return engine.ledger.dispatches

    try:
        assert answer() == 0, "idle when it is ready"
        answer(True)
        rested = answer(False)
        assert rested > 0
        answer(True)
        assert answer(False) > rested, "it goes on"
    finally:
        here.close()  # which is what ends it
        thread.join(60.0)
    assert not thread.is_alive()


def test_a_neighbour_that_does_not_start_is_an_error(capfd) -> None:
    with pytest.raises(GroupUnavailableError, match="stopped"), Neighbours(Config(), [(1_000_000,)]):
        pass
    assert "--cores" in capfd.readouterr().err
