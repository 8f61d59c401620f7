"""Every workload keeps the contract of requests; names, sizes and seeds do what they say."""

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from preble_jax.errors import ConfigError
from preble_jax.sim.request import SimRequest, Workload
from preble_jax.sim.workloads import WORKLOADS, Given, make_workload, shared_ratio
from preble_jax.sim.workloads.build import build
from preble_jax.sim.workloads.catalog import RECIPES
from preble_jax.sim.workloads.shape import Client


def _make(name: str, **changes: object) -> Workload:
    arguments: dict[str, object] = {
        "rate": 8.0,
        "num_requests": 300,
        "duration_s": None,
        "num_groups": 2,
        "seed": 3,
    }
    return make_workload(name, **(arguments | changes))


def _check(workload: Workload) -> None:
    """The contract of SimRequest and Workload, the slow and plain way."""
    before: dict[int, int | None] = {}
    checked: set[int] = set()
    last_s = 0.0
    for index, request in enumerate(workload.requests):
        assert request.arrival_s >= last_s
        last_s = request.arrival_s
        assert request.num_prompt >= 1 and request.num_output >= 1 and request.think_s >= 0
        assert len(request.blocks) * workload.block_size <= request.num_prompt
        if id(request.blocks) not in checked:  # the workload keeps it alive
            checked.add(id(request.blocks))
            for previous, block in zip((None, *request.blocks), request.blocks, strict=False):
                assert before.setdefault(block, previous) == previous
        if request.follows is not None:
            earlier = workload.requests[request.follows]
            assert request.follows < index and earlier.tenant == request.tenant
            assert request.num_prompt > earlier.num_prompt + earlier.num_output - workload.block_size
            assert request.blocks[: len(earlier.blocks)] == earlier.blocks
        else:
            assert request.think_s == 0


@pytest.mark.parametrize("name", WORKLOADS)
def test_requests_keep_the_contract(name: str) -> None:
    workload = _make(name)
    assert workload.name == name and len(workload.requests) == 300
    _check(workload)


@pytest.mark.parametrize("name", WORKLOADS)
def test_the_seed_decides(name: str) -> None:
    first, again, other = _make(name), _make(name), _make(name, seed=4)
    assert first == again
    assert list(first.requests) != list(other.requests)


@pytest.mark.parametrize("name", sorted(set(WORKLOADS) - {"vtc_increase"}))
def test_the_rate_is_the_whole_clusters_in_the_long_run(name: str) -> None:
    requests = _make(name, num_requests=None, duration_s=1_800.0, rate=3.0).requests
    assert len(requests) / 1_800.0 == pytest.approx(3.0, rel=0.09)
    assert 1_700.0 < requests[-1].arrival_s <= 1_800.0


def test_the_end_is_what_comes_first() -> None:
    assert len(_make("toolbench", num_requests=50, duration_s=1_000.0).requests) == 50
    assert len(_make("toolbench", num_requests=50_000, duration_s=10.0).requests) < 150
    assert _make("loogle", num_requests=None, rate=0.5).requests[-1].arrival_s == pytest.approx(560.0, abs=20.0)


def test_another_rate_has_the_same_requests_at_other_times() -> None:
    slow, fast = (_make("toolbench", rate=rate).requests for rate in (2.0, 8.0))
    assert [request.arrival_s for request in slow] == pytest.approx([4 * request.arrival_s for request in fast])
    for one, other in zip(slow, fast, strict=True):
        assert (one.num_prompt, one.num_output, one.blocks) == (other.num_prompt, other.num_output, other.blocks)


def test_a_longer_run_begins_with_the_same_requests() -> None:
    for name in ("toolbench", "vtc_on_off", "chat"):
        few, many = (_make(name, num_requests=count).requests for count in (100, 300))
        assert _plain(few) == _plain(many[:100])


