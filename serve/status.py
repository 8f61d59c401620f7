"""The one place where errors become gRPC statuses, and statuses errors again.

A status alone does not say who sent it: UNAVAILABLE comes from a draining group and from a broken connection. So an
error of ours travels with its class name in the trailing metadata; what arrives without one is the transport's.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, TypeVar, cast

import grpc

from preble_jax import errors
from preble_jax.errors import OverloadedError, PrebleError

ERROR_KEY = "preble-error"
RETRY_AFTER_KEY = "retry-after-s"

log = logging.getLogger(__name__)


def _tree(root: type[PrebleError]) -> Iterator[type[PrebleError]]:
    yield root
    for child in root.__subclasses__():
        yield from _tree(child)


_CLASSES = {cls.__name__: cls for cls in _tree(PrebleError) if cls.__module__ == errors.__name__}
# Reversed, so that the first and most general class of a status stays.
_BY_STATUS = {cls.grpc_status: cls for cls in reversed(_CLASSES.values())}


class TransportError(errors.GroupUnavailableError):
    """The other process could not be reached, or the connection broke: nobody over there decided anything."""


def trailing_metadata(error: PrebleError) -> tuple[tuple[str, str], ...]:
    """The error's class, and for an overload when to come back."""
    retry = ((RETRY_AFTER_KEY, f"{error.retry_after_s:g}"),) if isinstance(error, OverloadedError) else ()
    return ((ERROR_KEY, error_name(error)), *retry)


def error_name(error: PrebleError) -> str:
    """The class of `preble_jax.errors` that it is."""
    return next(cls.__name__ for cls in type(error).__mro__ if cls.__name__ in _CLASSES)


def error_by_name(name: str, message: str) -> PrebleError:
    """The opposite; a name of a later version is the base class."""
    return _CLASSES.get(name, PrebleError)(message)


@contextmanager
def transport_errors() -> Iterator[None]:
    """Turns the `grpc.RpcError` of a call inside into what the server raised, or into `TransportError`."""
    try:
        yield
    except grpc.RpcError as error:
        raise from_rpc(error) from error


def from_rpc(error: Any) -> PrebleError:
    """error: a `grpc.RpcError` of a sync or of an aio call; both have code(), details() and trailing_metadata()."""
    metadata = dict(error.trailing_metadata() or ())
    message = error.details() or error.code().name
    cls = _CLASSES.get(metadata.get(ERROR_KEY, ""))
    if cls is not None:
        if issubclass(cls, OverloadedError):
            return cls(message, retry_after_s=float(metadata.get(RETRY_AFTER_KEY, "1")))
        return cls(message)
    if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.UNKNOWN):
        return TransportError(message)
    return _BY_STATUS.get(error.code().name, PrebleError)(message)


Handler = TypeVar("Handler", bound=Callable[..., Any])


def answers_errors(handler: Handler) -> Handler:
    """Decorates a method of a servicer: a `PrebleError` raised in it becomes the call's status."""

    @wraps(handler)
    async def stream(self: Any, request: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
        responses = handler(self, request, context)
        try:
            async for response in responses:
                yield response
        except Exception as error:
            await _abort(context, error)
        finally:  # at once, not when the garbage collector comes by: leaving the generator is what cancels a request
            await responses.aclose()

    @wraps(handler)
    async def single(self: Any, request: Any, context: grpc.aio.ServicerContext) -> Any:
        try:
            return await handler(self, request, context)
        except Exception as error:
            await _abort(context, error)

    return cast(Handler, stream if inspect.isasyncgenfunction(handler) else single)


async def _abort(context: grpc.aio.ServicerContext, error: Exception) -> None:
    """Ends a call with the error's status; never returns. What is no `PrebleError` is a bug: INTERNAL, and logged."""
    if isinstance(error, PrebleError):
        await context.abort(grpc.StatusCode[error.grpc_status], str(error), trailing_metadata(error))
    log.error("unexpected error in a call", exc_info=error)
    await context.abort(grpc.StatusCode.INTERNAL, f"internal error: {type(error).__name__}: {error}")
