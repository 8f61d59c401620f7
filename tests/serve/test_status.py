"""Errors to statuses and back."""

from __future__ import annotations

from collections.abc import AsyncIterator

import grpc
import pytest

from preble_jax import errors
from preble_jax.errors import OverloadedError, PrebleError
from serve.status import TransportError, answers_errors, from_rpc, trailing_metadata

CLASSES = [
    cls
    for cls in vars(errors).values()
    if isinstance(cls, type) and issubclass(cls, PrebleError) and cls is not PrebleError
]


def rpc_error(code: str, metadata: tuple[tuple[str, str], ...] = (), details: str = "why") -> grpc.aio.AioRpcError:
    initial = grpc.aio.Metadata()
    return grpc.aio.AioRpcError(grpc.StatusCode[code], initial, grpc.aio.Metadata(*metadata), details)


@pytest.mark.parametrize("cls", CLASSES)
def test_every_error_survives_the_wire(cls: type[PrebleError]) -> None:
    error = cls("why")
    back = from_rpc(rpc_error(error.grpc_status, trailing_metadata(error)))
    assert type(back) is cls
    assert str(back) == "why"


def test_the_retry_hint_survives_the_wire() -> None:
    back = from_rpc(rpc_error("RESOURCE_EXHAUSTED", trailing_metadata(OverloadedError("full", retry_after_s=0.25))))
    assert isinstance(back, OverloadedError)
    assert back.retry_after_s == 0.25


def test_a_broken_connection_is_not_a_group_that_drains() -> None:
    assert type(from_rpc(rpc_error("UNAVAILABLE"))) is TransportError
    draining = errors.GroupUnavailableError("drains")
    assert type(from_rpc(rpc_error("UNAVAILABLE", trailing_metadata(draining)))) is errors.GroupUnavailableError


def test_a_subclass_travels_as_what_it_is_known_for() -> None:
    assert trailing_metadata(TransportError("x")) == (("preble-error", "GroupUnavailableError"),)


@pytest.mark.parametrize("code", [code.name for code in grpc.StatusCode if code is not grpc.StatusCode.OK])
def test_every_status_of_a_stranger_becomes_an_error(code: str) -> None:
    error = from_rpc(rpc_error(code, details=""))
    assert isinstance(error, PrebleError)
    assert str(error) == code


async def test_leaving_a_stream_leaves_the_handler_at_once() -> None:
    left = []

    class Servicer:
        @answers_errors
        async def Stream(self, request: object, context: object) -> AsyncIterator[int]:
            try:
                while True:
                    yield 1
            finally:
                left.append(True)

    responses = Servicer().Stream(None, None)
    await anext(responses)
    await responses.aclose()
    assert left == [True]
