"""The least time each named workload can take on a machine: its operations and bytes at the machine's peaks.

    python benchmarks/workload_floor.py [--bandwidth 63] [--gflops 900] [--max-num-seqs 64]

Counted: prompt tokens that no other prompt shares, computed once; all requests decoding together; every weight read
once a step; every distinct page of a step read once. Not counted: anything a real engine does besides. The model is the
default one, in bfloat16.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.table import Table

from preble_jax.bench.workloads import SHAPES, Shape


@dataclass(frozen=True, kw_only=True)
class Model:
    """SmolLM2-135M."""

    num_layers: int = 30
    hidden: int = 576
    heads: int = 9
    kv_heads: int = 3
    head_dim: int = 64
    mlp: int = 1536
    vocab: int = 49_152

    @property
    def layer_weights(self) -> int:
        """Numbers in the matrices of all layers."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return self.num_layers * (attention + 3 * self.hidden * self.mlp)

    @property
    def head_weights(self) -> int:
        return self.hidden * self.vocab

    @property
    def kv_bytes(self) -> int:
        """Of one token."""
        return self.num_layers * 2 * self.kv_heads * self.head_dim * 2

    @property
    def pair_flops(self) -> int:
        """Of one query token looking at one key."""
        return 4 * self.num_layers * self.heads * self.head_dim


@dataclass(frozen=True)
class Machine:
    bytes_per_s: float
    flops_per_s: float

    def seconds(self, num_bytes: float, flops: float) -> float:
        return max(num_bytes / self.bytes_per_s, flops / self.flops_per_s)


def prefill_s(model: Model, machine: Machine, shape: Shape) -> float:
    families = min(shape.num_families, shape.num_requests) if shape.num_prefix else 0
    tokens = families * shape.num_prefix + shape.num_requests * shape.num_own
    pairs = families * shape.num_prefix * (shape.num_prefix + 1) / 2
    pairs += shape.num_requests * shape.num_own * (shape.num_prefix + (shape.num_own + 1) / 2)
    flops = 2 * tokens * model.layer_weights + 2 * shape.num_requests * model.head_weights + pairs * model.pair_flops
    return machine.seconds(2 * (model.layer_weights + model.head_weights), flops)


def decode_step_s(model: Model, machine: Machine, shape: Shape, num_seqs: int) -> float:
    """In the middle of the output."""
    weights = model.layer_weights + model.head_weights
    own = shape.num_own + shape.num_output / 2
    families = min(shape.num_families, num_seqs) if shape.num_prefix else 0
    kv_bytes = (families * shape.num_prefix + num_seqs * own) * model.kv_bytes
    attention = machine.seconds(kv_bytes, num_seqs * (shape.num_prefix + own) * model.pair_flops)
    return machine.seconds(2 * weights, 2 * weights * num_seqs) + attention


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bandwidth", type=float, default=63.0, help="GB/s")
    parser.add_argument("--gflops", type=float, default=900.0, help="GFLOP/s in bfloat16")
    parser.add_argument("--max-num-seqs", type=int, default=64, help="sequences that decode at a time")
    arguments = parser.parse_args()
    model, machine = Model(), Machine(arguments.bandwidth * 1e9, arguments.gflops * 1e9)
    table = Table(box=box.SIMPLE)
    for column in ("workload", "prefill s", "decode step ms", "steps", "decode s", "floor s"):
        table.add_column(column, justify="left" if column == "workload" else "right")
    for name, shape in SHAPES.items():
        num_seqs = min(shape.num_requests, arguments.max_num_seqs)
        steps = (shape.num_output - 1) * -(-shape.num_requests // num_seqs)
        prefill, step = prefill_s(model, machine, shape), decode_step_s(model, machine, shape, num_seqs)
        numbers = (f"{prefill:.2f}", f"{1e3 * step:.1f}" if steps else "-", str(steps), f"{steps * step:.2f}")
        table.add_row(name, *numbers, f"{prefill + steps * step:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
