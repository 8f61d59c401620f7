"""Rows of a trace file, and the refusal of bad ones by file and line."""

from __future__ import annotations

import csv
import gzip
import json
import math
import zlib
from collections.abc import Iterator, Sequence
from io import BytesIO, TextIOWrapper
from pathlib import Path
from typing import Any, NoReturn

from preble_jax.errors import InvalidRequestError

_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_MOST = 1 << 24
"""Of anything that is counted; tokens of a prompt above all, which no model takes that many of."""


class Row:
    """One row with its place in the file. Whoever reads a field that is not as it should be gets InvalidRequestError.

    written: numbers are text, as in a CSV.
    """

    __slots__ = ("_fields", "_path", "_written", "line")

    def __init__(self, path: Path, line: int, fields: dict[str, Any], *, written: bool = False) -> None:
        self.line = line
        self._path, self._fields, self._written = path, fields, written

    def __contains__(self, name: str) -> bool:
        return name in self._fields

    def refuse(self, problem: str) -> NoReturn:
        """problem: what was expected, what came, and the fix."""
        raise InvalidRequestError(f"{self._path}, line {self.line}: {problem}")

    def get(self, name: str) -> Any:
        if name not in self._fields:
            there = ", ".join(map(str, self._fields)) or "none"
            self.refuse(f"expected a field {name!r}, got the fields {there}; add it, or name the right trace format")
        return self._fields[name]

    def count(self, name: str, least: int) -> int:
        """A whole number of at least `least`; 12.0 is one, too."""
        value = self.get(name)
        number = self.number(name)
        if number != int(number) or number < least:
            self.refuse(f"{name}: expected a whole number of at least {least}, got {value!r}; correct or drop the row")
        if number > _MOST:
            self.refuse(f"{name}: expected at most {_MOST}, got {number:.10g}; correct or drop the row")
        return int(number)

    def number(self, name: str) -> float:
        """A finite one."""
        value = self.get(name)
        number = math.nan
        if isinstance(value, str if self._written else (int, float)) and not isinstance(value, bool):
            try:
                number = float(value)
            except (ValueError, OverflowError):
                number = math.nan
        if not math.isfinite(number):
            self.refuse(f"{name}: expected a number, got {value!r}; correct or drop the row")
        return number

    def text(self, name: str) -> str:
        """A name; whole numbers count as such."""
        value = self.get(name)
        if isinstance(value, (str, int)) and not isinstance(value, bool) and str(value).strip():
            return str(value).strip()
        self.refuse(f"{name}: expected a name, got {value!r}; correct or drop the field")


def read_lines(path: Path) -> list[str]:
    """The file's lines, unpacked where gzip packed them. Raises InvalidRequestError when it cannot be read as text or
    has nothing in it."""
    try:
        packed = path.read_bytes()
        if packed.startswith(_ZSTD):
            raise InvalidRequestError(
                f"{path}: expected a trace as text or packed by gzip, got one packed by zstd; unpack it: zstd -d {path}"
            )
        data = gzip.decompress(packed) if packed.startswith(_GZIP) else packed
        text = TextIOWrapper(BytesIO(data), encoding="utf-8-sig").read()  # line ends of all kinds become \n
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InvalidRequestError(
            f"{path}: expected a whole gzip file, cannot unpack it ({error}); fetch or pack it again"
        ) from error
    except UnicodeDecodeError as error:
        line = 1 + error.object[: error.start].count(b"\n")
        raise InvalidRequestError(
            f"{path}, line {line}: expected UTF-8 text, got byte {error.object[error.start]:#04x}; give a trace file"
        ) from error
    except OSError as error:
        raise InvalidRequestError(
            f"{path}: expected a trace file that can be read, got {error.strerror or error}; check the path"
        ) from error
    if not text.strip():
        raise InvalidRequestError(f"{path}, line 1: expected a row, got an empty file; give a trace with requests")
    return text.split("\n")


def json_rows(path: Path, lines: Sequence[str]) -> Iterator[Row]:
    """An object a line; empty lines are passed over."""
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        reason = ""
        fields: object = line.strip()[:40]
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = f" ({error})"
        if not isinstance(fields, dict):
            Row(path, number, {}).refuse(f"expected a JSON object, got {fields!r}{reason}; write one request a line")
        yield Row(path, number, fields)


def csv_rows(path: Path, lines: Sequence[str], columns: Sequence[str]) -> Iterator[Row]:
    """A row a line, after a header that has to name these columns, among others."""
    reader = csv.reader(lines)
    header: list[str] = []
    try:
        for cells in reader:
            values = [cell.strip() for cell in cells]
            row = Row(path, reader.line_num, dict(zip(header, values, strict=False)), written=True)
            if not any(values):
                continue
            if not header:
                header = values
                missing = [column for column in columns if column not in header]
                if missing:
                    row.refuse(
                        f"expected a header with {', '.join(columns)}, got {','.join(header)}, without"
                        f" {', '.join(missing)}; add the header, or name the right trace format"
                    )
            elif len(values) != len(header):
                row.refuse(f"expected {len(header)} cells ({','.join(header)}), got {len(values)}; correct the row")
            else:
                yield row
    except csv.Error as error:
        Row(path, reader.line_num, {}).refuse(f"expected comma-separated values, got {error}; correct the file")
