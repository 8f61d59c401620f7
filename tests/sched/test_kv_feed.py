"""Numbered events over a bad line: when everything is in, the forest is the union of the groups' trees."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oracles.naive_forest import chain
from preble_jax.config import SchedSettings
from preble_jax.errors import InvalidRequestError, NotFoundError
from preble_jax.kv.events import AllCleared, BlocksRemoved, BlocksStored, EventBatch, KVEvent, Snapshot
from preble_jax.sched import GlobalScheduler, Instruction, PlaceRequest, RequestSnapshot
from preble_jax.sched.event_cursor import EventCursor

PAGE_SIZE = 4
GROUPS = ("a", "b")


class Report:
    num_waiting = 0
    num_running = 0


class Worker:
    """A device group's tree and its events, as set of paths; closed under parents."""

    def __init__(self, name: str, generation: int = 1) -> None:
        self.name = name
        self.generation = generation
        self.next_seq = 0
        self.held: set[tuple[int, ...]] = set()
        self.events: list[KVEvent] = []

    def store(self, path: tuple[int, ...], skip: int) -> None:
        skip = min(skip, max(0, len(path) - 1))
        while skip and path[:skip] not in self.held:
            skip -= 1
        if path:
            hashes = chain(path)
            self.events.append(BlocksStored(hashes[skip:], hashes[skip - 1] if skip else None))
            self.held |= {path[: k + 1] for k in range(len(path))}

    def evict(self, num: int) -> None:
        gone = []
        for _ in range(min(num, len(self.held))):
            leaf = max(p for p in self.held if not any(q[:-1] == p for q in self.held))
            self.held.remove(leaf)
            gone.append(chain(leaf)[-1])
        self.events.append(BlocksRemoved(tuple(gone)))

    def clear(self) -> None:
        self.held.clear()
        self.events.append(AllCleared())

    def take(self) -> EventBatch:
        batch = EventBatch(self.generation, self.next_seq, tuple(self.events))
        self.next_seq += len(self.events)
        self.events.clear()
        return batch

    def snapshot(self) -> Snapshot:
        """Parents first, and chains where there are some."""
        self.take()
        stored = [
            BlocksStored(chain(path)[-1:], chain(path)[-2] if len(path) > 1 else None)
            for path in sorted(self.held, key=len)
        ]
        return Snapshot(self.generation, self.next_seq, tuple(stored))

    def restart(self) -> None:
        self.__init__(self.name, self.generation + 1)  # type: ignore[misc]

    @property
    def blocks(self) -> set[bytes]:
        return {chain(path)[-1] for path in self.held}


class BadLine:
    """Workers and scheduler with a line between them that loses, repeats and delays."""

    def __init__(self) -> None:
        self.scheduler = GlobalScheduler(
            SchedSettings(optimistic_ttl_s=5.0, window_s=20.0, group_timeout_s=1e6, snapshot_retry_s=0.5), PAGE_SIZE
        )
        self.workers = [Worker(name) for name in GROUPS]
        self.sent: list[tuple[str, EventBatch | Snapshot]] = []  # what may still arrive, or arrive again
        self.asked: list[str] = []
        self.now = 0.0
        self.num_placed = 0
        for worker in self.workers:
            self.note(self.scheduler.add_group(worker.name, 50, worker.generation, self.now))

    def note(self, instructions: list[Instruction]) -> None:
        self.asked += [i.group for i in instructions if isinstance(i, RequestSnapshot)]

    def deliver(self, name: str, message: EventBatch | Snapshot) -> None:
        take = self.scheduler.kv_events if isinstance(message, EventBatch) else self.scheduler.kv_snapshot
        self.note(take(name, message, self.now))  # type: ignore[operator]

    # --- steps

    def store(self, who: int, path: tuple[int, ...], skip: int) -> None:
        self.workers[who].store(path, skip)

    def evict(self, who: int, num: int) -> None:
        self.workers[who].evict(num)

    def clear(self, who: int) -> None:
        self.workers[who].clear()

    def restart(self, who: int, registers: bool) -> None:
        worker = self.workers[who]
        worker.restart()
        if registers:
            self.note(self.scheduler.add_group(worker.name, 50, worker.generation, self.now))

    def send(self, who: int, fate: str) -> None:
        worker = self.workers[who]
        batch = worker.take()
        if fate != "lost":
            self.sent.append((worker.name, batch))
        if fate == "arrives":
            self.deliver(worker.name, batch)

    def again(self, index: int) -> None:
        """Something sent before arrives late, or once more."""
        if self.sent:
            self.deliver(*self.sent[index % len(self.sent)])

    def answer(self, fate: str) -> None:
        if self.asked:
            worker = next(w for w in self.workers if w.name == self.asked[0])
            self.asked.pop(0)
            snapshot = worker.snapshot()
            if fate != "lost":
                self.sent.append((worker.name, snapshot))
            if fate == "arrives":
                self.deliver(worker.name, snapshot)

    def place(self, path: tuple[int, ...]) -> None:
        self.num_placed += 1
        request = PlaceRequest(
            request_id=str(self.num_placed), block_hashes=chain(path), num_tokens=len(path) * PAGE_SIZE + 1
        )
        self.scheduler.place(request, self.now)

    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.note(self.scheduler.tick(self.now))

    def settle(self) -> None:
        """The line is good from now on. A load report says how far each worker is; whoever is asked answers."""
        for worker in self.workers:
            self.note(self.scheduler.add_group(worker.name, 50, worker.generation, self.now))
            self.deliver(worker.name, worker.take())
            self.note(
                self.scheduler.load_report(
                    worker.name, Report(), self.now, next_seq=worker.next_seq, generation=worker.generation
                )
            )
        for _ in range(3):
            while self.asked:
                self.answer("arrives")
            self.wait(6.0)


