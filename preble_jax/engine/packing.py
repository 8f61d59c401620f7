"""Small arrays that travel to the device as one: every argument of a compiled program costs the host time."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_WORD = np.dtype(np.int32)
_ALIGNMENT = 64  # bytes; XLA on the CPU copies what it is handed elsewhere


class Packing:
    """The places of a pytree's arrays in one vector of int32.

    example: a pytree of numpy arrays, whose shapes and dtypes (of four bytes each) are those of all that follow.
    """

    def __init__(self, example: Any) -> None:
        arrays, self._treedef = jax.tree.flatten(example)
        for array in arrays:
            if array.dtype.itemsize != _WORD.itemsize:
                raise ValueError(f"packing: expected dtypes of {_WORD.itemsize} bytes, got {array.dtype}")
        self._shapes = [array.shape for array in arrays]
        self._dtypes = [array.dtype for array in arrays]
        self._ends = np.cumsum([array.size for array in arrays]).tolist()
        self.size = self._ends[-1]

    def new(self) -> tuple[np.ndarray, Any]:
        """A vector of zeros [size] and the arrays as views into it, to be filled in. The vector must not be written to
        while a program has it: on the CPU the device may read it where it is."""
        room = np.zeros(self.size + _ALIGNMENT // _WORD.itemsize, _WORD)
        first = -room.ctypes.data % _ALIGNMENT // _WORD.itemsize
        packed = room[first : first + self.size]
        views = [
            packed[start:end].view(dtype).reshape(shape)
            for start, end, dtype, shape in zip([0, *self._ends], self._ends, self._dtypes, self._shapes, strict=False)
        ]
        return packed, jax.tree.unflatten(self._treedef, views)

    def unpack(self, packed: jax.Array) -> Any:
        """The arrays again, within a traced function."""
        arrays = []
        for start, end, dtype, shape in zip([0, *self._ends], self._ends, self._dtypes, self._shapes, strict=False):
            part = packed[start:end]
            arrays.append(jax.lax.bitcast_convert_type(part, jnp.dtype(dtype)).reshape(shape))
        return jax.tree.unflatten(self._treedef, arrays)
