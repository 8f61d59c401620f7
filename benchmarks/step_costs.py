"""What a device group's time goes to: seconds for a prompt of n tokens, seconds for an output token.

    python benchmarks/step_costs.py [--config local] [--cores 0] [--json benchmarks/results/step_costs_NAME.json]

The three numbers it fits are the defaults of the sched section (prefill_base_s, prefill_token_s, decode_token_s). One
group alone: with --cores it is confined to the cores that a worker of the local deployment gets.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from preble_jax.engine.engine import Engine

PROMPT_TOKENS = (64, 128, 256, 512, 1024, 2048)
BATCHES = (1, 4, 8, 16)
CONTEXT = 1024
OUTPUT_TOKENS = 24


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="local")
    parser.add_argument("--cores", type=lambda text: {int(core) for core in text.split(",")})
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.cores:
        os.sched_setaffinity(0, args.cores)  # before JAX sizes its thread pools
    from preble_jax.config_files import load_config
    from preble_jax.engine.engine import Engine
    from preble_jax.progress import make_progress

    config = load_config(args.config)
    engine = Engine.create(config, make_progress())
    rng = random.Random(0)
    prefill = {n: median_of(args.rounds, lambda n=n: prefill_s(engine, rng, n)) for n in PROMPT_TOKENS}
    decode = {b: median_of(args.rounds, lambda b=b: decode_step_s(engine, rng, b)) for b in BATCHES}
    base_s, token_s = fit_line(prefill)
    result = {
        "prefill_base_s": base_s,
        "prefill_token_s": token_s,
        "decode_token_s": decode[8] / 8,
        "prefill_s_by_tokens": prefill,
        "decode_step_s_by_batch": decode,
        "context_tokens": CONTEXT,
        "config": args.config,
        "model": config.model.name,
        "dtype": config.model.dtype,
        "cores": len(os.sched_getaffinity(0)),
        "machine": f"{platform.machine()}, {processor()}",
        "rounds": args.rounds,
    }
    print(json.dumps(result, indent=2))
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


def median_of(rounds: int, measure) -> float:  # type: ignore[no-untyped-def]
    return round(statistics.median(measure() for _ in range(rounds)), 6)


def prefill_s(engine: Engine, rng: random.Random, num_tokens: int) -> float:
    """A prompt nobody has cached, up to its first token."""
    add(engine, [rng.randrange(100, 40_000) for _ in range(num_tokens)], 1)
    return timed_steps(engine)[0]


def decode_step_s(engine: Engine, rng: random.Random, batch: int) -> float:
    """Median step of `batch` sequences that decode at a context of CONTEXT tokens."""
    prefix = [rng.randrange(100, 40_000) for _ in range(CONTEXT)]
    for _ in range(batch):
        add(engine, [*prefix, rng.randrange(100, 40_000)], OUTPUT_TOKENS)
    steps = []
    while engine.has_work:
        start = time.perf_counter()
        made = len(engine.step())
        if made == batch:
            steps.append(time.perf_counter() - start)
    return statistics.median(steps)


def timed_steps(engine: Engine) -> tuple[float, int]:
    start, steps = time.perf_counter(), 0
    while engine.has_work:
        engine.step()
        steps += 1
    return time.perf_counter() - start, steps


def add(engine: Engine, prompt: list[int], max_tokens: int) -> None:
    from preble_jax import SamplingParams
    from preble_jax.request import Request

    sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens)
    engine.add(Request(request_id=f"r{time.perf_counter_ns()}", prompt_token_ids=prompt, sampling=sampling))


def fit_line(points: dict[int, float]) -> tuple[float, float]:
    """Least squares with relative residuals: base and slope, base at least 0."""
    weights = {x: 1 / y**2 for x, y in points.items()}
    total = sum(weights.values())
    mean_x = sum(w * x for x, w in weights.items()) / total
    mean_y = sum(weights[x] * y for x, y in points.items()) / total
    slope = sum(weights[x] * (x - mean_x) * (y - mean_y) for x, y in points.items())
    slope /= sum(w * (x - mean_x) ** 2 for x, w in weights.items())
    return round(max(0.0, mean_y - slope * mean_x), 6), round(slope, 8)


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


if __name__ == "__main__":
    main()
