"""What int8 weights cost in accuracy, and what they bring in speed and memory.

    python benchmarks/int8_weights.py [--rounds 3] [--workloads decode8 decode64 prefill] [--json OUT]
    python benchmarks/int8_weights.py --rounds 0      accuracy alone

Accuracy: the goldens' prompts and greedy tokens (tests/goldens/smollm2_greedy.json), each token forced, so that every
position is judged with the same text before it. Of each format: the share of positions at which it would choose the
token that float32 chose, and how far the log-probability it gives that token is from float32's. Positions that float32
itself was sure of (its two best logits at least 0.02 apart, as in the tests) are counted apart.

Speed: named workloads on two engines, in alternation.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kernels_pallas import PageLayout
from preble_jax.bench.machine import describe_machine
from preble_jax.bench.rounds import measure
from preble_jax.bench.workloads import find_workload
from preble_jax.config import Config
from preble_jax.config_files import from_keywords
from preble_jax.engine.engine import Engine
from preble_jax.engine.runner import make_mesh
from preble_jax.kv.device import allocate_pages, pages_sharding
from preble_jax.model import registry
from preble_jax.model.decoder import AttentionCall, Decoder, StepArrays
from preble_jax.model.params import param_table
from preble_jax.model.quantize import quantize
from preble_jax.model.rope import rotation_table
from preble_jax.model.weights import load_params, open_checkpoint
from preble_jax.progress import make_progress

MODEL = "smollm2-135m-instruct"
ROOT = Path(__file__).resolve().parent.parent
GOLDENS = ROOT / "tests" / "goldens" / "smollm2_greedy.json"
RESULT = ROOT / "benchmarks" / "results" / "int8_weights.json"
UNDECIDED = 0.02
PAGE_SIZE = 16
PROMPT_BUCKETS = (64, 320, 1600)  # tokens before the first forced one, padded
# Name of a row -> dtype, and for int8 weights: with int8 activations, as on the CPU, or without.
FORMATS: Mapping[str, tuple[str, bool | None]] = {
    "float32": ("float32", None),
    "bfloat16": ("bfloat16", None),
    "int8 weights, bfloat16 activations": ("bfloat16", False),
    "int8 weights, int8 activations": ("bfloat16", True),
}

Golden = Mapping[str, Any]
Forced = Callable[[Golden], np.ndarray]


def forced_logprobs(dtype: str, int8_activations: bool | None) -> Forced:
    """A function from a golden to the log-probabilities [outputs, V] that a format gives at its positions."""
    mesh = make_mesh(1)
    checkpoint = open_checkpoint(registry.resolve(MODEL, make_progress()))
    model = checkpoint.model_config
    params: dict[str, Any] = dict(load_params(checkpoint, mesh, jnp.dtype(dtype)))
    checkpoint.close()
    for spec in param_table(model):
        if spec.in_axes and int8_activations is not None:
            host = quantize(np.asarray(params[spec.path]), spec.in_axes, dtype, int8_activations=int8_activations)
            params[spec.path] = jax.device_put(host)
    graph, weights = nnx.split(Decoder(model, params, rotation_table(model, PROMPT_BUCKETS[-1] + 64)))
    layout = PageLayout(
        num_pages=PROMPT_BUCKETS[-1] // PAGE_SIZE + 8,
        page_size=PAGE_SIZE,
        num_kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        dtype=jnp.dtype(dtype),
    )
    pages = allocate_pages(layout, model.num_layers, pages_sharding(mesh, None))

    @jax.jit
    def run(weights: Any, step: StepArrays) -> jax.Array:
        num_outputs = step.kv_lens.shape[0] - 1
        call = AttentionCall(mesh, num_outputs, "jnp", jnp.dtype(dtype))
        scores, _ = nnx.merge(graph, weights)(step, pages, call, jnp.array(True))
        return jax.nn.log_softmax(scores.logits()[:num_outputs])

    return lambda golden: np.asarray(run(weights, forced_step(golden, layout.num_pages)))


def forced_step(golden: Golden, num_pages: int) -> StepArrays:
    """All of a golden in one step: each token that an output follows on is a sequence of its own, and they share the
    pages of the last sequence, which is the prompt before them."""
    outputs, prompt = golden["output_token_ids"], golden["prompt_token_ids"]
    num_outputs, num_before = len(outputs), len(prompt) - 1
    bucket = next(size for size in PROMPT_BUCKETS if size >= num_before)
    padding = [0] * (bucket - num_before)
    positions = [*range(num_before, num_before + num_outputs), *range(num_before)]
    nowhere = [num_pages * PAGE_SIZE] * len(padding)
    lists = {
        "token_ids": [prompt[-1], *outputs[:-1], *prompt[:-1], *padding],
        "positions": [*positions, *padding],
        "slots": [*positions, *nowhere],  # page i holds the tokens from 16 i on
        "page_table": [list(range(num_pages))] * (num_outputs + 1),
        "cu_q_lens": [*range(num_outputs + 1), num_outputs + num_before],
        "kv_lens": [*(position + 1 for position in positions[:num_outputs]), num_before],
        "num_seqs": [num_outputs + (num_before > 0)],
        "last_token": [*range(num_outputs), num_outputs + max(num_before - 1, 0)],
    }
    arrays: dict[str, Any] = {name: np.asarray(values, np.int32) for name, values in lists.items()}
    return StepArrays(**arrays)


def accuracy(goldens: Sequence[Golden], logprobs: Sequence[np.ndarray], exact: Sequence[np.ndarray]) -> dict[str, Any]:
    """logprobs, exact: of the format and of float32, an array [outputs, V] a golden."""
    errors, agree, decided = [], [], []
    for golden, seen, true in zip(goldens, logprobs, exact, strict=True):
        chosen = np.asarray(golden["output_token_ids"])
        at = np.arange(len(chosen))
        errors += np.abs(seen[at, chosen] - true[at, chosen]).tolist()
        agree += (seen.argmax(axis=-1) == chosen).tolist()
        decided += (np.asarray(golden["top2_gap"]) >= UNDECIDED).tolist()
    return {
        "positions": len(agree),
        "agree": round(statistics.mean(agree), 5),
        "agree_where_decided": round(float(np.mean(np.asarray(agree)[decided])), 5),
        "logprob_error_mean": round(statistics.mean(errors), 5),
        "logprob_error_p99": round(float(np.quantile(errors, 0.99)), 5),
        "logprob_error_max": round(max(errors), 5),
    }


def measure_accuracy() -> dict[str, dict[str, Any]]:
    """By format."""
    goldens = json.loads(GOLDENS.read_text(encoding="utf-8"))["prompts"]
    exact: list[np.ndarray] = []
    rows = {}
    for name, format_ in FORMATS.items():
        forced = forced_logprobs(*format_)
        logprobs = [forced(golden) for golden in goldens]
        exact = exact or logprobs
        row = rows[name] = accuracy(goldens, logprobs, exact)
        print(
            f"{name:36} {row['agree']:7.2%} of {row['positions']} tokens agree ({row['agree_where_decided']:.2%} where "
            f"decided), log-prob error mean {row['logprob_error_mean']:.4f}, p99 {row['logprob_error_p99']:.3f}, "
            f"max {row['logprob_error_max']:.3f}",
            flush=True,
        )
    return rows


def measure_speed(names: Sequence[str], num_rounds: int) -> dict[str, dict[str, Any]]:
    """By weight format: MiB of weights, and by workload each round's seconds and milliseconds of device a step."""
    progress = make_progress()
    engines = {
        weight_format: Engine.create(from_keywords(Config(), name=MODEL, weight_format=weight_format), progress)
        for weight_format in ("native", "int8")
    }
    workloads = [find_workload(name) for name in names]
    rounds: dict[str, dict[str, list[Any]]] = {key: {name: [] for name in names} for key in engines}
    for _ in range(num_rounds):
        for key, engine in engines.items():
            for result in measure(engine, workloads, 1, progress):
                rounds[key][result.workload.name] += result.rounds
    table = {}
    for key, engine in engines.items():
        num_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(engine.runner.params))
        table[key] = {
            "weights_mib": round(num_bytes / (1 << 20), 1),
            "workloads": {
                name: {
                    "seconds": [round(r.seconds, 4) for r in seen],
                    "device_ms_a_step": [round(1e3 * r.device_s / r.num_steps, 3) for r in seen],
                }
                for name, seen in rounds[key].items()
            },
        }
    return table


