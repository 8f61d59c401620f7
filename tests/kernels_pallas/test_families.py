"""The planner against brute force, the invariants of what it hands out, and the cost rule's decisions."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_pallas import Geometry, SharedPrefixes
from kernels_pallas.families import FamilyPlanner
from kernels_pallas.family_costs import COSTS, FamilyCosts
from oracles.naive_families import best_saving, naive_runs

PAGE = 16
# One pass serves a family of any size: reading together is always strictly better.
ALWAYS = FamilyCosts(prompt_tile=1, prompt_pass=1.0, family_tile=10_000, family_pass=0.01, row=0, family=0, step=0)


@st.composite
def steps(draw):
    """Page tables that grew on a tree: (tables, q_lens, kv_lens, num_decode_slots). Rows end in pages of their own."""
    num_decode = draw(st.integers(0, 6))
    num = num_decode + draw(st.integers(0 if num_decode else 1, 4))
    pages = iter(draw(st.permutations(range(300))))
    tables, q_lens, kv_lens = [], [], []
    for s in range(num):
        q_len = 1 if s < num_decode else draw(st.integers(1, 40))
        context = draw(st.sampled_from([0, 5, 16, 31, 32, 33, 64, 100, 160, 161])) - (
            s < num_decode and draw(st.booleans())
        )
        context = max(context, 0)
        columns = -(-(context + q_len) // PAGE)
        parent = draw(st.integers(-1, s - 1))
        copied = [] if parent < 0 else tables[parent][: min(draw(st.integers(0, 10)), context // PAGE)]
        tables.append([*copied, *(next(pages) for _ in range(columns - len(copied)))])
        q_lens.append(q_len)
        kv_lens.append(context + q_len)
    for s in range(num_decode):
        if draw(st.integers(0, 5)) == 0:
            kv_lens[s] = 0  # an empty slot: its row may hold anything
    return tables, q_lens, kv_lens, num_decode


def arrays(step, padding=2):
    tables, q_lens, kv_lens, num_decode = step
    table = np.zeros((len(tables) + padding, max(map(len, tables)) + 1), np.int32)
    for row, pages in zip(table, tables, strict=False):
        row[: len(pages)] = pages
    cu_q_lens = np.concatenate([[0], np.cumsum(q_lens), [sum(q_lens)] * padding]).astype(np.int32)
    return table, cu_q_lens, np.array([*kv_lens, *[0] * padding], np.int32), num_decode


def plan(step, *, costs=ALWAYS, levels=2):
    table, cu_q_lens, kv_lens, num_decode = arrays(step)
    planner = FamilyPlanner(page_size=PAGE, levels=levels, costs=costs)
    num_tokens = int(cu_q_lens[-1]) + 3
    return planner.plan(table, cu_q_lens, kv_lens, num_decode_slots=num_decode, num_tokens=num_tokens)


def families(shared, cu_q_lens):
    """[(first key, key after the last, members)] as the arrays say it."""
    found = []
    for f in range(shared.num_families[0]):
        tokens = shared.tokens[shared.cu_q_lens[f] : shared.cu_q_lens[f + 1]]
        members = sorted(set(np.searchsorted(cu_q_lens, tokens, side="right") - 1))
        found.append((int(shared.kv_starts[f]), int(shared.kv_lens[f]), tuple(map(int, members))))
    return found


def shareable(step):
    """Pages of each sequence that all its queries see whole."""
    _, q_lens, kv_lens, _ = step
    return [max(n - q, 0) // PAGE for q, n in zip(q_lens, kv_lens, strict=True)]


@settings(max_examples=150, deadline=None)
@given(steps(), st.integers(1, 3))
def test_what_a_sequence_reads_is_its_keys_once(step, levels):
    tables, q_lens, kv_lens, _ = step
    shared = plan(step, levels=levels)
    table, cu_q_lens, *_ = arrays(step)
    for s in range(len(tables)):
        read = [f for f in families(shared, cu_q_lens) if s in f[2]]
        ends = [0, *(stop for _, stop, _ in read)]
        assert [start for start, _, _ in read] == ends[:-1], "families of a sequence are consecutive from key 0"
        assert shared.own_starts[s] == ends[-1] <= max(kv_lens[s] - q_lens[s], 0)
        assert len(read) <= levels
    assert not shared.own_starts[len(tables) :].any()
    for f, (_, stop, members) in enumerate(families(shared, cu_q_lens)):
        columns = stop // PAGE
        rows = table[list(members), :columns]
        assert len(members) > 1 and (rows == table[shared.table_rows[f], :columns]).all()


@settings(max_examples=100, deadline=None)
@given(steps(), st.integers(1, 3))
def test_rows_lead_back_to_the_tokens(step, levels):
    shared = plan(step, levels=levels)
    num_rows = shared.cu_q_lens[shared.num_families[0]]
    token, level = np.nonzero(shared.rows < len(shared.tokens))
    rows = shared.rows[token, level]
    assert sorted(rows) == list(range(num_rows))
    np.testing.assert_array_equal(shared.tokens[rows], token)
    assert (shared.cu_q_lens[shared.num_families[0] :] == num_rows).all()


@settings(max_examples=150, deadline=None)
@given(steps())
def test_every_run_is_found(step):
    """Where all families pay and levels do not end, they are the runs of brute force."""
    tables, *_ = step
    shared = plan(step, levels=12)
    want = {(start * PAGE, stop * PAGE, members) for start, stop, members in naive_runs(tables, shareable(step))}
    assert set(families(shared, arrays(step)[1])) == want


costs = st.builds(
    FamilyCosts,
    prompt_tile=st.sampled_from([1, 16]),
    prompt_pass=st.sampled_from([1.0, 3.0]),
    family_tile=st.sampled_from([1, 4, 64]),
    family_pass=st.sampled_from([0.5, 1.5, 3.0]),
    row=st.sampled_from([0.0, 8.0, 40.0]),
    family=st.sampled_from([0.0, 30.0]),
    step=st.sampled_from([0.0, 100.0]),
)


@settings(max_examples=150, deadline=None)
@given(steps(), costs, st.integers(1, 3))
def test_the_choice_saves_most(step, rule, levels):
    tables, q_lens, _, num_decode = step
    plain = rule.plain(np.array(q_lens), num_decode)

    def saved(run, start):
        members = list(run[2])
        return rule.saved(plain[members].sum(), sum(q_lens[s] for s in members), (run[1] - start) * PAGE)

    best = best_saving(naive_runs(tables, shareable(step)), saved, levels)
    shared = plan(step, costs=rule, levels=levels)
    got = sum(
        saved((None, stop // PAGE, members), start // PAGE)
        for start, stop, members in families(shared, arrays(step)[1])
    )
    assert got == pytest.approx(best if best > rule.step else 0.0)


def decode_step(num, shared_pages, own_pages=5):
    tables = [[*range(shared_pages), *range(1000 * (s + 1), 1000 * (s + 1) + own_pages)] for s in range(num)]
    return tables, [1] * num, [(shared_pages + own_pages) * PAGE] * num, num


@pytest.mark.parametrize(
    ("backend", "num", "shared_pages", "splits"),
    [
        ("jnp", 2, 64, False),  # a family tile costs more than two decode slots
        ("jnp", 16, 64, True),
        ("jnp", 16, 2, False),  # too short for what gathering and merging cost
        ("gpu", 2, 64, False),  # not worth a second kernel
        ("gpu", 64, 512, True),
        ("tpu", 64, 512, True),
    ],
)
def test_when_splitting_pays(backend, num, shared_pages, splits):
    shared = plan(decode_step(num, shared_pages), costs=COSTS[backend])
    assert bool(shared.num_families[0]) == splits


def test_long_prompt_chunks_gain_nothing():
    """Their own tiles are full already."""
    tables, _, _, _ = decode_step(4, 256, own_pages=40)
    q_lens, kv_lens = [512] * 4, [256 * PAGE + 512] * 4
    assert not plan((tables, q_lens, kv_lens, 0), costs=COSTS["gpu"]).num_families[0]
    assert plan((tables, [8] * 4, [256 * PAGE + 8] * 4, 0), costs=COSTS["gpu"]).num_families[0]


def test_prompt_chunks_are_left_out_where_the_costs_say_so():
    """Two decode slots and two chunks share pages: the arrays cover the slots' tokens and name no other."""
    tables, _, _, _ = decode_step(4, 256)
    step = tables, [1, 1, 8, 8], [256 * PAGE + 8] * 4, 2
    everybody, slots = plan(step), plan(step, costs=replace(ALWAYS, of_prompts=False))
    assert everybody.cu_q_lens[1] == 18 and len(everybody.rows) > 18
    assert slots.cu_q_lens[1] == 2 and len(slots.rows) == 2
    assert slots.own_starts.tolist() == [256 * PAGE, 256 * PAGE, 0, 0, 0, 0]