def _plain(requests: Sequence[SimRequest]) -> list[tuple[float, int, int, str]]:
    return [(one.arrival_s, one.num_prompt, one.num_output, one.tenant) for one in requests]


def test_prefixes_grow_with_the_cluster() -> None:
    def num_prefixes(num_groups: int) -> int:
        workload = _make("loogle", num_groups=num_groups, num_requests=2_000)
        return len({request.blocks[-1] for request in workload.requests})

    assert [num_prefixes(groups) for groups in (1, 2, 8)] == [12, 24, 96]


def test_requests_of_one_prefix_share_the_tuple() -> None:
    workload = _make("toolbench")
    by_last = {request.blocks[-1]: request.blocks for request in workload.requests}
    assert all(request.blocks is by_last[request.blocks[-1]] for request in workload.requests)


def _uses(requests: Sequence[SimRequest]) -> list[int]:
    """Requests of each prefix, the most popular one first."""
    counts = Counter(request.blocks[-1] for request in requests)
    return sorted(counts.values(), reverse=True)


def test_skew() -> None:
    even, zipf, steep, hot = (
        _uses(_make(name, num_requests=4_000).requests) for name in ("toolbench", "zipf", "zipf_steep", "hot_prefix")
    )
    assert even[0] / 4_000 < 0.02
    weights = np.arange(1, 401) ** -1.1
    assert zipf[0] / 4_000 == pytest.approx(1 / weights.sum(), rel=0.15)
    assert steep[0] / 4_000 > 2 * zipf[0] / 4_000
    assert hot[0] / 4_000 == pytest.approx(0.7, abs=0.03) and hot[1] / 4_000 < 0.02


def test_shift_changes_the_popular_prefixes() -> None:
    requests = _make("shift", num_requests=6_000, rate=2.0).requests

    def popular(part: int) -> set[int]:
        counts = Counter(request.blocks[-1] for request in requests[part * 1_000 + 100 : part * 1_000 + 900])
        return {block for block, _ in counts.most_common(10)}

    overlaps = [len(popular(part) & popular(part + 1)) for part in range(5)]
    assert max(overlaps) <= 3
    steady = _make("zipf", num_requests=6_000).requests
    half = [Counter(request.blocks[-1] for request in steady[start : start + 3_000]) for start in (0, 3_000)]
    assert len({b for b, _ in half[0].most_common(10)} & {b for b, _ in half[1].most_common(10)}) >= 7


def test_agents_run_side_by_side_and_wait_for_their_last_step() -> None:
    workload = _make("agent", num_requests=4_000)
    followed = [request.follows for request in workload.requests if request.follows is not None]
    assert len(set(followed)) == len(followed), "a step has one next step"
    first_round = workload.requests[:200]
    assert all(request.follows is None for request in first_round), "each of 200 lanes once"
    assert all(request.think_s == 0 for request in workload.requests)
    gaps = [index - request.follows for index, request in enumerate(workload.requests) if request.follows is not None]
    assert max(gaps) < 400


def test_conversations_think() -> None:
    workload = _make("chat", num_requests=3_000)
    thinks = [request.think_s for request in workload.requests if request.follows is not None]
    assert np.mean(thinks) == pytest.approx(15.0, rel=0.1)
    assert 0.6 < len(thinks) / 3_000 < 0.85
    early = [request.arrival_s for request in workload.requests]
    assert np.searchsorted(early, 60.0) / 60.0 == pytest.approx(8.0, rel=0.2), "settled from the start"


def test_conversations_end_before_their_prompt_gets_too_long() -> None:
    recipe = RECIPES["chat"]
    shape = replace(recipe.clients[0].shape, max_prompt=2_000)
    short = replace(recipe, clients=(Client(shape=shape),))
    workload = build(short, rate=8.0, num_requests=2_000, duration_s=None, num_groups=2, seed=0)
    _check(workload)
    assert 1_900 < max(request.num_prompt for request in workload.requests) <= 2_000


