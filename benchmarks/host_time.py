"""What a step costs the host, and whether it grows with the queue.

64 requests decode (each with a prompt of its own) while others wait behind them: none, 1,000, 10,000. Host time by
part: planning, arrays, dispatch, settling; all of it but the first step's runs while the device works on the step
before. Its share is of the device's time a step. The last line lets nobody wait, so that several steps go in one
dispatch.

    python benchmarks/host_time.py [--model smollm2-135m-instruct] [--waiting 0 1000 10000] [--steps 100] [--json OUT]
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import random
from dataclasses import asdict
from pathlib import Path
from typing import Any

from preble_jax.config import Config
from preble_jax.config_files import from_keywords
from preble_jax.engine.engine import Engine
from preble_jax.engine.ledger import Ledger
from preble_jax.progress import make_progress
from preble_jax.request import Request
from preble_jax.sampling_params import SamplingParams

PROMPT_TOKENS = 32
PARTS = ("plan_s", "arrays_s", "dispatch_s", "settle_s")


def run(engine: Engine, num_waiting: int, num_steps: int, num_running: int) -> dict[str, Any]:
    """Steps in which `num_running` sequences decode; the requests are cancelled when enough were seen."""
    rng = random.Random(num_waiting)
    names = [f"{num_waiting}-{i}" for i in range(num_running + num_waiting)]
    for name in names:
        prompt = [rng.randrange(engine.limits.vocab_size) for _ in range(PROMPT_TOKENS)]
        sampling = SamplingParams(temperature=0.0, max_tokens=4 * num_steps, ignore_eos=True)
        engine.add(Request(request_id=name, prompt_token_ids=prompt, sampling=sampling))
    while engine.scheduler.num_waiting > num_waiting or any(s.num_uncomputed > 1 for s in engine.scheduler.running):
        engine.step()
    for _ in range(4):
        engine.step()
    engine.ledger = Ledger()
    engine.ledger.decode_step_s = 0.0
    while engine.ledger.steps < num_steps:
        engine.step()
    ledger = engine.ledger
    for name in names:
        engine.cancel(name)
    engine.drain()
    engine.reset_prefix_cache()
    milliseconds = {name: 1e3 * value / ledger.steps for name, value in asdict(ledger.times).items()}
    return {
        "waiting": num_waiting,
        "running": num_running,
        "steps": ledger.steps,
        "steps_per_dispatch": ledger.steps / ledger.dispatches,
        "ms_per_step": {name.removesuffix("_s"): round(value, 4) for name, value in milliseconds.items()},
        "host_share": round(ledger.host_s / ledger.device_s, 5),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--waiting", type=int, nargs="+", default=(0, 1_000, 10_000))
    parser.add_argument("--running", type=int, default=64)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--decode-steps", type=int, default=8)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    config = from_keywords(
        Config(),
        name=arguments.model,
        max_waiting=1 << 20,
        decode_steps=arguments.decode_steps,
        max_num_seqs=max(64, arguments.running),
    )
    engine = Engine.create(config, make_progress())
    gc.collect()
    rows = []
    for num_waiting in arguments.waiting:
        row = run(engine, num_waiting, arguments.steps, arguments.running)
        rows.append(row)
        parts = ", ".join(f"{part.removesuffix('_s')} {row['ms_per_step'][part[:-2]]:.3f}" for part in PARTS)
        print(
            f"{row['running']} decode, {num_waiting} wait: device {row['ms_per_step']['device']:.2f} ms a step, "
            f"host {parts} ms = {row['host_share']:.1%}; {row['steps_per_dispatch']:.1f} steps a dispatch",
            flush=True,
        )
    if arguments.json:
        result = {
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
            "model": arguments.model,
            "prompt_tokens": PROMPT_TOKENS,
            "runs": rows,
        }
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
