from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class PlaceRequest(_message.Message):
    __slots__ = ("request_id", "block_hashes", "num_tokens", "max_tokens", "tenant", "excluded")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    BLOCK_HASHES_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    EXCLUDED_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    block_hashes: bytes
    num_tokens: int
    max_tokens: int
    tenant: str
    excluded: _containers.RepeatedCompositeFieldContainer[GroupProcess]
    def __init__(self, request_id: _Optional[str] = ..., block_hashes: _Optional[bytes] = ..., num_tokens: _Optional[int] = ..., max_tokens: _Optional[int] = ..., tenant: _Optional[str] = ..., excluded: _Optional[_Iterable[_Union[GroupProcess, _Mapping]]] = ...) -> None: ...

class GroupProcess(_message.Message):
    __slots__ = ("group", "generation")
    GROUP_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    group: str
    generation: int
    def __init__(self, group: _Optional[str] = ..., generation: _Optional[int] = ...) -> None: ...

class PlaceResponse(_message.Message):
    __slots__ = ("group", "alternatives", "decision", "matched_tokens", "generation")
    GROUP_FIELD_NUMBER: _ClassVar[int]
    ALTERNATIVES_FIELD_NUMBER: _ClassVar[int]
    DECISION_FIELD_NUMBER: _ClassVar[int]
    MATCHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    group: GroupAddress
    alternatives: _containers.RepeatedCompositeFieldContainer[GroupAddress]
    decision: str
    matched_tokens: int
    generation: int
    def __init__(self, group: _Optional[_Union[GroupAddress, _Mapping]] = ..., alternatives: _Optional[_Iterable[_Union[GroupAddress, _Mapping]]] = ..., decision: _Optional[str] = ..., matched_tokens: _Optional[int] = ..., generation: _Optional[int] = ...) -> None: ...

class PlaceBatch(_message.Message):
    __slots__ = ("first_tokens", "finished", "requests")
    FIRST_TOKENS_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    first_tokens: _containers.RepeatedCompositeFieldContainer[FirstToken]
    finished: _containers.RepeatedCompositeFieldContainer[FinishedRequest]
    requests: _containers.RepeatedCompositeFieldContainer[PlaceRequest]
    def __init__(self, first_tokens: _Optional[_Iterable[_Union[FirstToken, _Mapping]]] = ..., finished: _Optional[_Iterable[_Union[FinishedRequest, _Mapping]]] = ..., requests: _Optional[_Iterable[_Union[PlaceRequest, _Mapping]]] = ...) -> None: ...

class PlaceBatchResponse(_message.Message):
    __slots__ = ("results", "report_errors")
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    REPORT_ERRORS_FIELD_NUMBER: _ClassVar[int]
    results: _containers.RepeatedCompositeFieldContainer[PlaceResult]
    report_errors: _containers.RepeatedCompositeFieldContainer[PlaceError]
    def __init__(self, results: _Optional[_Iterable[_Union[PlaceResult, _Mapping]]] = ..., report_errors: _Optional[_Iterable[_Union[PlaceError, _Mapping]]] = ...) -> None: ...

class PlaceResult(_message.Message):
    __slots__ = ("placement", "error")
    PLACEMENT_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    placement: PlaceResponse
    error: PlaceError
    def __init__(self, placement: _Optional[_Union[PlaceResponse, _Mapping]] = ..., error: _Optional[_Union[PlaceError, _Mapping]] = ...) -> None: ...

class PlaceError(_message.Message):
    __slots__ = ("kind", "message")
    KIND_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    kind: str
    message: str
    def __init__(self, kind: _Optional[str] = ..., message: _Optional[str] = ...) -> None: ...

class GroupAddress(_message.Message):
    __slots__ = ("group", "address")
    GROUP_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    group: str
    address: str
    def __init__(self, group: _Optional[str] = ..., address: _Optional[str] = ...) -> None: ...