def test_tenants_have_their_shares() -> None:
    counts = Counter(request.tenant for request in _make("d2lpm_s1", num_requests=6_000).requests)
    assert len(counts) == 8
    assert counts["client-0"] / 6_000 == pytest.approx(8 / 15, abs=0.03)
    long, *others = _lengths(_make("d2lpm_s2", num_requests=4_000))
    assert long > 3 * max(others)


def _lengths(workload: Workload) -> list[float]:
    found: dict[str, list[int]] = {}
    for request in workload.requests:
        found.setdefault(request.tenant, []).append(request.num_prompt)
    return [float(np.mean(found[tenant])) for tenant in sorted(found)]


def test_tenants_have_prefixes_of_their_own_unless_they_share_a_pool() -> None:
    def tenants_of_blocks(name: str) -> set[int]:
        tenants: dict[int, set[str]] = {}
        for request in _make(name, num_requests=3_000).requests:
            for block in request.blocks:
                tenants.setdefault(block, set()).add(request.tenant)
        return {len(names) for names in tenants.values()}

    assert tenants_of_blocks("d2lpm_s1") == {1}
    assert max(tenants_of_blocks("shared_tools")) == 8


def test_vtc_on_and_off() -> None:
    requests = _make("vtc_on_off", num_requests=None, duration_s=600.0, rate=2.25).requests
    assert {(request.num_prompt, request.num_output, request.blocks) for request in requests} == {(256, 256, ())}
    first = [request.arrival_s for request in requests if request.tenant == "client-0"]
    other = [request.arrival_s for request in requests if request.tenant == "client-1"]
    assert (len(first), len(other)) == (pytest.approx(150, abs=2), pytest.approx(1_200, abs=2))
    assert all(time_s % 120 <= 60 + 1e-6 for time_s in first)
    assert np.std(np.diff(other)) < 1e-9


def test_given_arrivals_take_the_place_of_the_workloads_own() -> None:
    times = tuple(float(time_s) for time_s in itertools.accumulate([1, 1, 5, 1] * 50))
    workload = _make("mixed", arrivals=Given(at_s=times), num_requests=200)
    gaps = np.diff([request.arrival_s for request in workload.requests])
    assert set(np.round(gaps / gaps.min(), 6)) <= {1.0, 5.0}
    _check(workload)


def test_shared_ratio() -> None:
    def request(blocks: tuple[int, ...], num_prompt: int) -> SimRequest:
        return SimRequest(arrival_s=0.0, num_prompt=num_prompt, num_output=1, blocks=blocks)

    requests = [request((1, 2, 3), 40), request((1, 2, 4), 30), request((), 10), request((1, 2, 4), 25)]
    workload = Workload(name="tiny", block_size=10, requests=requests)
    assert shared_ratio(workload) == (20 + 25) / 105
    assert shared_ratio(Workload(name="none", block_size=10, requests=[])) == 0


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("toolbensh", {}, "nearest is 'toolbench'"),
        ("toolbench", {"rate": 0.0}, "rate above 0"),
        ("toolbench", {"rate": float("nan")}, "rate above 0"),
        ("toolbench", {"duration_s": -1.0}, "duration_s above 0"),
        ("toolbench", {"num_requests": 0}, "num_requests of at least 1"),
        ("toolbench", {"num_groups": 0}, "num_groups of at least 1"),
        ("toolbench", {"seed": -1}, "seed of at least 0"),
    ],
)
def test_bad_arguments_are_refused(name: str, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _make(name, **changes)


def test_the_table_in_the_docs_has_every_workload() -> None:
    page = (Path(__file__).parents[3] / "docs" / "workloads.md").read_text()
    rows = [line.split("|")[1].strip().strip("`") for line in page.splitlines() if line.startswith("| `")]
    assert sorted(row for row in rows if row in WORKLOADS) == sorted(WORKLOADS)
