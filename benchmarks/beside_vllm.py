"""This engine beside vLLM: the same weights, the same prompts, in turn on the same machine.

    python benchmarks/beside_vllm.py --vllm PYTHON --weights FOLDER [WORKLOAD ...] [--seed N] [--rounds 3] [--json OUT]

PYTHON: the interpreter of an environment with vLLM in it; FOLDER: the model's weights as vLLM reads them. A workload is
a name or a file of `preble-jax bench engine`, or a shape FAMILIES:SHARED:REQUESTS:OWN:OUTPUT, in tokens, such as
5:1500:40:120:24. Each round starts vLLM, serves every workload once, and then does the same with this engine; the time
is from all prompts at once to the last token, text made. Above 1 a ratio says that this engine is faster.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from preble_jax.bench.machine import describe_machine
from preble_jax.bench.workloads import SHAPES, Shape, Workload, find_workload, make_workload
from preble_jax.errors import InvalidRequestError

ROUND = Path(__file__).with_name("offline_round.py")
SHAPE_FIELDS = [field.name for field in dataclasses.fields(Shape)]
OURS, PEER = "preble-jax", "vllm"


def workload_of(text: str, seed: int) -> Workload:
    if ":" not in text:
        return find_workload(text, seed)
    try:
        numbers = map(int, text.split(":"))
        return make_workload(text, Shape(**dict(zip(SHAPE_FIELDS, numbers, strict=True))), seed)
    except ValueError:
        raise InvalidRequestError(f"workload: expected FAMILIES:SHARED:REQUESTS:OWN:OUTPUT, got {text!r}") from None


def serve(python: str, engine: str, model: str, files: list[Path]) -> list[dict[str, Any]]:
    """One process's seconds and tokens, a row a workload."""
    command = [python, str(ROUND), engine, model, *map(str, files)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise SystemExit(f"{engine} ended with {ended.returncode}:\n{ended.stderr[-2000:]}")
    return [json.loads(line) for line in ended.stdout.splitlines() if line.startswith("{")]


def compare(workload: str, ours: list[float], peers: list[float]) -> dict[str, Any]:
    ratios = [peer / own for own, peer in zip(ours, peers, strict=True)]
    return {
        "workload": workload,
        "seconds": ours,
        "vllm_seconds": peers,
        "ratio_of_medians": round(statistics.median(peers) / statistics.median(ours), 3),
        "ratio_min": round(min(ratios), 3),
        "ratio_max": round(max(ratios), 3),
    }


def table(rows: list[dict[str, Any]]) -> Table:
    shown = Table(box=box.SIMPLE)
    for column in ("workload", "seconds", "vLLM, seconds", "ratio", "min..max"):
        shown.add_column(column, justify="left" if column == "workload" else "right")
    for row in rows:
        medians = (f"{statistics.median(row[name]):.2f}" for name in ("seconds", "vllm_seconds"))
        spread = f"{row['ratio_min']:.2f}..{row['ratio_max']:.2f}"
        shown.add_row(row["workload"], *medians, f"{row['ratio_of_medians']:.2f}", spread)
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workloads", nargs="*", default=list(SHAPES))
    parser.add_argument("--vllm", required=True, metavar="PYTHON")
    parser.add_argument("--weights", required=True, metavar="FOLDER")
    parser.add_argument("--model", default="smollm2-135m-instruct", help="the same for this engine")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="OUT")
    arguments = parser.parse_args()
    try:
        workloads = [workload_of(text, arguments.seed) for text in arguments.workloads]
    except InvalidRequestError as error:
        parser.error(str(error))
    seconds: dict[str, dict[str, list[float]]] = {OURS: defaultdict(list), PEER: defaultdict(list)}
    engines = ((arguments.vllm, PEER, arguments.weights), (sys.executable, OURS, arguments.model))
    with TemporaryDirectory() as folder:
        files = []
        for number, workload in enumerate(workloads):
            files.append(Path(folder, f"{number}.json"))
            kept = {"name": workload.name, "max_tokens": workload.max_tokens, "prompts": workload.prompts}
            files[-1].write_text(json.dumps(kept))
        for number in range(arguments.rounds):
            for python, engine, model in engines:
                for row in serve(python, engine, model, files):
                    seconds[engine][row["workload"]].append(row["seconds"])
                    print(f"round {number + 1}, {engine}: {row['workload']} {row['seconds']:.2f} s", flush=True)
    rows = [compare(name, own, seconds[PEER][name]) for name, own in seconds[OURS].items()]
    Console().print(table(rows))
    if arguments.json:
        document = {"machine": describe_machine(), "seed": arguments.seed, "rounds": arguments.rounds, "rows": rows}
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
