"""Orbax folders: `config.json` beside `params/`, and the tokenizer's files when one was saved with them.

Parameters are stored packed, as the engine holds them, so restoring is reading: each device gets its own shards, on
whatever mesh, without a whole tensor on the host.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import SingleDeviceSharding

from preble_jax.errors import CheckpointError
from preble_jax.model.config import ModelConfig
from preble_jax.model.params import ParamSpec, param_table
from preble_jax.model.tokenizer import Tokenizer
from preble_jax.model.weights.safetensors import read_json, write_json

_PARAMS = "params"


def save(
    folder: str | Path, config: ModelConfig, params: Mapping[str, jax.Array], tokenizer: Tokenizer | None = None
) -> None:
    """Writes a new Orbax folder (with `tokenizer`, one that can serve text).

    params: path -> array, sharded or not; returns when all of them are on disk. Raises CheckpointError where the folder
    already holds parameters or a parameter is missing.
    """
    folder = Path(folder).absolute()
    if (folder / _PARAMS).exists():
        raise CheckpointError(f"{folder}: expected a folder without parameters, got one that has them; choose another")
    missing = [spec.path for spec in param_table(config) if spec.path not in params]
    if missing:
        raise CheckpointError(f"{folder}: expected all parameters of the model, got none for {', '.join(missing)}")
    folder.mkdir(parents=True, exist_ok=True)
    with ocp.StandardCheckpointer() as checkpointer:  # leaving it waits for the last byte
        checkpointer.save(folder / _PARAMS, dict(params))
    if tokenizer is not None:
        tokenizer.save(folder)
    write_json(folder / "config.json", config.to_hf())


class OrbaxCheckpoint:
    """A folder that `save` wrote. Raises CheckpointError where it is not one, or is damaged."""

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder).absolute()  # Orbax refuses relative paths
        if not (self._folder / "config.json").is_file():
            raise CheckpointError(f"{self._folder}: expected config.json beside {_PARAMS}/, got none; save it again")
        self.model_config = ModelConfig.from_hf(read_json(self._folder / "config.json"))
        try:
            with ocp.StandardCheckpointer() as checkpointer:
                self._stored: Mapping[str, Any] = dict(checkpointer.metadata(self._folder / _PARAMS).item_metadata.tree)
        except Exception as error:  # Orbax raises anything from AttributeError to its own
            raise self._damaged(error) from error

    def read(self, spec: ParamSpec, dtype: Any = None) -> np.ndarray[Any, Any]:
        """One whole parameter, in the dtype it was stored in."""
        self._check(spec)
        target = jax.ShapeDtypeStruct(
            spec.shape, self._stored[spec.path].dtype, sharding=SingleDeviceSharding(jax.devices()[0])
        )
        return np.asarray(self.restore([spec], [target])[spec.path])

    def restore(self, specs: Sequence[ParamSpec], targets: Sequence[jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
        """These parameters, each with its target's dtype and sharding; the mesh need not be the one of `save`."""
        for spec in specs:
            self._check(spec)
        abstract = {spec.path: target for spec, target in zip(specs, targets, strict=True)}
        restore_args = ocp.checkpoint_utils.construct_restore_args(abstract)
        args = ocp.args.PyTreeRestore(item=abstract, restore_args=restore_args, partial_restore=True)
        try:
            with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
                params: dict[str, jax.Array] = jax.block_until_ready(
                    checkpointer.restore(self._folder / _PARAMS, args=args)
                )
        except Exception as error:  # as above
            raise self._damaged(error) from error
        return params

    def close(self) -> None:
        """Nothing is held open."""

    def _check(self, spec: ParamSpec) -> None:
        stored = self._stored.get(spec.path)
        if stored is None:
            raise CheckpointError(f"{self._folder}: expected the parameter {spec.path!r}, which is missing")
        if tuple(stored.shape) != spec.shape:
            raise CheckpointError(
                f"{self._folder}: expected the parameter {spec.path!r} of shape {list(spec.shape)} (from config.json), "
                f"got {list(stored.shape)}"
            )

    def _damaged(self, error: Exception) -> CheckpointError:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        return CheckpointError(
            f"{self._folder / _PARAMS}: expected readable Orbax parameters: {reason}; save them again"
        )
