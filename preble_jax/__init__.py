"""preble-jax: an LLM serving stack in JAX whose unit of scheduling is the prefix.

    from preble_jax import LLM, SamplingParams

Importing this package does not import JAX; using `LLM` does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from preble_jax.sampling_params import SamplingParams

if TYPE_CHECKING:
    from preble_jax.batch.llm import LLM, CompletedRequest

__all__ = ["LLM", "CompletedRequest", "SamplingParams"]
__version__ = "0.1.0"

_OFFLINE = ("LLM", "CompletedRequest")


def __getattr__(name: str) -> Any:
    if name in _OFFLINE:
        from preble_jax.batch import llm

        return getattr(llm, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
