"""The order of groups is that of a sort, whatever changed and whoever came and went."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from preble_jax.sched.cost import LinearCostModel
from preble_jax.sched.group_order import GroupOrder
from preble_jax.sched.groups import Group, GroupTable
from preble_jax.sched.slots import slots_of

COST = LinearCostModel(prefill_base_s=0.0, prefill_token_s=1e-9, decode_token_s=1e-9)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), st.integers(0, 2**32), st.integers(1, 40))
def test_orders_are_those_of_a_sort(num_groups: int, seed: int, num_rounds: int) -> None:
    random_ = random.Random(seed)
    table = GroupTable()
    for slot in range(num_groups):
        table.add(Group(str(slot), slot, random_.random(), 10, 0, COST))
    for round_ in range(num_rounds):
        for _ in range(random_.choice((1, 3, num_groups))):
            group = random_.choice(list(table.by_name.values()))
            group.assigned(random_.randrange(5), 1)
            if random_.random() < 0.3:
                group.answered(random_.randrange(3), 1)
            if random_.random() < 0.5:
                group.took("tenant", 1, 1, 1)
            elif group.num_outstanding:
                group.gave_back(1, 1)
        mask = random_.getrandbits(num_groups) if random_.random() < 0.5 else table.up
        mask &= sum(1 << group.slot for group in table.by_name.values())
        members = [table.at(slot) for slot in slots_of(mask)]
        assert list(table.by_load(mask)) == sorted(members, key=lambda g: (g.load_ns, g.rank))
        assert list(table.by_decode_share(mask)) == sorted(members, key=lambda g: (-g.decode_share, g.rank))
        assert list(table.by_queue(mask)) == sorted(members, key=lambda g: (g.num_outstanding, g.rank))
        if mask:
            assert table.heaviest(mask) is max(members, key=lambda g: (g.load_ns, g.rank))
        if round_ % 7 == 6 and len(table.by_name) > 1:
            gone = random_.choice(list(table.by_name.values()))
            while gone.num_assigned:
                gone.assigned(gone.prefill_ns // gone.num_assigned, -1)
            while gone.num_outputs:
                gone.answered(0, -1)
            table.set_state(gone, "gone")
            while gone.num_outstanding:
                table.retire(gone)
                assert table.by_name[gone.name] is gone, "its requests have not ended"
                gone.gave_back(1, 1)
            table.retire(gone)
            assert gone.name not in table.by_name
        table.validate()


@given(st.sets(st.integers(0, 1500)))
def test_slots_of_a_mask_sparse_or_dense(slots: set[int]) -> None:
    assert list(slots_of(sum(1 << slot for slot in slots))) == sorted(slots)


def test_a_group_that_was_never_in_the_order_can_be_removed() -> None:
    order = GroupOrder(lambda group: group.load_ns)
    order.remove(Group("0", 0, 0.5, 10, 0, COST))
    assert list(order.ascending(1)) == []
