"""Pages and prefixes against a naive model: sets and lists, no counters, everything recomputed."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from preble_jax.errors import InvariantError
from preble_jax.kv.events import AllCleared, BlocksRemoved, BlocksStored
from preble_jax.kv.hashing import block_hashes
from preble_jax.kv.pages import PagePool
from preble_jax.kv.prefix_cache import PrefixCache
from preble_jax.kv.radix import RadixTree

NUM_PAGES = 12


def cached_hashes(tree):
    return {block_hash for node in tree for block_hash in node.hashes}


class NaiveCache:
    """Which prefixes (tuples of tokens, page size 1) are cached, and when each was last used."""

    def __init__(self) -> None:
        self.last_used: dict[tuple[int, ...], int] = {}
        self.clock = 0

    def touch(self, prefix):
        self.clock += 1
        for n in range(1, len(prefix) + 1):
            self.last_used[prefix[:n]] = self.clock

    def match(self, tokens):
        return max((n for n in range(len(tokens) + 1) if n == 0 or tokens[:n] in self.last_used), default=0)

    def evict(self, held):
        pinned = {prefix[:n] for prefix in held for n in range(len(prefix) + 1)}
        inner = {prefix[:-1] for prefix in self.last_used}
        leaves = [prefix for prefix in self.last_used if prefix not in inner and prefix not in pinned]
        victim = min(leaves, key=self.last_used.__getitem__)
        del self.last_used[victim]

    def num_evictable(self, held):
        pinned = {prefix[:n] for prefix in held for n in range(len(prefix) + 1)}
        return sum(prefix not in pinned for prefix in self.last_used)


class CacheMachine(RuleBasedStateMachine):
    """Requests over a tiny alphabet open, extend, commit and release in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = PrefixCache(NUM_PAGES, 1, generation=7)
        self.naive = NaiveCache()
        self.held: list[list] = []  # [tokens, SequencePages, number of pages]
        self.mirror: set[bytes] = set()  # what a listener to the events believes

    def hashes(self, tokens):
        return block_hashes(list(tokens), 1)

    def committed(self):
        return [tokens[: pages.num_committed] for tokens, pages, _ in self.held]

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=6).map(tuple))
    def open(self, tokens):
        expected = self.naive.match(tokens)
        assert self.cache.match(self.hashes(tokens)) == expected
        matched = self.hashes(tokens)[:expected]
        before = self.cache.num_available
        takes = self.cache.num_evictable_in(matched)
        pages = self.cache.open(self.hashes(tokens))
        assert pages.num_committed == len(pages.pages) == expected
        assert before - takes == self.cache.num_available
        self.naive.touch(tokens[:expected])
        self.held.append([tokens, pages, expected])

    @precondition(lambda self: self.held)
    @rule(data=st.data(), count=st.integers(1, 5))
    def extend(self, data, count):
        entry = data.draw(st.sampled_from(self.held))
        room = NUM_PAGES - sum(n - len(p) for (_, _, n), p in zip(self.held, self.committed(), strict=True))
        room -= len(self.naive.last_used)  # free pages
        available = room + self.naive.num_evictable(self.committed())
        assert self.cache.num_available == available
        done = self.cache.extend(entry[1], count)
        assert done == (count <= available)
        if done:
            for _ in range(count - room):
                self.naive.evict(self.committed())
            entry[2] += count

    @precondition(lambda self: self.held)
    @rule(data=st.data(), upto=st.integers(0, 6))
    def commit(self, data, upto):
        tokens, pages, num_pages = entry = data.draw(st.sampled_from(self.held))
        upto = min(upto, num_pages, len(tokens))
        old = pages.num_committed
        self.cache.commit(pages, self.hashes(tokens)[:upto])
        assert pages.num_committed == max(old, upto)
        if upto > old:
            self.naive.touch(tokens[:upto])
        entry[1] = pages

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data):
        entry = data.draw(st.sampled_from(self.held))
        self.naive.touch(entry[0][: entry[1].num_committed])
        self.cache.release(entry[1])
        self.held.remove(entry)

    @rule()
    def clear(self):
        empty = self.cache.clear()
        pinned = {prefix[:n] for prefix in self.committed() for n in range(1, len(prefix) + 1)}
        self.naive.last_used = {prefix: t for prefix, t in self.naive.last_used.items() if prefix in pinned}
        assert empty == (not self.naive.last_used)

    @invariant()
    def adds_up(self):
        self.cache.validate()
        cached = {self.hashes(prefix)[-1] for prefix in self.naive.last_used}
        assert cached_hashes(self.cache.tree) == cached

    @invariant()
    def no_page_has_two_writers(self):
        private = [page for _, pages, _ in self.held for page in pages.pages[pages.num_committed :]]
        assert len(private) == len(set(private))
        assert not set(private) & {page for node in self.cache.tree for page in node.pages}

    @invariant()
    def events_tell_the_whole_story(self):
        batch = self.cache.events.take()
        for event in batch.events if batch else ():
            if isinstance(event, BlocksStored):
                assert event.parent is None or event.parent in self.mirror
                self.mirror |= set(event.hashes)
            elif isinstance(event, BlocksRemoved):
                assert set(event.hashes) <= self.mirror
                self.mirror -= set(event.hashes)
            else:
                assert isinstance(event, AllCleared)
                self.mirror = set()
        assert self.mirror == cached_hashes(self.cache.tree)

    def teardown(self):
        for _, pages, _ in self.held:
            self.cache.release(pages)
        self.cache.validate()
        assert self.cache.num_available == NUM_PAGES


