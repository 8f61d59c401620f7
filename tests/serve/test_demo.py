"""The demonstration without a cluster of its own: its requests, its figures, what it shows."""

from __future__ import annotations

import asyncio
import io
import json
import time
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from fakes.deployment import Deployment
from preble_jax.sampling_params import SamplingParams
from serve.client import Usage
from serve.demo.requests import DemoRequest, load_requests
from serve.demo.run import stream_all
from serve.demo.summary import Outcome, quantiles, summarize, summary_table
from serve.demo.view import LineView, LiveView, make_view
from serve.protos.preble.v1 import scheduler_pb2 as pb


def usage(group: str, cached_tokens: int) -> Usage:
    return Usage(prompt_tokens=100, cached_tokens=cached_tokens, output_tokens=10, group=group)


def group(name: str, **decisions: int) -> pb.GroupState:
    return pb.GroupState(hello=pb.Hello(group=pb.GroupAddress(group=name), queue="dlpm"), decisions=decisions)


def state(*groups: pb.GroupState, placement: str = "least_added_delay") -> pb.GetStateResponse:
    return pb.GetStateResponse(groups=groups, placement=placement)


OUTCOMES = [
    Outcome(index=0, family="tools", text="yes", ttft_s=0.1, latency_s=1.0, usage=usage("a", 0)),
    Outcome(index=1, family="tools", text="no", ttft_s=0.3, latency_s=3.0, usage=usage("a", 80)),
    Outcome(index=2, family="document", latency_s=2.0, error="gone [dim]"),
]


def test_every_question_of_three_families_is_asked_once_in_an_order_of_the_seed() -> None:
    requests = load_requests(seed=1)
    assert len(requests) == len({(request.family, request.question) for request in requests}) == 24
    assert set(Counter(request.family for request in requests).values()) == {8}
    assert [request.index for request in requests] == list(range(24))
    assert load_requests(seed=1) == requests
    assert [r.question for r in load_requests(seed=2)] != [r.question for r in requests]


def test_requests_of_a_family_begin_alike_and_others_do_not() -> None:
    def beginning(request: DemoRequest) -> str:
        prompt = request.prompt
        return prompt[:1000] if isinstance(prompt, str) else str(prompt[0])[:1000]

    assert len({(request.family, beginning(request)) for request in load_requests(seed=0)}) == 3


def test_the_summary_adds_up() -> None:
    now = state(group("a", exploit=1, explore=2, rebalance=4), group("b"))
    document = json.loads(json.dumps(summarize(OUTCOMES, now, 4.0).to_json()))
    assert (document["placement"], document["queue"]) == ("least_added_delay", "dlpm")
    assert document["requests"] == 3
    assert document["failures"] == 1
    assert document["hit_ratio"] == 0.4
    assert document["output_tokens"] == 20
    assert document["ttft_s"] == {"p50": 0.1, "p90": 0.3, "p99": 0.3, "max": 0.3}
    assert document["latency_s"]["max"] == 3.0
    assert document["groups"]["a"]["requests"] == 2
    assert document["groups"]["a"]["hit_ratio"] == 0.4
    assert (document["groups"]["a"]["exploit"], document["groups"]["a"]["explore"]) == (1, 2)
    assert (document["groups"]["a"]["rebalance"], document["groups"]["a"]["balance"]) == (4, 0)
    assert document["groups"]["b"]["hit_ratio"] == 0


@given(values=st.lists(st.floats(0, 100), min_size=1))
def test_quantiles_are_values_in_order(values: list[float]) -> None:
    found = list(quantiles(values).values())
    assert found == sorted(found)
    assert set(found) <= set(values)
    assert found[-1] == max(values)
    assert sum(value <= found[0] for value in values) * 2 >= len(values)


def test_a_run_without_answers_has_a_summary_too() -> None:
    summary = summarize(OUTCOMES[2:], state(), 1.0)
    assert summary.to_json()["hit_ratio"] == 0
    Console(file=io.StringIO()).print(summary_table([summary]))


def test_two_runs_stand_side_by_side() -> None:
    output = io.StringIO()
    runs = [
        summarize(OUTCOMES, state(group("a", exploit=3), placement=placement), 4.0)
        for placement in ("least_added_delay", "round_robin")
    ]
    Console(file=output, width=120).print(summary_table(runs))
    assert "least_added_delay" in output.getvalue()
    assert "round_robin" in output.getvalue()
    assert "2 (3 exploit)" in output.getvalue()
    assert output.getvalue().count("dlpm") == 2


@pytest.mark.parametrize("terminal", [False, True])
def test_views_show_answers_failures_groups_and_policies(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    output = io.StringIO()
    console = Console(file=output, width=120, force_terminal=terminal, color_system=None, _environ={"TERM": "xterm"})
    view = make_view(console)
    assert type(view) is (LiveView if terminal else LineView)
    with view:
        running = Outcome(index=3, family="few_shot", text="so far\nso good [b]")
        later = time.monotonic() + 60.0  # the groups' line is not shown every time
        monkeypatch.setattr(time, "monotonic", lambda: later)
        view.update([*OUTCOMES, running], state(group("worker-7", exploit=1)))
        for outcome in OUTCOMES:
            view.ended(outcome)
    shown = output.getvalue()
    assert "80 of 100 prompt tokens cached" in shown
    assert "FAILED: gone [dim]" in shown
    assert "placement least_added_delay, local queue dlpm" in shown
    assert "worker-7" in shown
    if terminal:
        assert "so far so good [b]" in shown
    else:
        assert "\x1b" not in shown


async def test_answers_stream_into_outcomes_and_failures_are_outcomes_too(deployment: Deployment) -> None:
    requests = [
        DemoRequest(index=i, family="f", question="q", prompt=prompt) for i, prompt in enumerate(["abcabc", "", "xyz"])
    ]
    ended = io.StringIO()
    with LineView(Console(file=ended)) as view:
        outcomes = [Outcome(index=request.index, family="f") for request in requests]
        sampling = SamplingParams(max_tokens=3, temperature=0.0)
        await asyncio.wait_for(stream_all(deployment.client, requests, outcomes, sampling, view), 10)
    assert [outcome.text for outcome in outcomes] == ["abc", "", "xyz"]
    assert [bool(outcome.error) for outcome in outcomes] == [False, True, False]
    assert all(outcome.latency_s is not None for outcome in outcomes)
    assert ended.getvalue().count("FAILED") == 1
