"""The forest against the naive model, after every step of random histories."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oracles.naive_forest import NaiveForest, chain
from preble_jax.errors import InvalidRequestError, InvariantError
from preble_jax.kv.events import AllCleared, BlocksRemoved, BlocksStored
from preble_jax.sched.forest import Forest
from preble_jax.sched.forest_check import validate_forest
from preble_jax.sched.forest_nodes import Node

TTL_S = 10.0
NUM_SLOTS = 3

paths = st.lists(st.integers(0, 1), max_size=7).map(tuple)
slots = st.integers(0, NUM_SLOTS - 1)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("assign"), paths, slots),
        st.tuples(st.just("store"), paths, slots, st.integers(0, 7)),
        st.tuples(st.just("remove"), slots, st.integers(1, 6)),
        st.tuples(st.just("clear"), slots),
        st.tuples(st.just("wait"), st.sampled_from([1.0, 4.0, 10.0])),
        st.tuples(st.just("leave")),
    ),
    min_size=6,
    max_size=30,
)


def make(max_blocks: int = 10**9) -> Forest:
    forest = Forest(max_blocks=max_blocks, optimistic_ttl_s=TTL_S)
    for _ in range(NUM_SLOTS):
        forest.add_slot()
    return forest


def all_nodes(forest: Forest) -> list[Node]:
    return sorted({forest.tree.node_of(block) for block in forest.tree.blocks}, key=lambda node: node.hashes)


class Pair:
    """The forest and its model, driven together."""

    def __init__(self, max_blocks: int = 10**9) -> None:
        self.real = make(max_blocks)
        self.model = NaiveForest(max_blocks=max_blocks, ttl_s=TTL_S)
        self.now = 0.0
        self.requests: list[tuple] = []

    def step(self, name: str, *arguments) -> None:
        getattr(self, name)(*arguments)

    def assign(self, path: tuple[int, ...], slot: int) -> None:
        hashes = chain(path)
        node = self.real.assign(hashes, self.real.find(hashes), slot, self.now)
        self.requests.append((node, self.model.assign(hashes, slot, self.now), slot))

    def store(self, path: tuple[int, ...], slot: int, skip: int) -> None:
        hashes = chain(path)
        skip = min(skip, max(0, len(hashes) - 1))
        # A group stores below what it holds.
        held = self.model.holds(slot, confirmed_only=True)
        while skip and hashes[skip - 1] not in held:
            skip -= 1
        parent = hashes[skip - 1] if skip else None
        self.real.apply(BlocksStored(hashes[skip:], parent), slot)
        self.model.store(hashes[skip:], parent, slot)

    def remove(self, slot: int, num: int) -> None:
        confirmed = self.model.holds(slot, confirmed_only=True)
        gone = tuple([name for name in self.model.lru(slot) if name in confirmed][:num])
        self.remove_blocks(gone, slot)

    def remove_blocks(self, hashes: tuple[bytes, ...], slot: int) -> None:
        self.real.apply(BlocksRemoved(hashes), slot)
        self.model.remove(hashes, slot)

    def clear(self, slot: int) -> None:
        self.real.apply(AllCleared(), slot)
        self.model.clear(slot)

    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.real.expire(self.now)
        self.model.expire(self.now)

    def leave(self) -> None:
        if self.requests:
            node, path, slot = self.requests.pop(0)
            self.real.unshare(node, slot)
            self.model.unshare(path, slot)

    def check(self) -> None:
        validate_forest(self.real)
        real, model = self.real, self.model
        assert set(real.tree.blocks) == set(model.known)
        for slot in range(NUM_SLOTS):
            assert real.blocks(slot) == model.holds(slot)
            assert real.blocks(slot, confirmed_only=True) == model.holds(slot, confirmed_only=True)
            assert [b for node in real.coldest(slot) for b in reversed(node.hashes)] == model.lru(slot)
        nodes = all_nodes(real)
        assert sorted(node.hashes for node in nodes) == sorted(model.nodes())
        for node in nodes:
            for name in node.hashes:
                shares = model.known[name].shares
                assert node.shares == {slot: shares.count(slot) for slot in set(shares)}


@settings(max_examples=300, deadline=None)
@given(steps)
def test_same_as_the_naive_model(history: list[tuple]) -> None:
    pair = Pair()
    for step in history:
        pair.step(*step)
        pair.check()


@settings(max_examples=200, deadline=None)
@given(steps, st.integers(1, 9))
def test_a_bounded_forest_forgets_the_least_recently_used(history: list[tuple], max_blocks: int) -> None:
    pair = Pair(max_blocks)
    for step in history:
        pair.step(*step)
        assert len(pair.real) <= max_blocks
        pair.check()


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(paths, slots), max_size=8), paths, st.integers(0, 7), st.integers(0, 7))
def test_holders_are_the_longest_matches(placed: list[tuple], path: tuple[int, ...], limit: int, groups: int) -> None:
    pair = Pair()
    for known, slot in placed:
        pair.assign(known, slot)
    hashes = chain(path)
    levels = pair.real.holders(pair.real.find(hashes), limit, groups)
    assert [blocks for _, blocks in levels] == sorted({blocks for _, blocks in levels}, reverse=True)
    for slot in range(NUM_SLOTS):
        expected = min(limit, pair.model.match(hashes, slot)) if groups >> slot & 1 else 0
        assert next((blocks for mask, blocks in levels if mask >> slot & 1), 0) == expected


@settings(max_examples=200, deadline=None)
@given(steps)
def test_everything_leaves(history: list[tuple]) -> None:
    """After the window, the optimistic entries and the groups' pages are gone, nothing is kept."""
    pair = Pair()
    for step in history:
        pair.step(*step)
    while pair.requests:
        pair.leave()
    pair.wait(2 * TTL_S)
    for slot in range(NUM_SLOTS):
        pair.clear(slot)
    pair.check()
    assert not pair.real.tree.blocks and not pair.real.tree.root.children


