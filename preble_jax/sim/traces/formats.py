"""The formats: how each one's rows are read."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType

from preble_jax.errors import InvalidRequestError
from preble_jax.sim.traces.blocks import BlockNames
from preble_jax.sim.traces.entry import Entry
from preble_jax.sim.traces.rows import Row, csv_rows, json_rows

TIME_UNITS = ("ms", "s")
DEFAULT_OUTPUT = 64  # tokens, where a trace does not know (null)

_AZURE = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
_VTC = ("client", "req_time_s", "prompt_len", "output_len")


def read_mooncake(path: Path, lines: Sequence[str]) -> list[Entry]:
    """JSON lines with input_length, output_length, hash_ids; optional timestamp, tenant, session and turn.

    Timestamps are left as they are (`to_seconds`). Where every session begins with one of 0, they count from there.
    """
    names = BlockNames()
    entries = [_mooncake_entry(row, names) for row in json_rows(path, lines)]
    begins: dict[str, float | None] = {}
    for entry in entries:
        if entry.session:
            begins.setdefault(entry.session, entry.at_s)
    in_session = bool(begins) and not any(begins.values())
    for entry in entries:
        entry.in_session = in_session
    return entries


def to_seconds(entries: Sequence[Entry], unit: str | None) -> None:
    """Of what `read_mooncake` has read. unit: None: milliseconds, as Mooncake's own are, but seconds in a session."""
    for entry in entries:
        if entry.at_s is not None and (unit or ("s" if entry.in_session else "ms")) == "ms":
            entry.at_s *= 1e-3


def _mooncake_entry(row: Row, names: BlockNames) -> Entry:
    unknown = row.get("output_length") is None
    return Entry(
        row=row,
        num_prompt=row.count("input_length", 1),
        num_output=DEFAULT_OUTPUT if unknown else max(row.count("output_length", 0), 1),
        blocks=names.chain(row, row.get("hash_ids")),
        at_s=row.number("timestamp") if "timestamp" in row else None,
        tenant=row.text("tenant") if "tenant" in row else "default",
        session=row.text("session") if "session" in row else "",
        turn=row.count("turn", 0) if "turn" in row else None,
    )


def read_azure(path: Path, lines: Sequence[str]) -> list[Entry]:
    """CSV with TIMESTAMP (ISO date and time), ContextTokens, GeneratedTokens. Nothing is shared."""
    return [
        Entry(
            row=row,
            at_s=_iso_seconds(row, "TIMESTAMP"),
            num_prompt=row.count("ContextTokens", 1),
            num_output=max(row.count("GeneratedTokens", 0), 1),
        )
        for row in csv_rows(path, lines, _AZURE)
    ]


def _iso_seconds(row: Row, name: str) -> float:
    text = row.text(name)
    try:
        when = datetime.fromisoformat(text)
    except ValueError:
        row.refuse(f"{name}: expected a time such as 2023-11-16 18:15:46.68, got {text!r}; correct or drop the row")
    return (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp()


def read_vtc(path: Path, lines: Sequence[str]) -> list[Entry]:
    """CSV with client, req_time_s, prompt_len, output_len; a client is a tenant. Nothing is shared."""
    return [
        Entry(
            row=row,
            at_s=row.number("req_time_s"),
            num_prompt=row.count("prompt_len", 1),
            num_output=max(row.count("output_len", 0), 1),
            tenant=row.text("client"),
        )
        for row in csv_rows(path, lines, _VTC)
    ]


FORMATS: Mapping[str, Callable[[Path, Sequence[str]], list[Entry]]] = MappingProxyType(
    {"mooncake": read_mooncake, "azure": read_azure, "vtc": read_vtc}
)


def find_format(path: Path, lines: Sequence[str]) -> str:
    """By the first line with something in it."""
    number, first = next((number, line.strip()) for number, line in enumerate(lines, start=1) if line.strip())
    if first.startswith("{"):
        return "mooncake"
    header = _columns(first)
    for columns, name in ((_AZURE, "azure"), (_VTC, "vtc")):
        if header.intersection(columns):
            return name
    raise InvalidRequestError(
        f"{path}, line {number}: expected JSON lines (mooncake) or a CSV header with {','.join(_AZURE)} (azure) or"
        f" {','.join(_VTC)} (vtc), got {first[:60]!r}; give a trace in one of these formats, or name the one"
        " that it has: --trace-format"
    )


def _columns(line: str) -> set[str]:
    """Of a CSV's header; none in what cannot be one."""
    try:
        return {column.strip() for columns in csv.reader([line]) for column in columns}
    except csv.Error:
        return set()
