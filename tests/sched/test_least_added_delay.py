"""Least added delay: each term of its cost, by example. That all of it is as defined: test_baselines.py."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from oracles.naive_forest import chain
from preble_jax.config import SchedSettings, TenantSettings
from preble_jax.kv.events import BlocksStored, EventBatch
from preble_jax.sched import GlobalScheduler, Placement, PlaceRequest
from preble_jax.sched.cost import LinearCostModel

PAGE_SIZE = 4
COST = LinearCostModel(prefill_base_s=0.0, prefill_token_s=0.01, decode_token_s=0.002, decode_row_s=0.001)
LONG = (1,) * 10


def scheduler(
    num_groups: int = 2, max_num_seqs: int = 0, weights: Mapping[str, float] = MappingProxyType({}), **kwargs
) -> GlobalScheduler:
    tenants = TenantSettings(weights=tuple(weights.items()))
    made = GlobalScheduler(SchedSettings(**{"group_timeout_s": 1e9, **kwargs}), PAGE_SIZE, cost=COST, tenants=tenants)
    for group in range(num_groups):
        made.add_group(str(group), 10_000, 0, 0.0, max_num_seqs=max_num_seqs)
    return made


def place(made: GlobalScheduler, name: str, path: Sequence[int], **kwargs) -> Placement:
    request = PlaceRequest(request_id=name, block_hashes=chain(path), num_tokens=len(path) * PAGE_SIZE + 1, **kwargs)
    return made.place(request, 0.0)


def store(made: GlobalScheduler, group: str, path: Sequence[int]) -> None:
    """The group holds it, and nothing was sent there."""
    cursor = made._groups.get(group).cursor
    made.kv_events(group, EventBatch(0, cursor.next_seq, (BlocksStored(chain(path), None),)), 0.0)


def busy(made: GlobalScheduler, group: str, num_pages: int, *, tenant: str = "default", started: bool = False) -> str:
    """A request of its own prefix is queued on a group, or decodes there."""
    number = made.num_outstanding
    name, others = f"busy{number}", frozenset(made._groups.by_name) - {group}
    place(made, name, [2 + number % 250] * num_pages, excluded=others, tenant=tenant)
    if started:
        made.first_token(name, 0.0)
    return name


def test_an_idle_cluster_uses_the_longest_match() -> None:
    made = scheduler(3)
    store(made, "0", LONG[:4])
    store(made, "2", LONG)
    placement = place(made, "a", LONG)
    assert (placement.group, placement.matched_tokens, placement.decision) == ("2", 40, "exploit")
    assert placement.alternatives == ("0", "1"), "those that hold less come next"


def test_on_an_idle_cluster_new_prefixes_go_where_the_fewest_were_sent() -> None:
    made, groups = scheduler(4), Counter[str]()
    for i in range(40):
        placement = place(made, str(i), (1 + i,) * 10)
        made.finished(str(i), 5, 0, 0.0)
        groups[placement.group] += 1
        assert placement.decision == "explore"
    assert groups == dict.fromkeys("0123", 10)


def test_a_shorter_match_on_an_idle_group_beats_the_longest_behind_a_queue() -> None:
    for left_out, expected in (("", ("1", 36, "0")), ("shorter", ("0", 40, "2"))):
        made = scheduler(3, delay_without=left_out)
        store(made, "0", LONG)
        store(made, "1", LONG[:9])
        busy(made, "0", 3, started=True)
        busy(made, "1", 3, started=True)
        assert place(made, "a", LONG).group == "0", "who decodes there is not waited for"
        made.finished("a", 1, 0, 0.0)
        busy(made, "0", 2)  # 9 tokens before it, where 1 has 4 more to compute and nobody waits
        placement = place(made, "b", LONG)
        assert (placement.group, placement.matched_tokens, placement.alternatives[0]) == expected


def test_what_nobody_shares_goes_to_the_shortest_wait_whatever_the_price_of_work() -> None:
    for outstanding in (0, 30):
        made = scheduler(3, delay_others=50.0, delay_decoding=0.0)
        for _ in range(outstanding):
            busy(made, "1", 1, started=True)  # they have their first tokens: nothing to wait for
        busy(made, "0", 5)
        busy(made, "2", 3)
        assert place(made, "a", LONG).group == "1"


def test_a_group_full_of_others_that_decode_is_avoided() -> None:
    for decoding, expected in ((0.25, "1"), (0.0, "0")):
        made = scheduler(2, delay_decoding=decoding, delay_others=0.0)
        store(made, "0", LONG[:1])
        made.finished(busy(made, "0", 1), 80, 0, 0.0)  # an output of 80 tokens: 80 ms of others' steps
        for _ in range(4):
            busy(made, "0", 1, started=True)
        assert place(made, "a", LONG).group == expected, "4 * 80 ms * 0.25 are more than 4 tokens' 40 ms"


def test_the_price_of_work_grows_with_what_is_outstanding_anywhere() -> None:
    """One page that would have to be computed twice, against a queue of two."""

    def choice(num_outstanding: int, **kwargs: float) -> str:
        made = scheduler(4, delay_decoding=0.0, **kwargs)
        store(made, "0", LONG[:5])
        busy(made, "0", 5)  # 21 tokens to wait for; elsewhere 20 more to compute
        for i in range(num_outstanding):
            busy(made, str(1 + i % 3), 1, started=True)
        return place(made, "a", LONG).group

    assert choice(0) == "0", "one request on four groups is a price already: 20 * (1 + 1 / 16) > 21"
    assert choice(0, delay_others=0.0) != "0"
    assert choice(0, delay_others=0.125) != "0"
    assert choice(7, delay_others=0.125) == "0", "eight are: 20 * (1 + 8 / 32)"


def test_a_hot_prefix_gets_as_many_copies_as_its_share_of_the_requests_wants() -> None:
    """The price of work is prohibitive, but a copy that is wanted costs its own time only."""

    def num_holders(share: float, **kwargs: str) -> int:
        made = scheduler(4, delay_others=1000.0, delay_decoding=0.0, **kwargs)
        groups = set()
        for i in range(400):
            hot = int((i + 1) * share) > int(i * share)
            groups.add(place(made, str(i), LONG if hot else (2 + i % 250,) * 10).group if hot else "")
            if not hot:
                place(made, str(i), (2 + i % 250,) * 10)
        return len(groups - {""})

    assert num_holders(0.02) == 1
    assert num_holders(0.5) == 2
    assert num_holders(1.0) == 4
    assert num_holders(1.0, delay_without="copies") == 1


def test_a_flood_of_one_tenant_does_not_scare_another_away_from_its_prefix() -> None:
    def choice(tenant: str, **kwargs: str) -> str:
        made = scheduler(2, delay_others=0.0, delay_decoding=0.0, **kwargs)
        store(made, "0", LONG)
        for _ in range(30):
            busy(made, "0", 10, tenant="greedy")
        return place(made, "a", LONG, tenant=tenant).group

    assert choice("modest") == "0", "one token of its own, and as much of the flood"
    assert choice("greedy") == "1", "who floods waits for all of it"
    assert choice("modest", delay_without="tenants") == "1"


def test_what_a_tenant_has_queued_counts_for_each_that_has() -> None:
    """Tenants: own 5 tokens, two others far more; a request of 1 token waits for at most (5 + 1) * 3, and its token
    delays the three or four that it overtakes."""

    def choice(elsewhere: int) -> str:
        made = scheduler(2, delay_others=0.0, delay_decoding=0.0)
        store(made, "0", LONG)
        for tenant in ("b", "c"):
            busy(made, "0", 50, tenant=tenant)
        busy(made, "0", 1, tenant="own")
        store(made, "1", LONG)
        if elsewhere:
            busy(made, "1", elsewhere, tenant="own")
        return place(made, "a", LONG, tenant="own").group

    assert choice(4) == "1", "17 tokens"
    assert choice(6) == "0", "25 tokens"


def test_nobody_waits_for_more_than_what_is_queued() -> None:
    """Both groups have less queued than a tenant's share would be, and the better one was sent more before."""
    made = scheduler(2, delay_others=0.0, delay_decoding=0.0, delay_without="overtaken")
    made.finished(busy(made, "0", 9), 1, 0, 0.0)
    busy(made, "0", 1, tenant="b")
    busy(made, "1", 2, tenant="b")
    assert place(made, "a", LONG, tenant="own").group == "0"