fates = st.sampled_from(["arrives", "late", "lost"])
who = st.integers(0, 1)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("store"), who, st.lists(st.integers(0, 1), max_size=6).map(tuple), st.integers(0, 6)),
        st.tuples(st.just("evict"), who, st.integers(1, 4)),
        st.tuples(st.just("clear"), who),
        st.tuples(st.just("restart"), who, st.booleans()),
        st.tuples(st.just("send"), who, fates),
        st.tuples(st.just("send"), who, st.just("arrives")),
        st.tuples(st.just("again"), st.integers(0, 20)),
        st.tuples(st.just("answer"), fates),
        st.tuples(st.just("place"), st.lists(st.integers(0, 1), max_size=6).map(tuple)),
        st.tuples(st.just("wait"), st.sampled_from([0.1, 1.0, 7.0])),
    ),
    min_size=8,
    max_size=40,
)


@settings(max_examples=300, deadline=None)
@given(steps)
def test_the_forest_becomes_the_union_of_the_trees(history: list[tuple]) -> None:
    line = BadLine()
    for name, *arguments in history:
        getattr(line, name)(*arguments)
        line.scheduler.validate()
    line.settle()
    line.scheduler.validate()
    for worker in line.workers:
        assert line.scheduler.blocks(worker.name) == worker.blocks
    line.wait(40.0)
    assert line.scheduler.num_blocks == len(set.union(*(worker.blocks for worker in line.workers)))


@settings(max_examples=150, deadline=None)
@given(steps)
def test_a_good_line_needs_no_expiry_and_no_snapshot(history: list[tuple]) -> None:
    """Every event arrives once and in order: the confirmed part is exact at each step."""
    line = BadLine()
    line.asked.clear()
    for name, *arguments in history:
        if name in ("store", "evict", "clear", "place", "wait"):
            getattr(line, name)(*arguments)
        for who, worker in enumerate(line.workers):
            line.send(who, "arrives")
            assert line.scheduler.blocks(worker.name, confirmed_only=True) == worker.blocks
    assert not line.asked


def ask_count(instructions: list[Instruction]) -> int:
    return sum(isinstance(i, RequestSnapshot) for i in instructions)


def stored(path: tuple[int, ...]) -> BlocksStored:
    return BlocksStored(chain(path), None)


def one_group() -> GlobalScheduler:
    scheduler = GlobalScheduler(SchedSettings(snapshot_retry_s=1.0, group_timeout_s=100.0), PAGE_SIZE)
    assert scheduler.add_group("a", 50, 3, 0.0) == [RequestSnapshot("a")]
    scheduler.kv_snapshot("a", Snapshot(3, 0, ()), 0.0)
    return scheduler


