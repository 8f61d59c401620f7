"""Consistent hashing, which places when no scheduler does."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from serve.router import FALLBACK_BLOCKS, rendezvous, rendezvous_key

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