def test_a_request_overtakes_where_the_fewest_wait_behind_it() -> None:
    """It waits for its tenant's share on either group, and delays who is left of the flood."""

    def choice(**kwargs: str | int) -> str:
        made = scheduler(2, delay_others=0.0, delay_decoding=0.0, **kwargs)
        made.finished(busy(made, "1", 500), 1, 0, 0.0)  # by the work of the window, 0 is the better one
        for group in "01":
            busy(made, group, 0, tenant="modest", started=True)
        for i in range(30):
            busy(made, str(int(i < 10)), 10, tenant="greedy")
        return place(made, "a", LONG, tenant="modest").group

    assert choice() == "1"
    assert choice(delay_without="overtaken") == "0"
    assert choice(d2lpm_quantum_tokens=100) == "0", "the flood has had more already"
    assert choice(d2lpm_quantum_tokens=1000) == "1", "1230 tokens more are within 2 * 1000"


def test_work_is_cheap_where_only_those_wait_that_were_given_more() -> None:
    """161 tokens to wait for on 0; on 1, where a flood waits, 82 and 40 to compute that 0 holds."""

    def choice(**kwargs: str) -> str:
        made = scheduler(2, delay_decoding=0.0, d2lpm_quantum_tokens=100, **kwargs)
        store(made, "0", LONG)
        busy(made, "0", 40, tenant="modest")
        for _ in range(30):
            busy(made, "1", 10, tenant="greedy")
        return place(made, "a", LONG, tenant="modest").group

    assert choice(delay_without="overtaken") == "1"
    assert choice(delay_without="overtaken,standing") == "0", "31 requests on two groups: 155 tokens more"