def test_a_hole_applies_nothing_and_asks_once_a_while() -> None:
    scheduler = one_group()
    assert scheduler.kv_events("a", EventBatch(3, 0, (stored((1,)),)), 0.0) == []
    assert scheduler.kv_events("a", EventBatch(3, 2, (stored((2,)),)), 0.1) == [RequestSnapshot("a")]
    assert scheduler.kv_events("a", EventBatch(3, 3, (stored((3,)),)), 0.2) == []
    assert scheduler.blocks("a") == set(chain((1,)))
    assert scheduler.tick(0.9) == []
    assert scheduler.tick(1.2) == [RequestSnapshot("a")]
    # Too old to cover what is known to exist: applied, and asked again.
    assert ask_count(scheduler.kv_snapshot("a", Snapshot(3, 3, (stored((4,)),)), 1.3)) == 1
    assert scheduler.kv_snapshot("a", Snapshot(3, 4, (stored((5,)),)), 1.4) == []
    assert scheduler.blocks("a") == set(chain((5,)))
    assert scheduler.tick(9.0) == []


def test_the_missing_batch_itself_closes_the_hole() -> None:
    scheduler = one_group()
    late = EventBatch(3, 0, (stored((1,)), stored((2,))))
    scheduler.kv_events("a", EventBatch(3, 2, (stored((3,)),)), 0.0)
    scheduler.kv_events("a", late, 0.0)
    assert scheduler.blocks("a") == {*chain((1,)), *chain((2,))}
    scheduler.kv_events("a", EventBatch(3, 1, (stored((9,)), stored((3,)))), 0.0)
    assert scheduler.blocks("a") == {*chain((1,)), *chain((2,)), *chain((3,))}, "event 1 was applied before"
    assert scheduler.tick(50.0) == []


def test_generations() -> None:
    scheduler = one_group()
    scheduler.kv_events("a", EventBatch(3, 0, (stored((1,)),)), 0.0)
    assert scheduler.kv_events("a", EventBatch(2, 1, (AllCleared(),)), 0.0) == []
    assert scheduler.kv_snapshot("a", Snapshot(2, 9, ()), 0.0) == []
    assert scheduler.blocks("a") == set(chain((1,)))
    scheduler.kv_events("a", EventBatch(4, 0, (stored((2,)),)), 0.0)
    assert scheduler.blocks("a") == set(chain((2,)))
    assert ask_count(scheduler.kv_events("a", EventBatch(5, 7, ()), 0.0)) == 1
    assert scheduler.blocks("a") == set()
    with pytest.raises(InvalidRequestError, match="older process"):
        scheduler.add_group("a", 50, 4, 0.0)


def test_a_load_report_reveals_a_lost_tail() -> None:
    scheduler = one_group()
    assert scheduler.load_report("a", Report(), 0.0, next_seq=0) == []
    assert scheduler.load_report("a", Report(), 0.0, next_seq=9, generation=2) == []
    assert scheduler.load_report("a", Report(), 0.0, next_seq=2, generation=3) == [RequestSnapshot("a")]


def test_events_of_unknown_groups_and_impossible_numbers() -> None:
    scheduler = one_group()
    for call in (
        lambda: scheduler.kv_events("x", EventBatch(3, 0, ()), 0.0),
        lambda: scheduler.kv_snapshot("x", Snapshot(3, 0, ()), 0.0),
        lambda: scheduler.load_report("x", Report(), 0.0),
    ):
        with pytest.raises(NotFoundError, match="'x'"):
            call()
    for call in (
        lambda: scheduler.kv_events("a", EventBatch(3, -1, ()), 0.0),
        lambda: scheduler.kv_events("a", EventBatch(-3, 0, ()), 0.0),
        lambda: scheduler.kv_snapshot("a", Snapshot(3, -1, ()), 0.0),
        lambda: scheduler.kv_events("a", EventBatch(3, 0, (stored((1,)),)), float("nan")),
    ):
        with pytest.raises(InvalidRequestError):
            call()
    assert scheduler.blocks("a") == set()
    scheduler.validate()


def test_cursor_counts() -> None:
    cursor = EventCursor(1)
    assert cursor.take(0, 3) == 0 and cursor.next_seq == 3
    assert cursor.take(1, 4) == 2 and cursor.next_seq == 5
    assert cursor.take(0, 2) == 2 and cursor.next_seq == 5
    assert cursor.take(6, 1) is None and cursor.behind
    assert not cursor.jump(4) and cursor.behind
    assert cursor.jump(7) and not cursor.behind
    assert cursor.ask(0.0, 1.0) and not cursor.ask(0.5, 1.0) and cursor.ask(1.0, 1.0)