def print_speed(table: Mapping[str, Mapping[str, Any]]) -> None:
    """Medians, with least and most; a ratio above 1 says that int8 is faster."""
    native, int8 = table["native"], table["int8"]
    print(f"weights: bfloat16 {native['weights_mib']} MiB, int8 {int8['weights_mib']} MiB")
    for name in native["workloads"]:
        cells = []
        for row in (native, int8):
            seconds = row["workloads"][name]["seconds"]
            step = statistics.median(row["workloads"][name]["device_ms_a_step"])
            cells.append(f"{statistics.median(seconds):.3f} s ({min(seconds):.3f}-{max(seconds):.3f}), {step:.2f} ms")
        ratios = [a / b for a, b in zip(*(t["workloads"][name]["seconds"] for t in (native, int8)), strict=True)]
        print(
            f"{name:10} bfloat16 {cells[0]} a step | int8 {cells[1]} a step | ratio {statistics.median(ratios):.2f} "
            f"({min(ratios):.2f}-{max(ratios):.2f})"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workloads", nargs="+", default=("decode8", "decode64", "prefill"))
    parser.add_argument("--json", type=Path, default=RESULT)
    arguments = parser.parse_args()
    result: dict[str, Any] = {"machine": describe_machine(), "model": MODEL, "accuracy": measure_accuracy()}
    if arguments.rounds:
        result["speed"] = measure_speed(arguments.workloads, arguments.rounds)
        print_speed(result["speed"])
    arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