def test_who_was_given_more_waits_rather_than_goes_elsewhere() -> None:
    """61 tokens of its own to wait for, or 40 to compute; 3 of 9 requests are of tenants that had as much."""

    def choice(**kwargs: str) -> str:
        made = scheduler(2, delay_others=0.0, delay_decoding=0.0, d2lpm_quantum_tokens=100, **kwargs)
        store(made, "0", LONG)
        for _ in range(6):
            busy(made, "1", 0, tenant="modest", started=True)
        busy(made, "1", 100, tenant="greedy", started=True)
        busy(made, "0", 15, tenant="greedy")
        return place(made, "a", LONG, tenant="greedy").group

    assert choice() == "0"
    assert choice(delay_without="standing") == "1"


def test_who_goes_first_anyway_is_not_overtaken() -> None:
    """On 0 it waits for 12 tokens of 14 and overtakes 2, on 1 it waits for 2 of 20 and overtakes 18: 22 requests have
    34 tokens queued, so that 18 of them are 11.6 requests, and 2 are 1.3."""

    def choice(**kwargs: str) -> str:
        made = scheduler(2, delay_others=0.0, delay_decoding=0.0, **kwargs)
        store(made, "0", LONG)
        store(made, "1", LONG)
        busy(made, "0", 1, tenant="own")
        busy(made, "0", 2, tenant="greedy")
        for _ in range(20):
            busy(made, "1", 0, tenant="greedy")
        return place(made, "a", LONG, tenant="own").group

    assert choice() == "0", "12 + 1.3 against 2 + 11.6"
    assert choice(delay_without="overtaken") == "1"


def test_before_any_output_has_ended_a_request_is_taken_at_its_word() -> None:
    """A budget is an output that was seen once: full groups are told apart from the first request on."""

    def choice(max_tokens: int, *outputs: int) -> str:
        made = scheduler(2, max_num_seqs=4, delay_others=0.0, delay_decoding=0.0)
        for output in outputs:
            made.finished(busy(made, "0", 1), output, 0, 0.0)
        for _ in range(4):
            busy(made, "0", 0, started=True)
        busy(made, "1", 1)
        return place(made, "a", LONG, max_tokens=max_tokens).group

    assert choice(0) == "0", "no output is expected, so a slot costs nothing"
    assert choice(80) == "1", "80 ms for a slot against 5 tokens"
    assert choice(80, 10, 10) == "0", "(80 + 20) / 3 are 34 tokens"
    assert choice(80, 80) == "1"


def test_a_full_group_makes_wait_for_a_decode_slot() -> None:
    """Outputs of 80 tokens, of which four end every 4 * 80 ms: 80 ms for each slot, or 8 tokens of a prompt."""

    def choice(pages_elsewhere: int, num_running: int = 4, num_waiting: int = 0, **kwargs: str | int) -> str:
        made = scheduler(2, **{"max_num_seqs": 4, "delay_others": 0.0, "delay_decoding": 0.0, **kwargs})
        made.finished(busy(made, "0", 1), 80, 0, 0.0)
        for _ in range(num_running):
            busy(made, "0", 0, started=True)
        for _ in range(num_waiting):
            busy(made, "0", 0)
        busy(made, "1", pages_elsewhere)
        return place(made, "a", LONG).group

    assert choice(1) == "1", "5 tokens"
    assert choice(2) == "0", "9 tokens"
    assert choice(1, num_running=3) == "0", "a slot is free"
    assert choice(1, max_num_seqs=0) == "0", "it did not say how many it runs"
    assert choice(1, delay_without="slots") == "0"
    assert choice(6, num_waiting=2) == "1", "2 tokens and three slots against 25 tokens"
    assert choice(7, num_waiting=2) == "0", "against 29"


def test_groups_are_told_apart_by_what_they_need_themselves() -> None:
    made = scheduler(2, delay_others=0.0)
    for group, factor in (("0", 1.5), ("1", 0.9)):
        own = LinearCostModel(prefill_base_s=0.0, prefill_token_s=0.01 * factor, decode_token_s=0.002)
        made._state.set_cost(made._groups.get(group), own)
    assert place(made, "a", LONG).group == "1"
    busy(made, "1", 20)
    assert place(made, "b", LONG).group == "0"


