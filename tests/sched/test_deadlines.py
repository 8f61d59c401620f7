from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from preble_jax.request import Request
from preble_jax.sampling_params import SamplingParams
from preble_jax.sched.deadlines import Deadlines
from preble_jax.sched.sequence import Sequence


def sequence(order, deadline_s):
    request = Request(request_id=str(order), prompt_token_ids=[1], sampling=SamplingParams(), deadline_s=deadline_s)
    return Sequence(request, order, 4, 0.0, 0)


events = st.one_of(
    st.tuples(st.just("add"), st.one_of(st.none(), st.integers(0, 20))),
    st.tuples(st.just("end"), st.integers(0, 30)),
    st.tuples(st.just("pass"), st.integers(0, 20)),
)


@given(st.lists(events, max_size=60))
def test_as_if_everybody_were_looked_at(events):
    deadlines, live, count = Deadlines(), {}, 0
    for what, value in events:
        if what == "add":
            live[count] = sequence(count, value)
            deadlines.add(live[count])
            count += 1
        elif what == "end" and value in live:
            deadlines.remove(live.pop(value))
        elif what == "pass":
            late = [s for s in live.values() if s.request.deadline_s is not None and s.request.deadline_s <= value]
            late.sort(key=lambda s: (s.request.deadline_s, s.order))
            assert deadlines.take_passed(value) == late
            for s in late:
                del live[s.order]


def test_requests_that_end_in_time_do_not_pile_up():
    deadlines = Deadlines()
    for order in range(10_000):
        early = sequence(order, 1e9)
        deadlines.add(early)
        deadlines.remove(early)
    assert len(deadlines._heap) < 100
