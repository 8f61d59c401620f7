"""python -m kernels_pallas.aot: the attention kernels compiled for TPUs, on this machine; VMEM and HBM of each.

Lists are separated by commas, and every combination is compiled. The table goes to stdout, progress to stderr.
Exit status: 0 when everything compiled, 1 when something was refused, 2 for bad input or without libtpu.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import jax

from kernels_pallas.aot.cases import PAGE_DTYPES, PRESETS, Q_DTYPES, VARIANTS, Case
from kernels_pallas.aot.report import CompileReport
from kernels_pallas.aot.topology import GENERATIONS, LibtpuMissingError, TpuCompileError, TpuTopology

_MIB = 1 << 20
_GIB = 1 << 30


@dataclass(frozen=True, kw_only=True)
class Row:
    """A case for a chip: what the compiler reports, or why it was refused."""

    case: Case
    generation: str
    outcome: CompileReport | str

    @property
    def error(self) -> str | None:
        return self.outcome if isinstance(self.outcome, str) else None

    def as_json(self) -> dict[str, Any]:
        row: dict[str, Any] = {"case": asdict(self.case), "generation": self.generation, "error": self.error}
        if isinstance(self.outcome, CompileReport):
            row["page_array"] = {"shape": self.case.layout.shape, "num_bytes": self.case.page_array_bytes}
            row["report"] = asdict(self.outcome) | {
                "vmem_used_bytes": self.outcome.vmem_used_bytes,
                "largest_copy_bytes": self.outcome.largest_copy_bytes,
            }
        return row


def main(argv: Sequence[str] | None = None) -> int:
    parser = _parser()
    args = parser.parse_args(argv)
    # No TPU is looked for: the process has libtpu loaded, and JAX would try to start one with it.
    jax.config.update("jax_platforms", "cpu")
    try:
        topologies = {name: TpuTopology.of(name, args.shape) for name in args.generation}
        cases = [*_cases(args)]
    except (ValueError, LibtpuMissingError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    rows = []
    for i, (case, (name, topology)) in enumerate(itertools.product(cases, topologies.items()), start=1):
        rows.append(compile_case(case, topology))
        said = f"refused: {rows[-1].error}" if rows[-1].error else "compiled"
        total = len(cases) * len(topologies)
        print(f"[{i}/{total}] {case.name} {case.variant} {case.context} {name}: {said}", file=sys.stderr, flush=True)
    print(json.dumps([row.as_json() for row in rows], indent=1) if args.json else table(rows))
    return int(any(row.error for row in rows))


def compile_case(case: Case, topology: TpuTopology) -> Row:
    try:
        return Row(case=case, generation=topology.generation, outcome=case.compile(topology))
    except (ValueError, TpuCompileError) as error:
        return Row(case=case, generation=topology.generation, outcome=str(error))


def _cases(args: argparse.Namespace) -> Iterator[Case]:
    sizes = {
        name: value
        for name in ("num_q_heads", "num_kv_heads", "head_dim", "sliding_window", "soft_cap")
        if (value := getattr(args, name)) is not None
    }
    for preset, context, variant in itertools.product(args.preset, args.context, args.variant):
        yield Case(
            name=f"{preset}*" if sizes else preset,
            variant=variant,
            context=context,
            **(PRESETS[preset] | sizes),
            page_size=args.page_size,
            num_seqs=args.sequences,
            step_tokens=args.step_tokens,
            page_dtype=args.page_dtype,
            q_dtype=args.q_dtype,
            page_bytes=int(args.page_memory_gib * _GIB),
            tensor=args.tensor,
        )


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table that reads well as plain text too."""
    head = ("model", "context", "program", "chip", "VMEM MiB", "of", "arguments MiB", "temporary MiB", "copy MiB")
    cells: list[tuple[str, ...]] = [(*head, "compile s")]
    refused = []
    for row in rows:
        case, report = row.case, row.outcome
        start = (case.name, f"{case.context}", case.variant, row.generation)
        if isinstance(report, str):
            refused.append(f"{' '.join(start)}: {report}")
            cells.append((*start, "refused", *[""] * 5))
            continue
        sizes = (report.argument_bytes, report.temp_bytes, report.largest_copy_bytes)
        cells.append(
            (
                *start,
                f"{report.vmem_used_bytes / _MIB:.1f}",
                f"{report.vmem_capacity_bytes / _MIB:.0f}",
                *(f"{size / _MIB:.1f}" for size in sizes),
                f"{report.compile_s:.1f}",
            )
        )
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["| " + " | ".join(f"{cell:<{n}}" for cell, n in zip(line, widths, strict=True)) + " |" for line in cells]
    lines.insert(1, "|" + "|".join("-" * (n + 2) for n in widths) + "|")
    return "\n".join([*lines, *(f"refused: {reason}" for reason in refused)])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m kernels_pallas.aot",
        description="Compiles the attention kernels for TPUs on this machine, which needs none; prints VMEM and HBM.",
        epilog="programs: " + "; ".join(f"{name}: {what}" for name, what in VARIANTS.items()),
    )

    def names(option: str, known: Sequence[str], default: str, what: str) -> None:
        def parse(text: str) -> list[str]:
            chosen = text.lower().split(",")
            unknown = sorted(set(chosen) - set(known))
            if unknown:
                raise argparse.ArgumentTypeError(f"expected some of {', '.join(known)}, got {', '.join(unknown)}")
            return chosen

        parser.add_argument(option, type=parse, default=default, metavar="NAME,...", help=f"{what} ({default})")

    def number(option: str, default: int | None, what: str, *, dest: str | None = None) -> None:
        shown = "the preset's" if default is None else default
        parser.add_argument(option, type=int, default=default, metavar="N", dest=dest, help=f"{what} ({shown})")

    names("--preset", tuple(PRESETS), "llama-3-8b", f"models: {', '.join(PRESETS)}")
    names("--variant", tuple(VARIANTS), "decode,prefill,mixed,family,write", f"programs: {', '.join(VARIANTS)}")
    names("--generation", tuple(GENERATIONS), ",".join(GENERATIONS), "TPU generations")
    number("--q-heads", None, "query heads", dest="num_q_heads")
    number("--kv-heads", None, "key heads", dest="num_kv_heads")
    number("--head-dim", None, "64, 128 or 256")
    number("--sliding-window", None, "keys that a query sees")
    parser.add_argument("--soft-cap", type=float, metavar="X", help="logit soft cap (the preset's)")
    number("--page-size", 128, "tokens of a page")
    number("--sequences", 256, "sequences of a step")
    parser.add_argument("--context", type=_numbers, default="8192", metavar="N,...", help="longest sequences (8192)")
    number("--step-tokens", 2048, "tokens of prompt chunks in a step")
    parser.add_argument("--page-dtype", choices=PAGE_DTYPES, default="bfloat16")
    parser.add_argument("--q-dtype", choices=Q_DTYPES, default="bfloat16")
    parser.add_argument(
        "--page-memory-gib", type=float, default=1.0, metavar="X", help="one layer's pages, at most (1)"
    )
    number("--tensor", 1, "devices over which heads are split")
    parser.add_argument("--shape", metavar="AxB", help="chips of the topology (the smallest; TPU7x: AxBxC)")
    parser.add_argument("--json", action="store_true", help="everything the compiler reports")
    return parser


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers separated by commas, got {text!r}") from None


if __name__ == "__main__":
    sys.exit(main())
