"""Reading and writing weights: Hugging Face safetensors folders, GGUF files, Orbax folders."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from preble_jax.errors import CheckpointError
from preble_jax.model.config import ModelConfig

if TYPE_CHECKING:
    import numpy as np

    from preble_jax.model.params import ParamSpec
    from preble_jax.model.weights.load import load_params, random_params

__all__ = ["Checkpoint", "load_params", "open_checkpoint", "random_params"]

_NEED_JAX = ("load_params", "random_params")


class Checkpoint(Protocol):
    """An open checkpoint of any format."""

    model_config: ModelConfig

    def read(self, spec: ParamSpec, dtype: Any = None) -> np.ndarray[Any, Any]:
        """One parameter, packed: `spec.shape`, float32 or as stored. CheckpointError: missing or of another shape.

        dtype: what the caller will round it to; a reader that has to compute the values makes them in it at once.
        """
        ...

    def close(self) -> None: ...


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Opens a Hugging Face folder, a `.gguf` file or an Orbax folder, told apart by what is there.

    Only headers are read. Raises CheckpointError where the path is none of these, or is damaged.
    """
    path = Path(path)
    if path.is_file():
        from preble_jax.model.weights.gguf import GGUFCheckpoint

        return GGUFCheckpoint(path)  # says itself when the file is not GGUF
    if not path.is_dir():
        raise CheckpointError(f"{path}: expected a checkpoint folder or a .gguf file, got a path that does not exist")
    if (path / "params").is_dir():
        from preble_jax.model.weights.orbax import OrbaxCheckpoint

        return OrbaxCheckpoint(path)
    from preble_jax.model.weights.safetensors import SafetensorsCheckpoint

    return SafetensorsCheckpoint(path)


def __getattr__(name: str) -> Any:
    """`load_params` and `random_params` on first use: importing this package must not import JAX."""
    if name in _NEED_JAX:
        from preble_jax.model.weights import load

        return getattr(load, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