TestCacheMachine = CacheMachine.TestCase
TestCacheMachine.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def test_pages_that_repeat_are_shared_and_the_copy_is_freed():
    cache = PrefixCache(8, 4)
    chain = block_hashes(list(range(8)), 4)
    first, second = cache.open(chain), cache.open(chain)
    assert cache.extend(first, 2) and cache.extend(second, 2)
    cache.commit(first, chain)
    free = cache.pool.num_free
    cache.commit(second, chain)
    assert second.pages == first.pages
    assert cache.pool.num_free == free + 2
    cache.release(first)
    cache.release(second)
    cache.validate()
    assert cache.num_cached == 2


def test_the_numbering_of_events_has_no_holes_and_a_snapshot_takes_their_place():
    cache = PrefixCache(8, 4, generation=3)
    held = cache.open([])
    cache.extend(held, 4)
    chain = block_hashes(list(range(16)), 4)
    cache.commit(held, chain[:1])
    first = cache.events.take()
    cache.commit(held, chain[:3])
    cache.commit(held, chain)
    second = cache.events.take()
    assert (first.generation, first.first_seq, len(first.events)) == (3, 0, 1)
    assert (second.first_seq, [e.hashes for e in second.events]) == (1, [tuple(chain[1:3]), tuple(chain[3:])])
    snapshot = cache.events.snapshot(cache.tree)
    assert (snapshot.generation, snapshot.next_seq) == (3, 3)
    assert snapshot.stored == (BlocksStored(tuple(chain), None),)
    assert cache.events.take() is None


def test_a_switched_off_cache_shares_nothing():
    cache = PrefixCache(4, 1, enabled=False)
    held = cache.open(block_hashes([1, 2], 1))
    cache.extend(held, 2)
    cache.commit(held, block_hashes([1, 2], 1))
    assert cache.match(block_hashes([1, 2], 1)) == 0
    cache.release(held)
    cache.validate()
    assert cache.pool.num_free == 4


def test_hot_leaves_do_not_pile_up_in_the_eviction_heap():
    tree = RadixTree()
    node = tree.grow(tree.root, [b"a"], [7])
    tree.unpin(node)
    for _ in range(10_000):
        tree.pin(node)
        tree.unpin(node)
    assert len(tree._evictable) < 200
    assert tree.evict() == ([7], [b"a"])


def small_tree(draw):
    """A tree of chains, some of them pinned, some used again. Returns (tree, changes it told of, chains by page)."""
    tree, paths, changes = RadixTree(), [], []
    tree.on_change = changes.extend
    for number, (parent, length, used) in enumerate(draw):
        above = paths[parent % len(paths)] if paths and parent % 3 else []
        chain = [bytes([number, i]) for i in range(length)]
        node = tree.end_at(*tree.find(above))
        tree.pin(node)
        moves_pin = bool(parent % 2)
        leaf = tree.grow(node, chain, [len(paths) + i for i in range(length)], moves_pin=moves_pin)
        paths += [above + chain[: i + 1] for i in range(length)]
        if not moves_pin:
            tree.unpin(node)
        if number % 5:
            tree.unpin(leaf)
        inner = tree.end_at(*tree.find(paths[used % len(paths)]))
        tree.pin(inner)
        tree.unpin(inner)
    tree.validate()
    return tree, changes, paths