class FinishedRequest(_message.Message):
    __slots__ = ("request_id", "output_tokens", "cached_tokens", "failed", "queue_s")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    QUEUE_S_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    output_tokens: int
    cached_tokens: int
    failed: bool
    queue_s: float
    def __init__(self, request_id: _Optional[str] = ..., output_tokens: _Optional[int] = ..., cached_tokens: _Optional[int] = ..., failed: _Optional[bool] = ..., queue_s: _Optional[float] = ...) -> None: ...

class FirstToken(_message.Message):
    __slots__ = ("request_id", "queue_s")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    QUEUE_S_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    queue_s: float
    def __init__(self, request_id: _Optional[str] = ..., queue_s: _Optional[float] = ...) -> None: ...

class FinishedResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class WorkerMessage(_message.Message):
    __slots__ = ("hello", "events", "snapshot", "load", "draining")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    EVENTS_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    events: KVEventBatch
    snapshot: KVSnapshot
    load: GroupLoad
    draining: Draining
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., events: _Optional[_Union[KVEventBatch, _Mapping]] = ..., snapshot: _Optional[_Union[KVSnapshot, _Mapping]] = ..., load: _Optional[_Union[GroupLoad, _Mapping]] = ..., draining: _Optional[_Union[Draining, _Mapping]] = ...) -> None: ...

class SchedulerMessage(_message.Message):
    __slots__ = ("snapshot_request",)
    SNAPSHOT_REQUEST_FIELD_NUMBER: _ClassVar[int]
    snapshot_request: SnapshotRequest
    def __init__(self, snapshot_request: _Optional[_Union[SnapshotRequest, _Mapping]] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("group", "model", "vocab_size", "max_model_len", "page_size", "num_pages", "generation", "queue", "max_num_seqs")
    GROUP_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_LEN_FIELD_NUMBER: _ClassVar[int]
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    NUM_PAGES_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    QUEUE_FIELD_NUMBER: _ClassVar[int]
    MAX_NUM_SEQS_FIELD_NUMBER: _ClassVar[int]
    group: GroupAddress
    model: str
    vocab_size: int
    max_model_len: int
    page_size: int
    num_pages: int
    generation: int
    queue: str
    max_num_seqs: int
    def __init__(self, group: _Optional[_Union[GroupAddress, _Mapping]] = ..., model: _Optional[str] = ..., vocab_size: _Optional[int] = ..., max_model_len: _Optional[int] = ..., page_size: _Optional[int] = ..., num_pages: _Optional[int] = ..., generation: _Optional[int] = ..., queue: _Optional[str] = ..., max_num_seqs: _Optional[int] = ...) -> None: ...

class KVEventBatch(_message.Message):
    __slots__ = ("generation", "first_seq", "events")
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    FIRST_SEQ_FIELD_NUMBER: _ClassVar[int]
    EVENTS_FIELD_NUMBER: _ClassVar[int]
    generation: int
    first_seq: int
    events: _containers.RepeatedCompositeFieldContainer[KVEvent]
    def __init__(self, generation: _Optional[int] = ..., first_seq: _Optional[int] = ..., events: _Optional[_Iterable[_Union[KVEvent, _Mapping]]] = ...) -> None: ...

class KVEvent(_message.Message):
    __slots__ = ("stored", "removed", "cleared")
    STORED_FIELD_NUMBER: _ClassVar[int]
    REMOVED_FIELD_NUMBER: _ClassVar[int]
    CLEARED_FIELD_NUMBER: _ClassVar[int]
    stored: BlocksStored
    removed: BlocksRemoved
    cleared: AllCleared
    def __init__(self, stored: _Optional[_Union[BlocksStored, _Mapping]] = ..., removed: _Optional[_Union[BlocksRemoved, _Mapping]] = ..., cleared: _Optional[_Union[AllCleared, _Mapping]] = ...) -> None: ...

class BlocksStored(_message.Message):
    __slots__ = ("hashes", "parent")
    HASHES_FIELD_NUMBER: _ClassVar[int]
    PARENT_FIELD_NUMBER: _ClassVar[int]
    hashes: _containers.RepeatedScalarFieldContainer[bytes]
    parent: bytes
    def __init__(self, hashes: _Optional[_Iterable[bytes]] = ..., parent: _Optional[bytes] = ...) -> None: ...

class BlocksRemoved(_message.Message):
    __slots__ = ("hashes",)
    HASHES_FIELD_NUMBER: _ClassVar[int]
    hashes: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, hashes: _Optional[_Iterable[bytes]] = ...) -> None: ...

