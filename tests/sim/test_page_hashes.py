"""Names of pages stand for what is in them, whatever the sizes of blocks and pages."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preble_jax.kv.hashing import block_hashes
from preble_jax.sim.page_hashes import PageHashes
from preble_jax.sim.request import SimRequest, Workload


def tokens_of(index, workload):
    """Distinct tokens for distinct content: of a block by its id, beyond the blocks by the request. What a later prompt
    has of the request is as it is there."""
    request, size = workload.requests[index], workload.block_size
    blocks, num_named, num_tokens = request.blocks, request.num_prompt, request.num_prompt + request.num_output
    for later in workload.requests:
        known = zip(request.blocks, later.blocks, strict=False)
        if (
            later.follows == index
            and len(later.blocks) >= len(blocks)
            and all(a == b for a, b in known)
            and later.num_prompt >= request.num_prompt + request.num_output
        ):
            blocks, num_named = later.blocks, num_tokens
            break
    tokens = []
    for position in range(num_tokens):
        if position < num_named and position // size < len(blocks):
            tokens.append(1 + blocks[position // size] * size + position % size)
        else:
            tokens.append(-1 - index)
    return tokens


@st.composite
def workloads(draw):
    """Ids along a chain are those of a prefix tree: an id is made from the one before it."""
    block_size = draw(st.integers(1, 40))
    requests = []
    chains = []
    for index in range(draw(st.integers(1, 6))):
        choices = draw(st.lists(st.integers(0, 1), max_size=6))
        follows = draw(st.sampled_from([None, *range(index)]))
        if follows is not None and draw(st.integers(0, 3)):
            choices = chains[follows] + choices
        chains.append(choices)
        blocks, block = [], 1
        for choice in choices:
            block = 2 * block + choice
            blocks.append(block)
        beyond = draw(st.integers(1 - block_size, 30)) if blocks else draw(st.integers(1, 60))
        requests.append(
            SimRequest(
                arrival_s=0.0,
                num_prompt=len(blocks) * block_size + beyond,
                num_output=draw(st.integers(1, 60)),
                blocks=tuple(blocks),
                follows=follows,
            )
        )
    return Workload(name="w", block_size=block_size, requests=requests)


@settings(max_examples=200, deadline=None)
@given(workload=workloads(), page_size=st.integers(1, 40))
def test_pages_are_named_alike_exactly_where_their_hashes_are(workload, page_size):
    hashes = PageHashes(workload, page_size)
    meaning: dict[bytes, bytes] = {}
    for index, request in enumerate(workload.requests):
        names = hashes.of(index)
        real = block_hashes(tokens_of(index, workload), page_size)
        assert len(names) == len(real) == (request.num_prompt + request.num_output) // page_size
        assert all(len(name) == 16 for name in names)
        for name, content in zip(names, real, strict=True):
            assert meaning.setdefault(name, content) == content
    assert len(set(meaning.values())) == len(meaning)


def test_ids_may_be_large_and_negative():
    workload = Workload(
        name="w",
        block_size=16,
        requests=[
            SimRequest(arrival_s=0.0, num_prompt=32, num_output=1, blocks=(block, 5)) for block in (2**63 - 1, -(2**63))
        ],
    )
    hashes = PageHashes(workload, 16)
    names = [hashes.of(index) for index in range(len(workload.requests))]
    assert names[0][0] != names[1][0]
    assert names[0][1] == names[1][1]


@pytest.mark.parametrize("num_prompt", [1, 14])
def test_less_than_a_page_has_no_name(num_prompt):
    request = SimRequest(arrival_s=0.0, num_prompt=num_prompt, num_output=1, blocks=(3,))
    assert PageHashes(Workload(name="w", block_size=64, requests=[request]), 16).of(0) == ()