def test_nodes_split_at_a_difference_and_merge_again() -> None:
    pair = Pair()
    for path in [(0,) * 6, (0, 0, 0, 1)]:
        pair.assign(path, 0)
    assert sorted(len(node.hashes) for node in all_nodes(pair.real)) == [1, 3, 3]
    pair.store((0,) * 6, 0, 0)
    pair.leave()
    pair.leave()
    pair.wait(TTL_S)
    assert [node.hashes for node in all_nodes(pair.real)] == [list(chain((0,) * 6))]
    pair.check()


def test_output_grows_page_by_page_inside_one_node() -> None:
    forest = make()
    forest.store(chain((0,) * 4), None, 0)
    for length in range(5, 40):
        forest.store(chain((0,) * length)[-1:], chain((0,) * (length - 1))[-1], 0)
    assert len(all_nodes(forest)) == 1 and len(forest) == 39
    validate_forest(forest)


def test_chunks_of_a_placed_prompt_become_one_confirmed_node() -> None:
    forest = make()
    prompt = chain((0,) * 100)
    forest.assign(prompt, forest.find(prompt), 1, 0.0)
    for start in range(0, 100, 32):
        forest.store(prompt[start : start + 32], prompt[start - 1] if start else None, 1)
        validate_forest(forest)
    assert forest.blocks(1, confirmed_only=True) == set(prompt)
    assert len(all_nodes(forest)) == 1


def test_removals_in_another_order_and_below_take_the_subtree() -> None:
    forest = make()
    forest.store(chain((0,) * 6), None, 0)
    forest.store(chain((0, 0, 0, 1, 1))[3:], chain((0, 0, 0))[-1], 0)
    forest.remove(chain((0,) * 4)[2:], 0)
    validate_forest(forest)
    assert forest.blocks(0) == set(chain((0, 0)))


def test_a_block_removed_from_the_middle_of_a_run_takes_the_rest() -> None:
    forest = make()
    prompt = chain((0,) * 6)
    forest.store(prompt, None, 0)
    forest.remove((prompt[4], prompt[2], prompt[2]), 0)
    validate_forest(forest)
    assert forest.blocks(0) == set(prompt[:2])


