"""A GGUF file's header: metadata and where each tensor lies. No JAX: the tokenizer is read through here too.

Constants, block sizes and dequantisation come from the `gguf` package. Its reader does not serve: it makes a NumPy view
per array element, which is seconds for a tokenizer's hundred thousand strings, and a file that ends early is not
noticed but read as shorter strings. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT, GGUF_MAGIC, GGMLQuantizationType, GGUFValueType
from gguf.quants import dequantize

from preble_jax.errors import CheckpointError

Array = np.ndarray[Any, Any]

_VERSIONS = (2, 3)
_CHUNK_VALUES = 1 << 18  # dequantised at a time: that takes several float32 arrays of the size
_MAX_DIMS = 4
_SCALARS = {
    GGUFValueType.UINT8: "<u1",
    GGUFValueType.INT8: "<i1",
    GGUFValueType.UINT16: "<u2",
    GGUFValueType.INT16: "<i2",
    GGUFValueType.UINT32: "<u4",
    GGUFValueType.INT32: "<i4",
    GGUFValueType.FLOAT32: "<f4",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "<u8",
    GGUFValueType.INT64: "<i8",
    GGUFValueType.FLOAT64: "<f8",
}
_PLAIN = {
    GGMLQuantizationType.F32: "<f4",
    GGMLQuantizationType.F16: "<f2",
    GGMLQuantizationType.F64: "<f8",
}


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """shape: outermost dimension first, as NumPy has it (the file has it the other way round). offset: from the
    file's beginning."""

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    offset: int
    num_bytes: int


class GGUFFile:
    """An open GGUF file.

    metadata: key -> bool, int, float, str, or a list of them (numbers: a NumPy array).
    tensors:  name -> TensorInfo; all of them lie within the file.
    Raises CheckpointError where the file is missing, not GGUF, truncated or corrupt.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            with self.path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
            raise CheckpointError(f"{self.path}: expected a readable GGUF file, got: {error}") from error
        try:
            header = _Header(self._map)
            self.metadata: dict[str, Any] = header.metadata
            self.tensors: dict[str, TensorInfo] = header.tensors
        except _BadHeader as error:
            self.close()
            raise CheckpointError(f"{self.path}: {error}; fetch the file again") from error

    def read(self, name: str, dtype: Any = np.float32) -> Array:
        """One tensor as `dtype` (a copy), dequantised. CheckpointError where it is missing or its type is unknown.

        Piece by piece: neither the file nor the float32 values are in memory as a whole.
        """
        info = self.tensors.get(name)
        if info is None:
            raise CheckpointError(f"{self.path}: expected a tensor {name!r}, which is missing; is it a whole model?")
        num_rows = prod(info.shape[:-1])
        values = np.empty((num_rows, info.shape[-1]), dtype)
        step = max(1, _CHUNK_VALUES // max(1, info.shape[-1]))
        for first in range(0, num_rows, step):
            last = min(first + step, num_rows)
            start, end = (info.offset + info.num_bytes * row // num_rows for row in (first, last))
            values[first:last] = self._dequantised(info, start, end)
            self._forget()
        return values.reshape(info.shape)

    def close(self) -> None:
        self._map.close()

    def _dequantised(self, info: TensorInfo, start: int, end: int) -> Array:
        """The rows in these bytes of the file, float32."""
        plain = _PLAIN.get(info.type)
        if plain is not None:
            dtype = np.dtype(plain)
            values = np.frombuffer(self._map, dtype, (end - start) // dtype.itemsize, start)
            return values.astype(np.float32).reshape(-1, info.shape[-1])
        block, size = GGML_QUANT_SIZES[info.type]
        raw = np.frombuffer(self._map, np.uint8, end - start, start)
        try:
            rows: Array = dequantize(raw.reshape(-1, info.shape[-1] // block * size), info.type)
        except NotImplementedError as error:
            raise CheckpointError(
                f"{self.path}: tensor {info.name!r} is of type {info.type.name}, which cannot be dequantised; "
                "use another quantisation of this model"
            ) from error
        return rows

    def _forget(self) -> None:
        """What was read through the map counts as this process's memory until it is told to go: all of it, because
        the system maps more than was asked for, on both sides."""
        if hasattr(mmap, "MADV_DONTNEED"):  # not on Windows
            self._map.madvise(mmap.MADV_DONTNEED)


class _BadHeader(Exception):
    """What is wrong with the header, without the file's name."""


