"""How one request's tokens are chosen. Names follow the other engines'."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from preble_jax.errors import InvalidRequestError

_SEED_LIMIT = 1 << 32
_INT32_MAX = (1 << 31) - 1  # what the wire and the device hold


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Settings of one request. Invalid values raise `InvalidRequestError` at construction.

    temperature: 0 is greedy; otherwise logits are divided by it.
    top_k:       0 keeps all tokens, k the k most likely.
    top_p:       keeps the smallest set of most likely tokens whose probability reaches top_p; 1.0 keeps all.
    min_p:       drops tokens less likely than min_p times the most likely one; 0.0 keeps all.
    seed:        same prompt and seed give the same tokens; None draws one.
    max_tokens:  upper bound of output tokens (the context's end also ends a request, reason "length").
    stop:        strings that end the output; they are not part of the text.
    stop_token_ids: token ids that end the output, beside the model's end-of-sequence ids.
    ignore_eos:  do not stop at the model's end-of-sequence ids (for measurements).
    logprobs:    also return the log-probability (natural, before temperature) of each chosen token.
    """

    max_tokens: int = 128
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    logprobs: bool = False

    def __post_init__(self) -> None:
        _require_int("max_tokens", self.max_tokens, 1, _INT32_MAX)
        _require_number("temperature", self.temperature, 0.0, None)
        _require_int("top_k", self.top_k, 0, _INT32_MAX)
        _require_number("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _require_number("min_p", self.min_p, 0.0, 1.0)
        if self.seed is not None:
            _require_int("seed", self.seed, 0, _SEED_LIMIT - 1)
        stop = (self.stop,) if isinstance(self.stop, str) else _as_tuple("stop", self.stop)
        if any(not isinstance(s, str) or not s for s in stop):
            raise InvalidRequestError(f"stop: expected non-empty strings, got {self.stop!r}")
        object.__setattr__(self, "stop", stop)
        stop_ids = _as_tuple("stop_token_ids", self.stop_token_ids)
        for token in stop_ids:
            _require_int("stop_token_ids", token, 0, _INT32_MAX)
        object.__setattr__(self, "stop_token_ids", stop_ids)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0


def _as_tuple(name: str, value: object) -> tuple[object, ...]:
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise InvalidRequestError(f"{name}: expected a list, got {value!r}")
    return tuple(value)


def _require_int(name: str, value: object, low: int, high: int) -> None:
    bound = f"an integer >= {low}" if high == _INT32_MAX else f"an integer in [{low}, {high}]"
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise InvalidRequestError(f"{name}: expected {bound}, got {value!r}")


def _require_number(name: str, value: object, low: float, high: float | None, *, open_low: bool = False) -> None:
    left = f"> {low:g}" if open_low else f">= {low:g}"
    bound = f"a finite number {left}" + ("" if high is None else f" and <= {high:g}")
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidRequestError(f"{name}: expected {bound}, got {value!r}")
    if not math.isfinite(value) or value < low or (open_low and value == low) or (high is not None and value > high):
        raise InvalidRequestError(f"{name}: expected {bound}, got {value!r}")
