"""Steps of a chosen kind on a real engine, and how long they take.

Contexts are computed once and stay cached, so that a step with sixteen long sequences costs a round little more than
itself; what a chunk computes is new each time.
"""

from __future__ import annotations

import itertools
import random
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from preble_jax.engine.engine import Engine
from preble_jax.engine.shapes import StepShapes
from preble_jax.request import Request
from preble_jax.sampling_params import SamplingParams
from preble_jax.sched.step_costs import StepKind

CONTEXTS = (64, 1024, 2048)
DECODE_STEPS = 12  # measured in a round
REPEATS = 3  # of a chunk in a round
WARM_UP_STEPS = 2
_FEW_TOKENS = 15


@dataclass(frozen=True, kw_only=True)
class Probe:
    """num_rows sequences of `context` tokens decode, their first num_shared tokens the same; beside them num_chunks
    prompt chunks of `extend` tokens each, up to `length`. num_steps: without chunks, decode steps a dispatch."""

    num_rows: int = 0
    context: int = 0
    num_shared: int = 0
    num_chunks: int = 0
    extend: int = 0
    length: int = 0
    num_steps: int = 1

    @property
    def kind(self) -> StepKind:
        return StepKind(
            num_decode=self.num_rows,
            decode_context=self.num_rows * self.context,
            longest_decode=self.context,
            num_shared=self.num_shared,
            chunks=((self.extend, self.length),) * self.num_chunks,
            num_steps=self.num_steps,
        )


