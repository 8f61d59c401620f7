from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from preble_jax.kv.hashing import BlockHasher, block_hashes, cache_salt

tokens = st.lists(st.integers(0, 3), max_size=40)


@given(tokens, tokens, st.integers(1, 5))
def test_equal_hashes_mean_equal_prefixes(a, b, page_size):
    for i, (x, y) in enumerate(zip(block_hashes(a, page_size), block_hashes(b, page_size), strict=False)):
        end = (i + 1) * page_size
        assert (x == y) == (a[:end] == b[:end])


@given(tokens, st.integers(1, 5), st.data())
def test_hashing_while_the_sequence_grows_changes_nothing(a, page_size, data):
    hasher = BlockHasher(page_size, b"salt")
    for cut in sorted(data.draw(st.lists(st.integers(0, len(a)), max_size=4))):
        hasher.extend(a[:cut])
    assert hasher.extend(a) == block_hashes(a, page_size, b"salt")
    assert len(hasher.hashes) == len(a) // page_size


@given(tokens, st.integers(1, 5), st.data())
def test_hashes_that_are_known_need_no_tokens(a, page_size, data):
    hashes = block_hashes(a, page_size)
    known = hashes[: data.draw(st.integers(0, len(hashes)))]
    blank = [9] * (len(known) * page_size) + a[len(known) * page_size :]
    hasher = BlockHasher(page_size, known=known)
    cut = data.draw(st.integers(0, len(a)))
    assert hasher.extend(blank[:cut]) == hashes[: cut // page_size]  # those of tokens that are not there yet wait
    assert hasher.extend(blank) == hashes


@given(st.binary(max_size=40), st.integers(1, 5))
def test_bytes_are_tokens(a, page_size):
    assert block_hashes(bytearray(a), page_size) == block_hashes(a, page_size) == block_hashes(list(a), page_size)


def test_salts_separate_models_tenants_and_adapters():
    salts = [
        cache_salt("m"),
        cache_salt("m", b"t"),
        cache_salt("m", adapter="t"),
        cache_salt("mt"),
        cache_salt("m", b""),
    ]
    hashes = [block_hashes([1, 2, 3, 4], 2, salt)[0] for salt in salts]
    assert hashes[0] == hashes[4]
    assert len(set(hashes)) == 4


def test_a_long_salt_is_used_whole():
    long = b"x" * 100
    assert block_hashes([1], 1, long + b"a") != block_hashes([1], 1, long + b"b")


def test_known_value():
    """Groups and frontends of different versions must agree: the hash is part of the protocol."""
    assert block_hashes([1, 2, 3], 2, b"k")[0].hex() == "247aaf55db55e89029ab643776e4502f"