def test_what_is_stored_below_a_forgotten_block_is_ignored() -> None:
    forest = make(max_blocks=4)
    forest.store(chain((0, 0, 0)), None, 0)
    forest.store(chain((1, 1, 1)), None, 0)
    forest.store(chain((0, 0, 0, 0))[3:], chain((0, 0, 0))[-1], 0)
    assert forest.num_ignored == 1 and forest.num_forgotten == 3
    assert forest.blocks(0) == set(chain((1, 1, 1)))
    validate_forest(forest)


@pytest.mark.parametrize(
    "hashes",
    [
        chain((0, 1))[:1] * 2,
        (b"x" * 16, b"x" * 16),
        (chain((1,))[0], *chain((0, 0))),
        (chain((1,))[0], b"y" * 16, chain((0, 0))[1]),
        (b"z" * 16, chain((0, 0))[0]),
    ],
)
def test_hashes_that_are_no_chain_are_refused(hashes: tuple[bytes, ...]) -> None:
    forest = make()
    forest.store(chain((0, 0, 0)), None, 0)
    forest.store(chain((1,)), None, 0)
    with pytest.raises(InvalidRequestError, match="chain"):
        forest.find(hashes)
    forest.store(hashes, None, 1)
    validate_forest(forest)


def test_validate_sees_damage() -> None:
    def damage_count(forest: Forest) -> None:
        forest.num_held[0] += 1

    def damage_mask(forest: Forest) -> None:
        all_nodes(forest)[0].groups = 0

    def damage_order(forest: Forest) -> None:
        all_nodes(forest)[0].last[0] = 0

    def damage_index(forest: Forest) -> None:
        all_nodes(forest)[0].spans[0].node = all_nodes(forest)[1]

    for damage in (damage_count, damage_mask, damage_order, damage_index):
        forest = make()
        forest.store(chain((0, 0, 0)), None, 0)
        forest.store(chain((0, 0, 1))[2:], chain((0, 0))[-1], 0)
        validate_forest(forest)
        damage(forest)
        with pytest.raises(InvariantError):
            validate_forest(forest)


@pytest.mark.parametrize("seed", range(3))
def test_lru_order_on_a_long_run(seed: int) -> None:
    """Long enough for stale records to be purged while their paths are still held above."""
    random_ = random.Random(seed)
    pair = Pair()
    for i in range(400):
        path = (random_.randrange(3), *(random_.randrange(6) for _ in range(random_.randrange(4))))
        pair.assign(path, 0)
        if random_.random() < 0.7:
            pair.store(path, 0, random_.randrange(4))
        for length in range(random_.randrange(3)):
            pair.store((*path, *[9] * length), 0, len(path))
        if i % 3 == 0:
            pair.remove(0, random_.randrange(1, 6))
        if i > 20:
            pair.leave()
        pair.wait(random_.random())
        if i % 10 == 0:
            pair.check()
    pair.check()


def test_purging_keeps_paths_whose_leaf_is_gone() -> None:
    pair = Pair()
    for i in range(200):
        pair.store((i, 0, 1), 0, 0)
        pair.remove_blocks(chain((i, 0, 1))[1:], 0)
    pair.check()


def test_memory_of_the_order_is_bounded_by_live_nodes() -> None:
    """Hot prompts are touched for ever; a cold one at the end of the order must not keep their old records."""
    forest = make()
    forest.store(chain((1, 1)), None, 0)
    random_ = random.Random(0)
    for i in range(5_000):
        hashes = (*chain((0, 0)), bytes([2, random_.randrange(256), i % 256]).ljust(16, b"!"))
        node = forest.assign(hashes, forest.find(hashes), 0, float(i))
        forest.unshare(node, 0)
        forest.expire(float(i))
    records = forest._recency[0]._records
    assert len(records) <= 2 * len(all_nodes(forest)) + 64
    assert next(iter(forest.coldest(0))).hashes == list(chain((1, 1)))