def choose_probes(
    shapes: StepShapes, *, room: int, pool: int, page_size: int, max_prefill_seqs: int, decode_steps: int = 1
) -> list[Probe]:
    """Steps that tell the terms of StepCosts apart, in every compiled shape. room: tokens of one sequence, pool: of all
    that are cached at a time. decode_steps: that a dispatch may be."""
    room = min(room, pool // 2)
    probes: dict[StepKind, Probe] = {}

    def add(
        num_rows: int,
        context: int,
        *,
        is_shared: bool = False,
        num_chunks: int = 0,
        extend: int = 0,
        num_steps: int = 1,
    ) -> None:
        """With less context where there is no room for so much; a chunk starts behind full pages."""
        context = min(context, room, pool // (2 * max(1, num_rows)) if not is_shared else room)
        num_shared = max(0, context // page_size - 1) * page_size if is_shared else 0
        probe = Probe(
            num_rows=num_rows,
            context=context if num_rows else 0,
            num_shared=num_shared,
            num_chunks=num_chunks,
            extend=extend,
            length=max(0, context - extend) // page_size * page_size + extend if num_chunks else 0,
            num_steps=num_steps,
        )
        if probe.length <= room:
            probes.setdefault(probe.kind, probe)

    smaller = 0
    for slots in shapes.decode_slots:
        for num_rows, context in itertools.product((smaller + 1, slots), CONTEXTS):
            add(num_rows, context)
        add(smaller + 1, CONTEXTS[1], num_steps=decode_steps)
        add(slots, CONTEXTS[1], is_shared=True)
        smaller = slots
    half = max(1, shapes.decode_slots[-1] // 2)
    least = 1
    for tokens in shapes.prefill_sizes:
        for context in CONTEXTS:
            add(0, context, num_chunks=1, extend=tokens)
        for extend in (min(least + _FEW_TOKENS, tokens), (least + tokens) // 2):  # whether padding costs
            add(0, CONTEXTS[1], num_chunks=1, extend=extend)
        several = min(max(4, -(-tokens // room)), max_prefill_seqs)
        add(0, CONTEXTS[1], num_chunks=several, extend=max(1, min(tokens // several, room)))
        for num_rows, context in ((1, CONTEXTS[1]), (half, CONTEXTS[0]), (half, CONTEXTS[1])):
            add(num_rows, context, num_chunks=1, extend=tokens)
        least = tokens + 1
    return list(probes.values())


class _Dispatch(NamedTuple):
    num_extend: int
    num_rows: int
    num_steps: int
    seconds: float


class StepProber:
    """Uses an idle engine, and leaves it idle."""

    def __init__(self, engine: Engine, seed: int = 0) -> None:
        self._engine = engine
        # Rows must not end while chunks run beside them, although a dispatch may be many decode steps.
        self.num_outputs = max(DECODE_STEPS + WARM_UP_STEPS + 1, 4 * engine.config.engine.decode_steps)
        self._random = random.Random(seed)
        self._numbers = itertools.count()
        self._texts: dict[int, list[int]] = {}  # by row; -1: what rows share; the contexts are beginnings of these

    def choose(self) -> list[Probe]:
        """What is worth measuring on this engine."""
        engine, page_size = self._engine, self._engine.config.kv.page_size
        return choose_probes(
            engine.runner.shapes,
            room=engine.limits.max_model_len - self.num_outputs - 1,
            pool=engine.cache.pool.num_pages * page_size,
            page_size=page_size,
            max_prefill_seqs=engine.limits.max_prefill_seqs,
            decode_steps=engine.config.engine.decode_steps if engine.config.engine.max_dispatch_s else 1,
        )

    def step_s(self, probe: Probe) -> float:
        """Median over a few steps of that kind."""
        try:
            return statistics.median(self._decode(probe) if not probe.num_chunks else self._mixed(probe))
        finally:
            self._cancel_all()

    def _decode(self, probe: Probe) -> list[float]:
        self._start_rows(probe)
        seconds = [
            done.seconds / done.num_steps
            for done in self._dispatches(probe.num_steps)
            if not done.num_extend and done.num_rows == probe.num_steps * probe.num_rows
        ]
        return seconds[WARM_UP_STEPS:] or seconds

    def _mixed(self, probe: Probe) -> list[float]:
        chunks = probe.num_chunks
        before = self._text(-1, probe.length - probe.extend)
        if before:  # so that it is cached
            self._add([*before, *self._tokens(1)], 1)
            self._drain()
        seconds = []
        for _ in range(REPEATS):
            if probe.num_rows:
                self._start_rows(probe)
                self._await_decoding(probe.num_rows)
            for _ in range(chunks):
                self._add([*before, *self._tokens(probe.extend)], 1)
            seconds += [done.seconds for done in self._dispatches() if done.num_extend >= chunks * probe.extend]
            self._cancel_all()
        return seconds

    def _start_rows(self, probe: Probe) -> None:
        """Contexts have `context` tokens in the middle of what they make. They are computed beforehand, as far as they
        are not cached, so that all rows start together."""
        length = max(1, probe.context - DECODE_STEPS // 2)
        shared = self._text(-1, min(probe.num_shared, length))
        prompts = [[*shared, *self._text(row, length)[len(shared) :]] for row in range(probe.num_rows)]
        for max_tokens in (1, self.num_outputs):
            self._drain()
            for prompt in prompts:
                self._add(prompt, max_tokens)

    def _await_decoding(self, num_rows: int) -> None:
        for done in self._dispatches():
            if not done.num_extend and done.num_rows == done.num_steps * num_rows:
                return

    def _dispatches(self, decode_steps: int = 1) -> Iterator[_Dispatch]:
        """Steps until nothing is left, so many of them a dispatch where all there is decodes."""
        engine, ledger = self._engine, self._engine.ledger
        while engine.has_work:
            # What the engine goes by; a little less, because of rounding.
            ledger.decode_step_s = engine.config.engine.max_dispatch_s / (2 * decode_steps + 0.5)
            count, seconds = ledger.dispatches, ledger.step_s
            extend, rows, steps = ledger.total.extend_tokens, ledger.decode_rows, ledger.steps
            engine.step()
            if ledger.dispatches > count:
                yield _Dispatch(
                    num_extend=ledger.total.extend_tokens - extend,
                    num_rows=ledger.decode_rows - rows,
                    num_steps=ledger.steps - steps,
                    seconds=ledger.step_s - seconds,
                )

    def _drain(self) -> None:
        for _ in self._dispatches():
            pass

    def _cancel_all(self) -> None:
        scheduler = self._engine.scheduler
        for sequence in [*scheduler.running, *scheduler.queue]:
            self._engine.cancel(sequence.request.request_id)
        self._drain()

    def _text(self, row: int, length: int) -> list[int]:
        text = self._texts.setdefault(row, [])
        text += self._tokens(length - len(text))
        return text[:length]

    def _tokens(self, num: int) -> list[int]:
        return [self._random.randrange(self._engine.limits.vocab_size) for _ in range(num)]

    def _add(self, prompt: Sequence[int], max_tokens: int) -> None:
        sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
        name = f"probe-{next(self._numbers)}"
        self._engine.add(Request(request_id=name, prompt_token_ids=list(prompt), sampling=sampling))
