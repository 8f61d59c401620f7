"""What goes into a device group and what comes out of it: plain data, shared by engine, schedulers and servers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from preble_jax.sampling_params import SamplingParams

FinishReason = Literal["stop", "length", "cancelled", "deadline", "error"]


@dataclass(frozen=True, kw_only=True)
class Request:
    """One tokenised request, as a device group takes it.

    sampling.stop (strings) is not looked at here: text is made by whoever holds the tokenizer.
    stop_token_ids: all ids that end this request (end-of-sequence ids included unless ignored).
    cache_salt: isolation; requests with different salts never share pages.
    block_hashes: of the first full pages of the prompt, or of prompt and output where the output is known beforehand,
        from whoever has worked them out with the same salt and page size; it is believed. None: the device group
        hashes the prompt.
    deadline_s: absolute, on the clock that is passed to the scheduler as `now`; None: no deadline.
    """

    request_id: str
    prompt_token_ids: Sequence[int]
    sampling: SamplingParams
    stop_token_ids: frozenset[int] = frozenset()
    tenant: str = "default"
    cache_salt: bytes = b""
    block_hashes: Sequence[bytes] | None = None
    deadline_s: float | None = None


@dataclass(kw_only=True, slots=True)  # not frozen: made for every token, and that would take three times as long
class RequestOutput:
    """What a step made for one request: new tokens, and how it ended if it did. Not to be changed.

    token_ids: only the new ones. logprobs: one per new token when asked for, else empty.
    cached_tokens: prompt tokens that were not computed because pages held them (fixed at the first token).
    queue_s: seconds from the request's arrival at its device group to its first step; None: it had none.
    """

    request_id: str
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    cached_tokens: int = 0
    queue_s: float | None = None
    error: str = ""

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None
