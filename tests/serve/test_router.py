"""Consistent hashing, which places when no scheduler does."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preble_jax.errors import GroupUnavailableError, PrebleError
from serve.protos.preble.v1 import scheduler_pb2 as pb
from serve.router import FALLBACK_BLOCKS, POLL_S, Router, rendezvous, rendezvous_key

GROUPS = st.sets(st.text(min_size=1), min_size=1, max_size=8)


@given(key=st.binary(min_size=1), groups=GROUPS)
def test_only_the_requests_of_a_group_that_goes_move(key: bytes, groups: set[str]) -> None:
    chosen = rendezvous(key, groups)
    assert chosen in groups
    for gone in groups - {chosen}:
        assert rendezvous(key, groups - {gone}) == chosen


@given(groups=st.permutations([f"worker-{i}" for i in range(5)]), key=st.binary())
def test_the_order_of_groups_does_not_matter(groups: list[str], key: bytes) -> None:
    assert rendezvous(key, groups) == rendezvous(key, sorted(groups))


def test_groups_get_even_shares() -> None:
    counts = {f"worker-{i}": 0 for i in range(4)}
    for number in range(2000):
        counts[rendezvous(number.to_bytes(4, "big"), counts)] += 1
    assert min(counts.values()) > 400


@given(hashes=st.lists(st.binary(min_size=16, max_size=16), max_size=10))
def test_the_key_is_the_beginning(hashes: list[bytes]) -> None:
    key = rendezvous_key(hashes, "request")
    assert key == rendezvous_key(hashes[:FALLBACK_BLOCKS], "request")
    assert key == (hashes[:FALLBACK_BLOCKS][-1] if hashes else b"request")


class Scheduler:
    """Answers polls: with groups of these names; None: it is away."""

    groups: tuple[str, ...] | None = ()

    async def GetState(self, request: pb.GetStateRequest, timeout: float) -> pb.GetStateResponse:
        if self.groups is None:
            raise PrebleError("away")
        states = [pb.GroupState(hello=pb.Hello(group=pb.GroupAddress(group=name))) for name in self.groups]
        return pb.GetStateResponse(groups=states)


async def test_groups_outlive_a_scheduler_that_restarts_however_long_it_is_away(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    scheduler, router = Scheduler(), Router("127.0.0.1:1", forget_s=3.0)
    monkeypatch.setattr(router, "_stub", scheduler, raising=False)

    async def poll(groups: tuple[str, ...] | None, num: int) -> list[str]:
        nonlocal now
        scheduler.groups = groups
        for _ in range(num):
            await router._poll_once()
            now += POLL_S
        return sorted(router.groups)

    assert await poll(("a", "b"), 1) == ["a", "b"]
    assert await poll(None, 60) == ["a", "b"]
    assert await poll((), 3) == ["a", "b"], "it is back, and the groups are not there yet"
    assert await poll(("b",), 1) == ["b"]
    assert await poll((), 3) == ["b"]
    assert await poll((), 1) == [], "it has been there without any for 3 s"


async def test_without_a_scheduler_a_process_that_failed_is_gone_round_and_the_next_one_is_not() -> None:
    router = Router("127.0.0.1:1")
    router.groups = {name: pb.Hello(group=pb.GroupAddress(group=name), generation=3) for name in ("a", "b")}
    failed: list[pb.GroupProcess] = []
    for _ in router.groups:
        request = pb.PlaceRequest(request_id="r", excluded=failed)
        failed.append(router._fall_back(request, PrebleError("away")).process)
    assert {(process.group, process.generation) for process in failed} == {("a", 3), ("b", 3)}
    with pytest.raises(GroupUnavailableError, match="none is left"):
        router._fall_back(pb.PlaceRequest(request_id="r", excluded=failed), PrebleError("away"))
    router.groups["a"].generation = 4
    assert router._fall_back(pb.PlaceRequest(request_id="r", excluded=failed), PrebleError("away")).group == "a"
