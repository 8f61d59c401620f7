"""Every error the project raises on purpose, and what it becomes on the wire.

    PrebleError                       gRPC                  HTTP
    ├── InvalidRequestError           INVALID_ARGUMENT      400   also a ValueError: the caller's input is at fault
    │   ├── PromptTooLongError        INVALID_ARGUMENT      400
    │   └── ConfigError               INVALID_ARGUMENT      400   a config file, key or value
    ├── NotFoundError                 NOT_FOUND             404   an unknown model, group or request
    ├── CheckpointError               FAILED_PRECONDITION   412   a weight file that is missing, corrupt or truncated
    │   └── ChecksumError             DATA_LOSS             502   bytes that are not the ones that were pinned
    ├── OverloadedError               RESOURCE_EXHAUSTED    429   the queue is full; `retry_after_s` is a hint
    ├── DeadlineError                 DEADLINE_EXCEEDED     504
    ├── CancelledError                CANCELLED             499
    ├── GroupUnavailableError         UNAVAILABLE           503   the device group died, drains, or none is left
    └── InvariantError                INTERNAL              500   a bug of ours: bookkeeping that does not add up

A message says what was expected, what came, and what to do. `grpc_status` is the *name* of the status, so that
this module needs no gRPC.
"""

from __future__ import annotations


class PrebleError(Exception):
    """Base of the tree."""

    grpc_status = "UNKNOWN"
    http_status = 500


class InvalidRequestError(PrebleError, ValueError):
    """The caller's input cannot be served as it is; sending it again unchanged is pointless."""

    grpc_status = "INVALID_ARGUMENT"
    http_status = 400


class PromptTooLongError(InvalidRequestError):
    """Prompt (plus at least one output token) does not fit into the model's context or the group's pages."""


class ConfigError(InvalidRequestError):
    """An unknown key, an ill-typed value, or a combination of settings that cannot work."""


class NotFoundError(PrebleError, LookupError):
    """A model, device group or request nobody knows."""

    grpc_status = "NOT_FOUND"
    http_status = 404


class CheckpointError(PrebleError):
    """A checkpoint or tokenizer file is missing, corrupt, truncated, or not the model it claims to be."""

    grpc_status = "FAILED_PRECONDITION"
    http_status = 412


class ChecksumError(CheckpointError):
    """Downloaded bytes whose digest is not the pinned one."""

    grpc_status = "DATA_LOSS"
    http_status = 502


class OverloadedError(PrebleError):
    """The waiting queue is full. `retry_after_s` is a hint, in seconds."""

    grpc_status = "RESOURCE_EXHAUSTED"
    http_status = 429

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class DeadlineError(PrebleError):
    """The request's deadline passed before it finished."""

    grpc_status = "DEADLINE_EXCEEDED"
    http_status = 504


class CancelledError(PrebleError):
    """The client went away."""

    grpc_status = "CANCELLED"
    http_status = 499


class GroupUnavailableError(PrebleError):
    """A device group died or drains, or no group is left to serve."""

    grpc_status = "UNAVAILABLE"
    http_status = 503


class InvariantError(PrebleError, AssertionError):
    """The project's own bookkeeping is broken; the message shows both sides of the equation."""

    grpc_status = "INTERNAL"
    http_status = 500