def test_a_system_prompt_and_tool_lists():
    """16 sequences share 32 pages, 8 each 32 more; a short common part is read with the longer ones below it."""
    for first, expected in ((32, [(0, 512), (512, 1024), (512, 1024)]), (1, [(0, 528), (0, 528)])):
        tables = [[*range(first), *range(100 * (1 + s // 8), 100 * (1 + s // 8) + 32), 1000 + s] for s in range(16)]
        step = tables, [1] * 16, [(first + 32) * PAGE + 3] * 16, 16
        shared = plan(step, costs=replace(COSTS["jnp"], family=200.0, row=30.0))
        assert [f[:2] for f in families(shared, arrays(step)[1])] == expected


def chain_step(num):
    """Decode slots of which each has a page more than the one before, all theirs shared but the last."""
    tables = [[*range(s + 1), 1000 + s] for s in range(num)]
    return tables, [1] * num, [(s + 1) * PAGE + 1 for s in range(num)], num


@pytest.mark.parametrize("rule", [ALWAYS, COSTS["jnp"], COSTS["tpu"]], ids=["always", "jnp", "tpu"])
@pytest.mark.parametrize("levels", [1, 2, 12])
def test_a_tree_as_deep_as_there_are_sequences(rule, levels):
    step = chain_step(512)
    shared = plan(step, costs=rule, levels=levels)
    found = families(shared, arrays(step)[1])
    assert found
    for s in range(512):
        read = [(start, stop) for start, stop, members in found if s in members]
        assert [start for start, _ in read] == [0, *(stop for _, stop in read)][:-1], "consecutive from key 0"
        assert shared.own_starts[s] == max((stop for _, stop in read), default=0) <= (s + 1) * PAGE
        assert len(read) <= levels
    for _, stop, members in found:
        assert len(members) > 1 and members[0] * PAGE + PAGE >= stop, "a member has all of the run's pages"


@pytest.mark.parametrize("head", [0, 3, 200])
def test_thinning_a_deep_tree_costs_little(head):
    """Against the best single family, of all runs of a chain behind `head` pages that everybody shares."""
    num, rule = 100, COSTS["jnp"]
    tables = [[*range(head + s + 1), 1000 + s] for s in range(num)]
    step = tables, [1] * num, [(head + s + 1) * PAGE + 1 for s in range(num)], num
    ((start, stop, members),) = families(plan(step, costs=rule, levels=1), arrays(step)[1])
    best = max(rule.saved(num - s, num - s, (head + s + 1) * PAGE) for s in range(num - 1))
    assert start == 0 and rule.saved(len(members), len(members), stop) >= 0.8 * best


def test_static_sizes():
    step = decode_step(6, 4)
    shared, nothing = plan(step), SharedPrefixes.empty(num_tokens=9, num_seqs=8)
    assert [x.shape for x in shared] == [x.shape for x in nothing]
    assert all(x.dtype == np.int32 for x in (*shared, *nothing))
    whole = Geometry(
        num_tokens=9,
        num_seqs=8,
        pages_per_seq=4,
        num_q_heads=4,
        num_kv_heads=2,
        head_dim=64,
        page_size=PAGE,
        num_decode_slots=6,
        page_dtype=np.dtype("float32"),
        q_dtype=np.dtype("float32"),
    )
    of_families = shared.geometry(whole)
    assert (of_families.num_tokens, of_families.num_seqs, of_families.num_decode_slots) == (18, 8, 0)
    assert not of_families.causal


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="page_size and levels of at least 1"):
        FamilyPlanner(page_size=PAGE, levels=0)