class _Header:
    """Parses the header once, front to back; every read is checked against the file's end."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._at = 0
        magic = self._bytes(4, "the magic number")
        if magic != GGUF_MAGIC.to_bytes(4, "little"):
            raise _BadHeader(f"expected a GGUF file (it begins with b'GGUF'), got {magic!r}")
        version = self._number("<I", "the format version")
        if version not in _VERSIONS:
            raise _BadHeader(f"expected GGUF version 2 or 3, little-endian, got {version:#x}")
        num_tensors = self._count("the number of tensors", 24)
        num_entries = self._count("the number of metadata entries", 13)
        self.metadata: dict[str, Any] = {}
        for _ in range(num_entries):
            key = self._string("a metadata key")
            if key in self.metadata:
                raise _BadHeader(f"expected each metadata key once, got {key!r} twice")
            self.metadata[key] = self._value(self._value_type(key), key)
        infos: dict[str, TensorInfo] = {}
        for _ in range(num_tensors):
            info = self._tensor()
            if info.name in infos:
                raise _BadHeader(f"expected each tensor once, got {info.name!r} twice")
            infos[info.name] = info
        alignment = self.metadata.get("general.alignment", GGUF_DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise _BadHeader(f"expected general.alignment to be a power of two, got {alignment!r}")
        data_start = -(-self._at // alignment) * alignment
        self.tensors = {name: self._placed(info, data_start + info.offset) for name, info in infos.items()}

    def _placed(self, info: TensorInfo, start: int) -> TensorInfo:
        """The offset becomes absolute, and is checked: here ends what a truncated file can do."""
        if start + info.num_bytes > len(self._data):
            raise _BadHeader(
                f"the file is truncated: tensor {info.name!r} ends at byte {start + info.num_bytes}, "
                f"the file at byte {len(self._data)}"
            )
        return replace(info, offset=start)

    def _tensor(self) -> TensorInfo:
        name = self._string("a tensor's name")
        num_dims = self._number("<I", f"the number of dimensions of {name!r}")
        if num_dims > _MAX_DIMS:
            raise _BadHeader(f"expected at most {_MAX_DIMS} dimensions of tensor {name!r}, got {num_dims}")
        shape = tuple(reversed([self._number("<Q", f"the shape of {name!r}") for _ in range(num_dims)])) or (1,)
        raw_type = self._number("<I", f"the type of {name!r}")
        offset = self._number("<Q", f"the offset of {name!r}")
        try:
            kind = GGMLQuantizationType(raw_type)
        except ValueError:
            raise _BadHeader(f"tensor {name!r} has the unknown type {raw_type}") from None
        block, size = GGML_QUANT_SIZES[kind]
        if shape[-1] % block:
            raise _BadHeader(f"expected rows of {name!r} in blocks of {block} ({kind.name}), got {shape[-1]} columns")
        return TensorInfo(name=name, shape=shape, type=kind, offset=offset, num_bytes=prod(shape) // block * size)

    def _value_type(self, key: str) -> GGUFValueType:
        raw = self._number("<I", f"the type of {key!r}")
        try:
            return GGUFValueType(raw)
        except ValueError:
            raise _BadHeader(f"metadata entry {key!r} has the unknown type {raw}") from None

    def _value(self, kind: GGUFValueType, key: str) -> Any:
        if kind is GGUFValueType.STRING:
            return self._string(key)
        if kind is not GGUFValueType.ARRAY:
            return self._numbers(kind, 1, key)[0].item()
        item = self._value_type(key)
        if item in _SCALARS:
            count = self._count(f"the length of {key!r}", np.dtype(_SCALARS[item]).itemsize)
            return self._numbers(item, count, key)
        count = self._count(f"the length of {key!r}", 8)  # strings and arrays begin with their length
        return [self._value(item, key) for _ in range(count)]

    def _numbers(self, kind: GGUFValueType, count: int, what: str) -> np.ndarray[Any, Any]:
        dtype = np.dtype(_SCALARS[kind])
        return np.frombuffer(self._bytes(count * dtype.itemsize, what), dtype)

    def _string(self, what: str) -> str:
        raw = self._bytes(self._count(f"the length of {what}", 1), what)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise _BadHeader(f"expected UTF-8 text in {what}, got: {error}") from error

    def _count(self, what: str, item_bytes: int) -> int:
        """A number of things that follow, of at least `item_bytes` each. More of them than fit is a corrupt file, and
        would otherwise be tried, for hours."""
        count = self._number("<Q", what)
        if count * item_bytes > len(self._data) - self._at:
            raise _BadHeader(
                f"the file is truncated or corrupt: {what} is {count}, the file has {len(self._data)} bytes"
            )
        return count

    def _number(self, fmt: str, what: str) -> int:
        (value,) = struct.unpack(fmt, self._bytes(struct.calcsize(fmt), what))
        return int(value)

    def _bytes(self, count: int, what: str) -> bytes:
        end = self._at + count
        if end > len(self._data):
            raise _BadHeader(f"the file is truncated: it ends at byte {len(self._data)}, within {what}")
        raw = self._data[self._at : end]
        self._at = end
        return raw
