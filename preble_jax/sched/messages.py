"""What goes into the global scheduler and what comes out of it: plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

from preble_jax.errors import InvalidRequestError

Decision = Literal["exploit", "explore", "balance", "rebalance", "replicate", "round_robin"]


@dataclass(frozen=True, kw_only=True, slots=True)
class PlaceRequest:
    """A request as the scheduler sees it: no text, no tokens.

    block_hashes: the prompt's full pages, as preble_jax.kv.hashing makes them; may be shorter than the prompt.
    max_tokens: output budget. excluded: groups that must not be chosen (those that failed this request already).
    """

    request_id: str
    block_hashes: tuple[bytes, ...]
    num_tokens: int
    max_tokens: int = 0
    tenant: str = "default"
    excluded: frozenset[str] = frozenset()


def check_request(request: PlaceRequest, page_size: int) -> None:
    """Raises InvalidRequestError for numbers that cannot be."""
    name = request.request_id
    if not name or request.num_tokens < 1 or request.max_tokens < 0:
        raise InvalidRequestError(
            f"request {name!r}: expected an id, num_tokens >= 1 and max_tokens >= 0, got {request.num_tokens} and "
            f"{request.max_tokens}"
        )
    if not request.tenant:
        raise InvalidRequestError(f"request {name!r}: expected a tenant, got an empty name; the default is 'default'")
    num_full = request.num_tokens // page_size
    if len(request.block_hashes) > num_full:
        raise InvalidRequestError(
            f"request {name!r}: expected at most {num_full} block hashes ({request.num_tokens} tokens, page size "
            f"{page_size}, full pages only), got {len(request.block_hashes)}"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """alternatives: runners-up for a retry, best first. matched_tokens: prompt tokens `group` is believed to hold."""

    group: str
    alternatives: tuple[str, ...]
    decision: Decision
    matched_tokens: int


@dataclass(frozen=True, slots=True)
class RequestSnapshot:
    """Ask this group for a snapshot of its prefix tree: events were missed, or may have been."""

    group: str


@dataclass(frozen=True, slots=True)
class GroupLost:
    """The group said nothing for too long and was removed. When it speaks again it has to be added anew."""

    group: str


Instruction = RequestSnapshot | GroupLost


class LoadReport(Protocol):
    """The part of a group's load report the scheduler reads."""

    @property
    def num_waiting(self) -> int: ...

    @property
    def num_running(self) -> int: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupStats:
    """One row of the live table.

    num_placed, decisions: placements so far, and by kind. num_outstanding: placed, not reported finished.
    matched_tokens: prompt tokens believed cached when placed. prompt_tokens, cached_tokens: of finished requests, as
    the group reported them. held_pages: pages the forest believes here. load_s: L, the load of the window.
    """

    group: str
    draining: bool
    num_waiting: int
    num_running: int
    num_outstanding: int
    num_placed: int
    num_failed: int
    decisions: Mapping[Decision, int] = field(default_factory=dict)
    matched_tokens: int
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    held_pages: int
    num_pages: int
    load_s: float

    @property
    def hit_ratio(self) -> float:
        """Cached prompt tokens over prompt tokens, of finished requests; 0 before the first."""
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class TenantStats:
    """One tenant's row, of a policy that knows tenants (d2lpm).

    deficits: by group, service the tenant may still be given there before a refill, in service units
    (TenantSettings). num_placed, num_refills: since the tenant was last new. refill_pressure: refill quanta per
    placement: how fast its demand uses up its shares; well above its service per request over the quantum, its
    requests all want the same group.
    """

    weight: float
    deficits: Mapping[str, float]
    num_placed: int
    num_refills: int
    refill_pressure: float


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyStats:
    """What a placement policy tells of itself. counters: name -> value, names are the policy's own."""

    counters: Mapping[str, float] = field(default_factory=dict)
    tenants: Mapping[str, TenantStats] = field(default_factory=dict)