def test_a_faster_group_is_found_among_those_that_hold_less() -> None:
    """By the prices of group 0, whoever holds nothing is out of the question."""
    made = scheduler(5, delay_others=0.0)
    for group in "0123":
        store(made, group, LONG)
    made._state.set_cost(
        made._groups.get("4"), LinearCostModel(prefill_base_s=0.0, prefill_token_s=0.0001, decode_token_s=0.002)
    )
    assert place(made, "a", LONG).group == "4"


def test_as_many_groups_of_a_level_as_are_looked_at_are_those_with_the_fewest_requests() -> None:
    """The best, which nobody would miss on a smaller cluster, has a request more than those that are looked at."""

    def choice(num_groups: int) -> str:
        made = scheduler(num_groups, delay_decoding=0.0)
        for i in range(num_groups - 1):
            busy(made, str(i), 2)
        best = str(num_groups - 1)
        for _ in range(2):
            busy(made, best, 1, started=True)
        return place(made, "a", LONG).group

    assert choice(64) == "63"
    assert choice(65) != "64"


def test_holders_are_found_among_a_thousand_groups() -> None:
    made = scheduler(1_000)
    store(made, "777", LONG)
    store(made, "333", LONG[:9])
    busy(made, "777", 0)
    placement = place(made, "a", LONG)
    assert (placement.group, placement.alternatives[0]) == ("777", "333")


def test_a_tenant_waits_for_as_much_of_anothers_flood_as_their_weights_say() -> None:
    """Its prefix is where 400 tokens of another are queued; elsewhere it would be 40 tokens to compute."""
    for weights, expected in (({}, "0"), ({"gold": 100.0}, "1"), ({"asks": 0.01}, "1"), ({"asks": 100.0}, "0")):
        made = scheduler(2, weights=weights, delay_others=0.0, delay_decoding=0.0, delay_without="overtaken,standing")
        store(made, "0", LONG)
        for _ in range(10):
            busy(made, "0", 10, tenant="gold")
        assert place(made, "a", LONG, tenant="asks").group == expected, weights


def test_a_group_whose_pages_are_all_wanted_is_waited_for() -> None:
    """As if it had slots for those only that fit; what they share counts once."""
    for num_pages, shared, expected in ((10_000, False, "0"), (24, False, "1"), (24, True, "0")):
        made = scheduler(0, delay_others=0.0, delay_decoding=0.0)
        made.add_group("0", num_pages, 0, 0.0)
        made.add_group("1", 10_000, 0, 0.0)
        made.finished(busy(made, "1", 1), 1000, 0, 0.0)  # outputs are known: 1 s of their rows' time
        store(made, "0", LONG)
        store(made, "0", [7] * 10)
        for i in range(3):
            name = f"decodes{i}"
            path = [7] * 10 if shared else [8 + i] * 10
            place(made, name, path, excluded=frozenset("1"))
            made.first_token(name, 0.0)
        assert place(made, "a", LONG).group == expected, (num_pages, shared)


def test_prices_do_not_depend_on_who_joined_first() -> None:
    """The holder's queue at which an idle group is better: the same, wherever the slow group stands in the table."""

    def turning_point(costs: Mapping[str, float]) -> int:
        for num_queued in range(40):
            made = scheduler(0, delay_decoding=0.0, delay_others=0.1)
            for name, token_s in costs.items():
                made.add_group(name, 10_000, 0, 0.0)
                cost = LinearCostModel(prefill_base_s=0.0, prefill_token_s=token_s, decode_token_s=0.002)
                made._state.set_cost(made._groups.get(name), cost)
            store(made, "holder", LONG)
            for _ in range(num_queued):
                busy(made, "holder", 1)
            if place(made, "a", LONG).group != "holder":
                return num_queued
        raise AssertionError

    slow, fast = {"slow": 0.04}, {"holder": 0.01, "idle": 0.01}
    assert turning_point(slow | fast) == turning_point(fast | slow)


def test_a_group_that_comes_back_counts_in_the_prices_again() -> None:
    made = scheduler(1)
    cost = LinearCostModel(prefill_base_s=0.0, prefill_token_s=0.02, decode_token_s=0.002)
    made._state.set_cost(made._groups.get("0"), cost)
    place(made, "a", LONG)  # what was sent to it keeps it in mind
    made.remove_group("0", 0.0)
    made.validate()
    made.add_group("0", 10_000, 1, 0.0)
    made.validate()
    assert place(made, "b", LONG).group == "0"
    assert made._state.mean_cost.prefill_ns(100) == cost.prefill_ns(100)
