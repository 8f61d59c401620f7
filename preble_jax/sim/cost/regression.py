"""The regressions of step time that Preble's authors published (arXiv 2407.00023, and the released code), in ms."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from preble_jax.sim.cost.base import EngineShape, StepWork

MS = 1e-3


@dataclass(frozen=True, kw_only=True)
class SharedContext:
    """Sequences that share most of their keys cost `factor` of their attention: where distinct tokens are at most
    unique_per_request a request, and requests * distinct tokens at most requests_times_unique."""

    unique_per_request: int
    requests_times_unique: int
    factor: float


@dataclass(frozen=True, kw_only=True)
class Attention:
    """Of a whole step, by total context: `short` up to short_context, the line (base, per token) beyond."""

    short_context: int
    short: float
    line: tuple[float, float]
    shared: SharedContext

    def ms(self, context: int, num_requests: int, unique: int) -> float:
        if context <= self.short_context:
            return self.short
        base, per_token = self.line
        ms = base + per_token * context
        share = self.shared
        if unique <= share.unique_per_request * num_requests and num_requests * unique <= share.requests_times_unique:
            ms *= share.factor
        return ms


@dataclass(frozen=True, kw_only=True)
class LongChunk:
    """A request with extend * length > above adds ms: constant, per extend token, per token of length, per product."""

    above: int
    ms: tuple[float, float, float, float]


class BatchRegression:
    """Linear layers by the step's tokens, piecewise polynomials; attention by its context; long chunks on top.

    linear_ms: (from so many tokens, coefficients by power) by tokens. A step that computes more never takes less: a
    piece that falls (the A6000's parabola does from 244 tokens on, to below zero at 361) stays at the highest before.
    """

    def __init__(
        self,
        *,
        name: str,
        engine: EngineShape,
        linear_ms: Sequence[tuple[int, Sequence[float]]],
        attention_ms: Attention | None,
        long_chunk: LongChunk,
        efficiency: float,
    ) -> None:
        self.name = name
        self.engine = engine
        self._linear_ms = _monotone(linear_ms)
        self._last_terms = tuple(linear_ms[-1][1])
        self._attention_ms = attention_ms
        self._long_chunk = long_chunk
        self._scale_s = MS / efficiency

    def step_s(self, work: StepWork) -> float:
        num_tokens, context, long_ms = work.num_decode, work.decode_context, 0.0
        constant, per_extend, per_length, per_product = self._long_chunk.ms
        for extend, length in work.chunks:
            num_tokens += extend
            context += length
            if extend * length > self._long_chunk.above:
                long_ms += constant + per_extend * extend + per_length * length + per_product * extend * length
        ms = self._linear(num_tokens) + long_ms
        if self._attention_ms is not None:
            ms += self._attention_ms.ms(context, work.num_decode + len(work.chunks), work.unique_context)
        return ms * self._scale_s

    def _linear(self, num_tokens: int) -> float:
        known = self._linear_ms
        return known[num_tokens] if num_tokens < len(known) else max(known[-1], _value(self._last_terms, num_tokens))


def _value(terms: Sequence[float], x: int) -> float:
    return float(sum(term * x**power for power, term in enumerate(terms)))


def _monotone(pieces: Sequence[tuple[int, Sequence[float]]]) -> list[float]:
    """Milliseconds of 0, 1, ... tokens up to where the last piece begins."""
    ends = [start for start, _ in pieces[1:]] + [pieces[-1][0] + 1]
    values = (_value(terms, num) for (start, terms), end in zip(pieces, ends, strict=True) for num in range(start, end))
    return list(itertools.accumulate(values, max))


class RequestRegression:
    """Sums over requests: (constant, per extend token, per token of length, per product) in ms.

    Measured with prompts. To the letter a sequence that decodes is a prompt of one token, and 64 of them take 64 times
    what one takes; that is the model with decode_ms None. With it (step, per row, per token of context), the constant,
    which stands for the reading of the weights, is paid once by all that decode, and not at all beside a chunk.
    """

    def __init__(
        self,
        *,
        name: str,
        engine: EngineShape,
        chunk_ms: tuple[float, float, float, float],
        decode_ms: tuple[float, float, float] | None,
    ) -> None:
        self.name = name
        self.engine = engine
        self._chunk_ms = chunk_ms
        self._decode_ms = decode_ms

    def step_s(self, work: StepWork) -> float:
        constant, per_extend, per_length, per_product = self._chunk_ms
        ms = 0.0
        for extend, length in work.chunks:
            ms += constant + per_extend * extend + per_length * length + per_product * extend * length
        if work.num_decode and self._decode_ms is None:
            ms += (constant + per_extend) * work.num_decode + (per_length + per_product) * work.decode_context
        elif work.num_decode and self._decode_ms is not None:
            step, per_row, per_token = self._decode_ms
            # Keys that several sequences share are read once for all of them.
            context = min(work.decode_context, work.unique_context) if work.unique_context else work.decode_context
            ms += per_row * work.num_decode + per_token * context + (0.0 if work.chunks else step)
        return max(ms, constant) * MS
