"""From the start of an interpreter to the first token of `LLM(MODEL)`, once its programs are in the cache folder.

    python benchmarks/second_start.py [--model smollm2-135m-instruct] [--rounds 5] [--json OUT]

A first process fills the cache and is not counted. Each further one is started anew; the clock runs from before it is
started to when it prints its first token: interpreter, imports, weights, programs read back, pages, one prompt.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from preble_jax.bench.machine import describe_machine

PROGRAM = """
import sys
from preble_jax import LLM, SamplingParams
[output] = LLM(sys.argv[1]).generate(["The capital of France is"], SamplingParams(temperature=0.0, max_tokens=1))
print(output.token_ids, flush=True)
"""


def first_token_s(model: str) -> float:
    began = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, model], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        line = process.stdout.readline()
        seconds = time.perf_counter() - began
        errors = process.stderr.read()
    if process.returncode or not line.startswith("["):
        raise SystemExit(
            f"expected a token, got {line!r}; the process ended with {process.returncode}:\n{errors[-2000:]}"
        )
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, metavar="OUT")
    arguments = parser.parse_args()
    first_token_s(arguments.model)
    seconds = [first_token_s(arguments.model) for _ in range(arguments.rounds)]
    print(f"first token after {statistics.median(seconds):.2f} s ({min(seconds):.2f} to {max(seconds):.2f})")
    if arguments.json:
        document = {"machine": describe_machine(), "model": arguments.model, "first_token_s": seconds}
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
