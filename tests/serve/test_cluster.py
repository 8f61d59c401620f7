"""The real processes on loopback with the default model: streaming, cancelling, and a worker that is killed."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from preble_jax.errors import GroupUnavailableError
from preble_jax.progress import NullProgress
from preble_jax.sampling_params import SamplingParams
from serve.client import AsyncClient, Chunk, Client
from serve.cluster import Cluster
from serve.protos.preble.v1 import scheduler_pb2, scheduler_pb2_grpc
from serve.transport import open_sync_channel

# Small, so that it compiles in seconds: 64 pages of 16 tokens, two sequences at a time.
SMALL = {
    "model.max_model_len": "512",
    "kv.num_pages": "64",
    "engine.max_num_seqs": "2",
    "engine.prefill_buckets": "64",
    "serve.groups": "2",
    "serve.frontend_port": "0",
    "serve.scheduler_port": "0",
    "serve.worker_port": "0",
    "serve.report_interval_s": "0.05",
}
PROMPT = "The capital of France is Paris. The capital of Italy is Rome. The capital of Spain is"
GREEDY = SamplingParams(max_tokens=8, temperature=0.0)


@pytest.fixture(scope="module")
def cluster(default_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    lines: list[str] = []
    overrides = {**SMALL, "model.name": str(default_model)}
    run_dir = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("XLA_FLAGS", raising=False)  # the suite's four devices are not for the workers
        with Cluster(None, overrides, run_dir=run_dir, progress=NullProgress(), echo=lines.append) as cluster:
            yield cluster


@pytest.fixture(scope="module")
def client(cluster: Cluster) -> Iterator[Client]:
    with Client(cluster.frontend_address) as client:
        yield client


def states(cluster: Cluster) -> dict[str, scheduler_pb2.GroupState]:
    with open_sync_channel(cluster.scheduler_address) as channel:
        answer = scheduler_pb2_grpc.SchedulerStub(channel).GetState(scheduler_pb2.GetStateRequest(), timeout=5)
    return {state.hello.group.group: state for state in answer.groups}


def wait_for(holds: Callable[[], bool], timeout_s: float = 20.0) -> None:
    end = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < end, "what was waited for did not happen"
        time.sleep(0.05)


def is_idle(state: scheduler_pb2.GroupState) -> bool:
    """Nothing runs and no page is in use: each is free or cached."""
    load = state.load
    return load.num_running == load.num_waiting == 0 and load.free_pages + load.cached_pages == load.num_pages


def test_it_answers_and_streams(client: Client) -> None:
    chunks = list(client.stream(PROMPT, GREEDY))
    assert "Madrid" in "".join(chunk.text for chunk in chunks)
    assert len(chunks) > 4
    assert chunks[-1].finish_reason == "length"


def test_a_repeated_prompt_is_cached_and_answered_alike(client: Client) -> None:
    first, second = (client.generate(PROMPT * 3, GREEDY) for _ in range(2))
    assert second.usage.group == first.usage.group
    assert second.usage.cached_tokens > 0.7 * second.usage.prompt_tokens
    assert second.token_ids == first.token_ids


def test_it_chats(client: Client) -> None:
    answer = client.generate([{"role": "user", "content": "What is the capital of France?"}], GREEDY)
    assert "Paris" in answer.text


def test_cancelling_frees_the_pages(cluster: Cluster, client: Client) -> None:
    before = sum(state.load.output_tokens for state in states(cluster).values())
    stream = client.stream("Once upon a time", SamplingParams(max_tokens=400, temperature=0.0, ignore_eos=True))
    next(stream)
    wait_for(lambda: any(state.load.num_running for state in states(cluster).values()))
    stream.close()
    wait_for(lambda: all(is_idle(state) for state in states(cluster).values()))
    made = sum(state.load.output_tokens for state in states(cluster).values()) - before
    assert made < 200, "it ran on for a while, if not to its end"
    assert all(state.num_outstanding == 0 for state in states(cluster).values())


@dataclass
class Trial:
    """One request during which a worker dies. tokens_when_killed: how far it was at that moment."""

    chunks: list[Chunk] = field(default_factory=list)
    tokens_when_killed: int = 0
    error: GroupUnavailableError | None = None

    @property
    def token_ids(self) -> tuple[int, ...]:
        return tuple(token for chunk in self.chunks for token in chunk.token_ids)

    async def run(self, client: AsyncClient, sampling: SamplingParams) -> None:
        try:
            async for chunk in client.stream(PROMPT, sampling):
                self.chunks.append(chunk)
        except GroupUnavailableError as error:
            self.error = error


async def _kill_during(cluster: Cluster, trials: list[Trial]) -> str:
    """Ten requests on two groups of two sequences each; the fuller group dies when some of its answers have begun."""
    sampling = SamplingParams(max_tokens=60, temperature=0.0, ignore_eos=True)
    async with AsyncClient(cluster.frontend_address) as client, asyncio.TaskGroup() as group:
        for trial in trials:
            group.create_task(trial.run(client, sampling))
        while not any(len(trial.token_ids) > 2 for trial in trials):
            await asyncio.sleep(0.01)
        now = await asyncio.to_thread(states, cluster)
        victim = max(now, key=lambda name: now[name].num_outstanding)
        cluster.children[victim].process.send_signal(signal.SIGKILL)
        for trial in trials:
            trial.tokens_when_killed = len(trial.token_ids)
    return victim


def test_a_worker_killed_in_the_middle_costs_only_what_it_had_begun(cluster: Cluster, client: Client) -> None:
    trials = [Trial() for _ in range(10)]
    victim = asyncio.run(_kill_during(cluster, trials))
    [survivor] = set(cluster.groups) - {victim}

    failed = [trial for trial in trials if trial.error is not None]
    finished = [trial for trial in trials if trial.error is None]
    assert failed, "the victim had begun to answer at least one request"
    assert all(trial.token_ids for trial in failed), "without a token a request is retried, not failed"
    assert any(trial.tokens_when_killed == 0 for trial in finished), "some waited and were retried"
    assert all(trial.chunks[-1].finish_reason == "length" for trial in finished)
    assert {len(trial.token_ids) for trial in finished} == {60}

    wait_for(lambda: set(states(cluster)) == {survivor})
    assert [child.name for child in cluster.dead()] == [victim]
    assert "SIGKILL" in cluster.children[victim].fate()
    for _ in range(3):
        assert client.generate(PROMPT, GREEDY).usage.group == survivor
    wait_for(lambda: is_idle(states(cluster)[survivor]))
