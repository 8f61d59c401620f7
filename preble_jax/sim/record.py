"""What a simulation leaves behind: one record a request, one a device group, and what was served when."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

Status = Literal["finished", "failed", "rejected", "unfinished"]


@dataclass(kw_only=True, slots=True)
class RequestRecord:
    """Times in seconds of simulated time; None where it did not come to that.

    index: position in the workload. sent_s: when the client sent it (latency counts from here). group: the device group
    that finished it, or tried last. decision: of that placement. finished_s: of finished requests only. cached_tokens:
    prompt tokens the group did not compute. made_tokens: output tokens until it ended, or until they were last counted.
    queue_s: waited in the group before its first step. num_placements: more than 1 after retries.
    status: "rejected": refused as overload or as too long; "failed": lost with its group after tokens had been made,
    placed while no group could take it, or the follower of one that did not finish (then sent_s is when it would have
    been sent at the earliest); "unfinished": the simulation ended first.
    """

    index: int
    tenant: str
    num_prompt: int
    num_output: int
    sent_s: float
    group: str = ""
    decision: str = ""
    first_token_s: float | None = None
    finished_s: float | None = None
    cached_tokens: int = 0
    made_tokens: int = 0
    queue_s: float | None = None
    num_placements: int = 0
    status: Status = "unfinished"


@dataclass(kw_only=True, slots=True)
class GroupRecord:
    """busy_s: time in which steps ran. num_steps: of them. extend_tokens, output_tokens: computed and made (extend
    tokens computed again after preemption included). cached_tokens: prompt tokens that were not computed, at first
    admissions. num_requests: finished here. num_evicted: pages."""

    group: str
    busy_s: float = 0.0
    num_steps: int = 0
    extend_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    num_requests: int = 0
    num_preemptions: int = 0
    num_evicted: int = 0


@dataclass(kw_only=True)
class SimResult:
    """served: (time, tenant, extend tokens, output tokens) as tenants received them: extend tokens at a request's first
    admission, output tokens when the request ended or the sampling interval passed; by time. What a group that died had
    computed for requests without a token is in nobody's: they got nothing of it. end_s: when the last
    request ended or the simulation was stopped. wall_s: real seconds it took; place_s: of these, in placement calls.
    stopped: True when a stop rule ended it early. policy: the placement policy's own counters at the end.
    """

    requests: Sequence[RequestRecord]
    groups: Sequence[GroupRecord]
    served: Sequence[tuple[float, str, int, int]]
    end_s: float
    wall_s: float
    place_s: float
    stopped: bool = False
    policy: dict[str, float] = field(default_factory=dict)