trees = st.lists(st.tuples(st.integers(0, 50), st.integers(1, 5), st.integers(0, 50)), min_size=1, max_size=12)


@settings(max_examples=100, deadline=None)
@given(draw=trees, num=st.integers(0, 40))
def test_many_pages_are_evicted_as_one_by_one(draw, num):
    (together, told, _), (single, told_singly, _) = small_tree(draw), small_tree(draw)
    pages, hashes = together.evict(num)
    one_by_one = [single.evict() for _ in range(num)]
    assert pages == [page for pages, _ in one_by_one for page in pages]
    assert hashes == [block_hash for _, hashes in one_by_one for block_hash in hashes]
    assert told == told_singly
    assert len(hashes) == num or together.num_evictable == 0
    together.validate()
    single.validate()
    assert together.evict(99)[1] == [h for _ in range(99) for h in single.evict()[1]]


@settings(max_examples=100, deadline=None)
@given(draw=trees, num=st.integers(0, 40))
def test_every_page_is_found_under_its_path_and_no_other(draw, num):
    tree, _, paths = small_tree(draw)
    gone = set(tree.evict(num)[1])
    for page, path in enumerate(paths):
        kept = [block_hash for block_hash in path if block_hash not in gone]
        node, depth = tree.find([*path, b"unknown"])
        assert (path[:depth], depth) == (kept, len(kept))
        if path == kept:
            assert tree.path(node)[depth - 1] == page
            assert tree.path(tree.end_at(node, depth))[-1] == page
            tree.validate()


@settings(max_examples=100, deadline=None)
@given(draw=trees, num=st.integers(0, 40))
def test_chains_name_all_pages_in_the_order_in_which_they_came(draw, num):
    tree, _, paths = small_tree(draw)
    gone = set(tree.evict(num)[1])
    expected, last = [], None
    for path in paths:
        if path[-1] in gone:
            continue
        above = path[-2] if len(path) > 1 else None
        if above is None or above != last:
            expected.append(([], above))
        expected[-1][0].append(path[-1])
        last = path[-1]
    assert list(tree.chains()) == expected


def test_a_chain_that_one_request_computes_is_one_run():
    cache = PrefixCache(16, 1)
    prompt = block_hashes(list(range(10)), 1)
    held = cache.open(prompt)
    assert cache.extend(held, 10)
    for num_full in (3, 4, 9):
        cache.commit(held, prompt, num_full)
        assert [node.hashes for node in cache.tree] == [prompt[:num_full]]
    other = cache.open(prompt[:5])
    assert sorted(node.hashes for node in cache.tree) == sorted([prompt[:5], prompt[5:9]])
    cache.release(held)
    cache.release(other)
    assert cache.extend(cache.open([]), 13)
    assert [node.hashes for node in cache.tree] == [prompt[:3]]
    assert cache.events.take().events[-1] == BlocksRemoved(tuple(reversed(prompt[3:9])))


def test_a_chain_is_not_grown_where_it_is():
    tree = RadixTree()
    tree.grow(tree.root, [b"a", b"b"], [0, 1])
    with pytest.raises(InvariantError, match="page 2 inserted under a hash that page 0 has"):
        tree.grow(tree.root, [b"a", b"c"], [2, 3])
    tree.validate()


def test_evicted_pages_are_counted():
    cache = PrefixCache(4, 1)
    for prompt in ([1, 2, 3], [4, 5, 6]):
        held = cache.open([])
        assert cache.extend(held, 3)
        cache.commit(held, block_hashes(prompt, 1))
        cache.release(held)
    assert cache.num_evicted == 2
    assert cache.clear()
    assert cache.num_evicted == 2


def test_broken_bookkeeping_is_an_error_that_shows_both_sides():
    pool = PagePool(2)
    pages = pool.allocate(1)
    pool.free(pages)
    with pytest.raises(InvariantError, match="page 0 freed twice"):
        pool.free(pages)
    with pytest.raises(InvariantError, match="3 pages wanted, 2 free"):
        pool.allocate(3)
    cache = PrefixCache(4, 1)
    cache.pool.allocate(1)
    with pytest.raises(InvariantError, match=r"free 3 \+ cached 0 \+ private 0 = 3, expected 4"):
        cache.validate()
