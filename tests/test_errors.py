"""The exception tree: what its docstring draws is what the code has, and every status exists."""

from __future__ import annotations

import http
import inspect
import re

import grpc
import pytest

from preble_jax import errors
from preble_jax.errors import InvalidRequestError, OverloadedError, PrebleError

CLASSES = {name: cls for name, cls in inspect.getmembers(errors, inspect.isclass) if issubclass(cls, PrebleError)}
NGINX_CLIENT_CLOSED_REQUEST = 499


def drawn() -> list[tuple[str, str | None, str | None, int | None]]:
    """The docstring's lines as (class, its parent, gRPC status, HTTP status)."""
    rows: list[tuple[str, str | None, str | None, int | None]] = []
    parents: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        match = re.match(r"    ([│├└─ ]*)(\w+Error) +(\w+) +(\w+)", line)
        if match is None:
            continue
        branch, name, status, code = match.groups()
        depth = len(branch) // 4
        parents[depth:] = [name]
        if depth == 0:
            rows.append((name, None, None, None))
        else:
            rows.append((name, parents[depth - 1], status, int(code)))
    return rows


def test_the_drawn_tree_is_the_tree() -> None:
    actual = {(cls.__name__, cls.__bases__[0].__name__, cls.grpc_status, cls.http_status) for cls in CLASSES.values()}
    root = ("PrebleError", "Exception", PrebleError.grpc_status, PrebleError.http_status)
    assert {row for row in drawn() if row[1] is not None} == actual - {root}
    assert drawn()[0] == ("PrebleError", None, None, None)


@pytest.mark.parametrize("cls", CLASSES.values(), ids=CLASSES)
def test_every_status_exists(cls: type[PrebleError]) -> None:
    assert cls.grpc_status in grpc.StatusCode.__members__
    assert cls.grpc_status != "OK"
    assert cls.http_status == NGINX_CLIENT_CLOSED_REQUEST or http.HTTPStatus(cls.http_status) >= http.HTTPStatus(400)


@pytest.mark.parametrize("cls", CLASSES.values(), ids=CLASSES)
def test_every_error_takes_a_message_alone(cls: type[PrebleError]) -> None:
    """Receivers rebuild errors from a status and a message."""
    assert str(cls("expected a, got b")) == "expected a, got b"
    assert cls.__doc__


def test_bad_input_is_also_a_value_error() -> None:
    assert issubclass(InvalidRequestError, ValueError)


def test_overload_says_when_to_come_back() -> None:
    assert OverloadedError("full", retry_after_s=2.5).retry_after_s == 2.5
    assert OverloadedError("full").retry_after_s > 0