class AllCleared(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class KVSnapshot(_message.Message):
    __slots__ = ("generation", "next_seq", "stored")
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    NEXT_SEQ_FIELD_NUMBER: _ClassVar[int]
    STORED_FIELD_NUMBER: _ClassVar[int]
    generation: int
    next_seq: int
    stored: _containers.RepeatedCompositeFieldContainer[BlocksStored]
    def __init__(self, generation: _Optional[int] = ..., next_seq: _Optional[int] = ..., stored: _Optional[_Iterable[_Union[BlocksStored, _Mapping]]] = ...) -> None: ...

class GroupLoad(_message.Message):
    __slots__ = ("num_waiting", "num_running", "waiting_tokens", "free_pages", "cached_pages", "num_pages", "prompt_tokens", "cached_tokens", "output_tokens", "finished", "steps", "step_s_recent", "prefill_tokens", "decode_rows", "step_s", "admitted", "queue_s", "next_seq", "generation", "tenants")
    NUM_WAITING_FIELD_NUMBER: _ClassVar[int]
    NUM_RUNNING_FIELD_NUMBER: _ClassVar[int]
    WAITING_TOKENS_FIELD_NUMBER: _ClassVar[int]
    FREE_PAGES_FIELD_NUMBER: _ClassVar[int]
    CACHED_PAGES_FIELD_NUMBER: _ClassVar[int]
    NUM_PAGES_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    STEP_S_RECENT_FIELD_NUMBER: _ClassVar[int]
    PREFILL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    DECODE_ROWS_FIELD_NUMBER: _ClassVar[int]
    STEP_S_FIELD_NUMBER: _ClassVar[int]
    ADMITTED_FIELD_NUMBER: _ClassVar[int]
    QUEUE_S_FIELD_NUMBER: _ClassVar[int]
    NEXT_SEQ_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    TENANTS_FIELD_NUMBER: _ClassVar[int]
    num_waiting: int
    num_running: int
    waiting_tokens: int
    free_pages: int
    cached_pages: int
    num_pages: int
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    finished: int
    steps: int
    step_s_recent: float
    prefill_tokens: int
    decode_rows: int
    step_s: float
    admitted: int
    queue_s: float
    next_seq: int
    generation: int
    tenants: _containers.RepeatedCompositeFieldContainer[TenantLoad]
    def __init__(self, num_waiting: _Optional[int] = ..., num_running: _Optional[int] = ..., waiting_tokens: _Optional[int] = ..., free_pages: _Optional[int] = ..., cached_pages: _Optional[int] = ..., num_pages: _Optional[int] = ..., prompt_tokens: _Optional[int] = ..., cached_tokens: _Optional[int] = ..., output_tokens: _Optional[int] = ..., finished: _Optional[int] = ..., steps: _Optional[int] = ..., step_s_recent: _Optional[float] = ..., prefill_tokens: _Optional[int] = ..., decode_rows: _Optional[int] = ..., step_s: _Optional[float] = ..., admitted: _Optional[int] = ..., queue_s: _Optional[float] = ..., next_seq: _Optional[int] = ..., generation: _Optional[int] = ..., tenants: _Optional[_Iterable[_Union[TenantLoad, _Mapping]]] = ...) -> None: ...

class TenantLoad(_message.Message):
    __slots__ = ("tenant", "extend_tokens", "output_tokens", "admitted", "queue_s", "deficit")
    TENANT_FIELD_NUMBER: _ClassVar[int]
    EXTEND_TOKENS_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ADMITTED_FIELD_NUMBER: _ClassVar[int]
    QUEUE_S_FIELD_NUMBER: _ClassVar[int]
    DEFICIT_FIELD_NUMBER: _ClassVar[int]
    tenant: str
    extend_tokens: int
    output_tokens: int
    admitted: int
    queue_s: float
    deficit: float
    def __init__(self, tenant: _Optional[str] = ..., extend_tokens: _Optional[int] = ..., output_tokens: _Optional[int] = ..., admitted: _Optional[int] = ..., queue_s: _Optional[float] = ..., deficit: _Optional[float] = ...) -> None: ...

class Draining(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class SnapshotRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetStateRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetStateResponse(_message.Message):
    __slots__ = ("groups", "placement", "counters", "tenants")
    class CountersEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    PLACEMENT_FIELD_NUMBER: _ClassVar[int]
    COUNTERS_FIELD_NUMBER: _ClassVar[int]
    TENANTS_FIELD_NUMBER: _ClassVar[int]
    groups: _containers.RepeatedCompositeFieldContainer[GroupState]
    placement: str
    counters: _containers.ScalarMap[str, float]
    tenants: _containers.RepeatedCompositeFieldContainer[TenantState]
    def __init__(self, groups: _Optional[_Iterable[_Union[GroupState, _Mapping]]] = ..., placement: _Optional[str] = ..., counters: _Optional[_Mapping[str, float]] = ..., tenants: _Optional[_Iterable[_Union[TenantState, _Mapping]]] = ...) -> None: ...

class TenantState(_message.Message):
    __slots__ = ("tenant", "weight", "deficits", "num_placed", "num_refills", "refill_pressure")
    class DeficitsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    TENANT_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    DEFICITS_FIELD_NUMBER: _ClassVar[int]
    NUM_PLACED_FIELD_NUMBER: _ClassVar[int]
    NUM_REFILLS_FIELD_NUMBER: _ClassVar[int]
    REFILL_PRESSURE_FIELD_NUMBER: _ClassVar[int]
    tenant: str
    weight: float
    deficits: _containers.ScalarMap[str, float]
    num_placed: int
    num_refills: int
    refill_pressure: float
    def __init__(self, tenant: _Optional[str] = ..., weight: _Optional[float] = ..., deficits: _Optional[_Mapping[str, float]] = ..., num_placed: _Optional[int] = ..., num_refills: _Optional[int] = ..., refill_pressure: _Optional[float] = ...) -> None: ...

class GroupState(_message.Message):
    __slots__ = ("hello", "load", "draining", "decisions", "num_outstanding", "matched_tokens", "held_pages", "prefill_base_s", "prefill_token_s", "decode_token_s")
    class DecisionsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    HELLO_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    DECISIONS_FIELD_NUMBER: _ClassVar[int]
    NUM_OUTSTANDING_FIELD_NUMBER: _ClassVar[int]
    MATCHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    HELD_PAGES_FIELD_NUMBER: _ClassVar[int]
    PREFILL_BASE_S_FIELD_NUMBER: _ClassVar[int]
    PREFILL_TOKEN_S_FIELD_NUMBER: _ClassVar[int]
    DECODE_TOKEN_S_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    load: GroupLoad
    draining: bool
    decisions: _containers.ScalarMap[str, int]
    num_outstanding: int
    matched_tokens: int
    held_pages: int
    prefill_base_s: float
    prefill_token_s: float
    decode_token_s: float
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., load: _Optional[_Union[GroupLoad, _Mapping]] = ..., draining: _Optional[bool] = ..., decisions: _Optional[_Mapping[str, int]] = ..., num_outstanding: _Optional[int] = ..., matched_tokens: _Optional[int] = ..., held_pages: _Optional[int] = ..., prefill_base_s: _Optional[float] = ..., prefill_token_s: _Optional[float] = ..., decode_token_s: _Optional[float] = ...) -> None: ...
