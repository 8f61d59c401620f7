"""Messages and dataclasses say the same."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preble_jax.errors import InvalidRequestError
from preble_jax.kv.events import AllCleared, BlocksRemoved, BlocksStored, EventBatch, KVEvent, Snapshot
from preble_jax.sampling_params import SamplingParams
from serve import wire
from serve.protos.preble.v1 import sampling_pb2, scheduler_pb2

HASHES = st.lists(st.binary(min_size=16, max_size=16), min_size=1).map(tuple)
STORED = st.builds(BlocksStored, HASHES, st.none() | st.binary(min_size=16, max_size=16))
EVENTS: st.SearchStrategy[KVEvent] = st.one_of(STORED, st.builds(BlocksRemoved, HASHES), st.just(AllCleared()))
NUMBERS = st.integers(0, 2**62)
SAMPLING = st.builds(
    SamplingParams,
    max_tokens=st.integers(1, 2**31 - 1),
    temperature=st.floats(0.0, 10.0),
    top_k=st.integers(0, 2**31 - 1),
    top_p=st.floats(0.0, 1.0, exclude_min=True),
    min_p=st.floats(0.0, 1.0),
    seed=st.none() | st.integers(0, 2**32 - 1),
    stop=st.lists(st.text(min_size=1)),
    stop_token_ids=st.lists(st.integers(0, 2**31 - 1)),
    ignore_eos=st.booleans(),
    logprobs=st.booleans(),
)


@given(batch=st.builds(EventBatch, NUMBERS, NUMBERS, st.lists(EVENTS).map(tuple)))
def test_events(batch: EventBatch) -> None:
    assert wire.events_from_proto(wire.events_to_proto(batch)) == batch


@given(snapshot=st.builds(Snapshot, NUMBERS, NUMBERS, st.lists(STORED).map(tuple)))
def test_snapshots(snapshot: Snapshot) -> None:
    assert wire.snapshot_from_proto(wire.snapshot_to_proto(snapshot)) == snapshot


@given(sampling=SAMPLING)
def test_sampling(sampling: SamplingParams) -> None:
    assert wire.sampling_from_proto(wire.sampling_to_proto(sampling)) == sampling


def test_what_a_client_leaves_out_takes_its_default() -> None:
    assert wire.sampling_from_proto(sampling_pb2.SamplingParams()) == SamplingParams()


def test_an_event_of_a_later_version_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="KVEvent"):
        wire.events_from_proto(scheduler_pb2.KVEventBatch(events=[scheduler_pb2.KVEvent()]))
