"""Between protobuf messages and the project's dataclasses. Values are checked by the dataclasses, not here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from functools import lru_cache
from struct import Struct
from typing import TYPE_CHECKING, Any

from preble_jax.errors import InvalidRequestError
from preble_jax.kv.events import AllCleared, BlocksRemoved, BlocksStored, EventBatch, KVEvent, Snapshot
from preble_jax.kv.hashing import HASH_BYTES
from preble_jax.request import FinishReason, Request
from preble_jax.sampling_params import SamplingParams
from preble_jax.sched.messages import PlaceRequest
from serve.protos.preble.v1 import sampling_pb2, scheduler_pb2, worker_pb2

if TYPE_CHECKING:
    from preble_jax.engine.service import GroupLoad

DEFAULT_TENANT = "default"

_OPTIONAL_SAMPLING = ("max_tokens", "temperature", "top_k", "top_p", "min_p", "seed")
_FINISH_REASONS: dict[FinishReason, int] = {
    "stop": sampling_pb2.FINISH_REASON_STOP,
    "length": sampling_pb2.FINISH_REASON_LENGTH,
}
_FINISH_NAMES: dict[int, FinishReason] = {number: name for name, number in _FINISH_REASONS.items()}


def sampling_to_proto(sampling: SamplingParams) -> sampling_pb2.SamplingParams:
    return sampling_pb2.SamplingParams(**asdict(sampling))


def sampling_from_proto(message: sampling_pb2.SamplingParams) -> SamplingParams:
    """Raises `InvalidRequestError` for a value out of range."""
    given = {name: getattr(message, name) for name in _OPTIONAL_SAMPLING if message.HasField(name)}
    return SamplingParams(
        stop=tuple(message.stop),
        stop_token_ids=tuple(message.stop_token_ids),
        ignore_eos=message.ignore_eos,
        logprobs=message.logprobs,
        **given,
    )


def finish_reason_to_proto(reason: FinishReason | None) -> Any:
    """None, and the reasons that end a call with a status instead, are UNSPECIFIED."""
    return _FINISH_REASONS.get(reason, sampling_pb2.FINISH_REASON_UNSPECIFIED) if reason else 0


def finish_reason_from_proto(number: int) -> FinishReason | None:
    return _FINISH_NAMES.get(number)


def request_from_proto(message: worker_pb2.WorkerGenerateRequest, deadline_s: float | None) -> Request:
    """deadline_s: on the engine's clock."""
    return Request(
        request_id=message.request_id,
        prompt_token_ids=list(message.prompt_token_ids),
        sampling=sampling_from_proto(message.sampling),
        stop_token_ids=frozenset(message.stop_token_ids),
        tenant=message.tenant,
        cache_salt=message.cache_salt,
        deadline_s=deadline_s,
    )


def load_to_proto(load: GroupLoad) -> scheduler_pb2.GroupLoad:
    fields = asdict(load)
    tenants = [
        scheduler_pb2.TenantLoad(**{name: value for name, value in tenant.items() if value is not None})
        for tenant in fields.pop("tenants")
    ]
    return scheduler_pb2.GroupLoad(**fields, tenants=tenants)


def hashes_to_bytes(block_hashes: Sequence[bytes]) -> bytes:
    return b"".join(block_hashes)


def hashes_from_bytes(packed: bytes) -> tuple[bytes, ...]:
    """Raises `InvalidRequestError` for what is no whole number of hashes."""
    num, rest = divmod(len(packed), HASH_BYTES)
    if rest:
        raise InvalidRequestError(
            f"block_hashes: expected a multiple of {HASH_BYTES} bytes, got {len(packed)}; pack the hashes of "
            "preble_jax.kv.hashing one after the other"
        )
    return _hash_struct(num).unpack(packed)


@lru_cache(maxsize=1024)
def _hash_struct(num: int) -> Struct:
    """Unpacks in one call: a microsecond for 100 hashes, where slicing in a loop takes six."""
    return Struct(f"{HASH_BYTES}s" * num)


def place_request_from_proto(message: scheduler_pb2.PlaceRequest, excluded: Iterable[str] = ()) -> PlaceRequest:
    """excluded: groups that still are the processes which failed the request.

    Raises `InvalidRequestError` for hashes that are none.
    """
    return PlaceRequest(
        request_id=message.request_id,
        block_hashes=hashes_from_bytes(message.block_hashes),
        num_tokens=message.num_tokens,
        max_tokens=message.max_tokens,
        tenant=message.tenant or DEFAULT_TENANT,
        excluded=frozenset(excluded),
    )


def events_to_proto(batch: EventBatch) -> scheduler_pb2.KVEventBatch:
    return scheduler_pb2.KVEventBatch(
        generation=batch.generation,
        first_seq=batch.first_seq,
        events=[_event_to_proto(event) for event in batch.events],
    )


def events_from_proto(message: scheduler_pb2.KVEventBatch) -> EventBatch:
    """Raises `InvalidRequestError` for a kind of event this version does not know."""
    events = tuple(_event_from_proto(event) for event in message.events)
    return EventBatch(generation=message.generation, first_seq=message.first_seq, events=events)


def snapshot_to_proto(snapshot: Snapshot) -> scheduler_pb2.KVSnapshot:
    stored = [_stored_to_proto(chain) for chain in snapshot.stored]
    return scheduler_pb2.KVSnapshot(generation=snapshot.generation, next_seq=snapshot.next_seq, stored=stored)


def snapshot_from_proto(message: scheduler_pb2.KVSnapshot) -> Snapshot:
    stored = tuple(_stored_from_proto(chain) for chain in message.stored)
    return Snapshot(generation=message.generation, next_seq=message.next_seq, stored=stored)


def _event_to_proto(event: KVEvent) -> scheduler_pb2.KVEvent:
    if isinstance(event, BlocksStored):
        return scheduler_pb2.KVEvent(stored=_stored_to_proto(event))
    if isinstance(event, BlocksRemoved):
        return scheduler_pb2.KVEvent(removed=scheduler_pb2.BlocksRemoved(hashes=event.hashes))
    return scheduler_pb2.KVEvent(cleared=scheduler_pb2.AllCleared())


def _event_from_proto(message: scheduler_pb2.KVEvent) -> KVEvent:
    kinds: dict[str | None, Callable[[], KVEvent]] = {
        "stored": lambda: _stored_from_proto(message.stored),
        "removed": lambda: BlocksRemoved(tuple(message.removed.hashes)),
        "cleared": AllCleared,
    }
    kind = message.WhichOneof("event")
    if kind not in kinds:
        raise InvalidRequestError(
            f"KVEvent: expected one of {', '.join(map(str, kinds))}, got none; update the scheduler"
        )
    return kinds[kind]()


def _stored_to_proto(chain: BlocksStored) -> scheduler_pb2.BlocksStored:
    return scheduler_pb2.BlocksStored(hashes=chain.hashes, parent=chain.parent or b"")


def _stored_from_proto(message: scheduler_pb2.BlocksStored) -> BlocksStored:
    return BlocksStored(tuple(message.hashes), message.parent or None)
