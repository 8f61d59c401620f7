"""The TPU kernels through the TPU's own compiler, at production shapes; tiny shapes would pass falsely.

A process for each generation, because libtpu stays loaded and prints; they run at the same time. Skipped, with the
reason, where libtpu is not installed or does not load (`make test` installs it where pip has it).
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from kernels_pallas.aot import PRESETS, Case, LibtpuMissingError
from kernels_pallas.aot.topology import find_libtpu

ROOT = Path(__file__).resolve().parents[2]
MISSING = 77
TIMEOUT_S = 500  # half a minute on two idle cores
pytestmark = pytest.mark.timeout(TIMEOUT_S + 20)
PROGRAM = f"""
import json, sys
import jax
jax.config.update("jax_platforms", "cpu")
from kernels_pallas.aot import Case, LibtpuMissingError, TpuTopology
from kernels_pallas.aot.__main__ import compile_case
try:
    topology = TpuTopology.of(sys.argv[1])
except LibtpuMissingError as error:
    sys.exit(print(error) or {MISSING})
print(json.dumps([compile_case(Case(**case), topology).as_json() for case in json.loads(sys.argv[2])]))
"""


def case(name: str, variant: str, context: int, **more: Any) -> Case:
    return Case(name=name, variant=variant, context=context, **PRESETS[name], **more)


# A layer is the write and both variants of the kernel in one program. Compiling costs seconds, so not every cell of
# model x program x context x chip is here: each chip has each model, each context and each kernel, and every model has
# its write, its decode and its prefill kernel on some chip.
CASES = {
    "v5e": [
        case("llama-3-8b", "layer", 32768),
        case("llama-3-70b", "decode", 32768),
        case("head-dim-64", "layer", 8192),
        case("llama-3-8b", "family", 8192),
    ],
    "v6e": [
        case("llama-3-8b", "layer", 32768),
        case("llama-3-70b", "layer", 8192, tensor=4),
        case("head-dim-64", "decode", 32768),
        case("head-dim-64", "prefill", 8192),
        case("llama-3-8b", "decode", 8192, page_dtype="int8"),
    ],
    "tpu7x": [
        case("llama-3-8b", "layer", 32768),
        case("llama-3-70b", "prefill", 32768),
        case("llama-3-70b", "decode", 8192),
        case("head-dim-64", "family", 8192),
        case("llama-3-8b", "decode", 8192, page_dtype="fp8"),
    ],
}
NUMBERED = [(generation, i) for generation, cases in CASES.items() for i in range(len(cases))]


@pytest.fixture(scope="module")
def compiled() -> Iterator[dict[str, list[dict[str, Any]]]]:
    """Rows of `python -m kernels_pallas.aot --json`, by generation, in the order of CASES."""
    try:
        find_libtpu()
    except LibtpuMissingError as error:
        pytest.skip(str(error))
    running = {
        generation: subprocess.Popen(
            [sys.executable, "-c", PROGRAM, generation, json.dumps([asdict(each) for each in cases])],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for generation, cases in CASES.items()
    }
    try:
        rows = {}
        for generation, process in running.items():
            printed, complaints = process.communicate(timeout=TIMEOUT_S)
            if process.returncode == MISSING:
                pytest.skip(printed.strip())
            assert process.returncode == 0, complaints
            rows[generation] = json.loads(printed)
        yield rows
    finally:
        for process in running.values():
            process.kill()
            process.communicate()


@pytest.mark.parametrize(
    ("generation", "number"),
    NUMBERED,
    ids=[f"{g}-{(c := CASES[g][i]).name}-{c.variant}-{c.context}-{c.page_dtype}-{c.tensor}" for g, i in NUMBERED],
)
def test_compiles_within_the_chip(compiled, generation, number):
    wanted, row = CASES[generation][number], compiled[generation][number]
    assert row["error"] is None
    report = row["report"]
    assert {kernel["name"] for kernel in report["kernels"]} == {
        "decode": {"paged_attention_decode"},
        "prefill": {"paged_attention_prefill"},
        "family": {"paged_attention_decode", "paged_attention_prefill"},
        "layer": {"write_kv", "paged_attention_decode", "paged_attention_prefill"},
    }[wanted.variant]
    for kernel in report["kernels"]:
        assert 0 < kernel["vmem_used_bytes"] <= kernel["vmem_limit_bytes"] <= report["vmem_capacity_bytes"], kernel
    assert report["num_devices"] == wanted.tensor
    assert report["argument_bytes"] + report["temp_bytes"] < report["hbm_capacity_bytes"]

    # Pages are written in place and never copied; besides them the program needs a few times its queries,
    # and on TPU7x 16 MiB more.
    pages = row["page_array"]["num_bytes"]
    assert report["alias_bytes"] == (pages if wanted.variant == "layer" else 0)
    assert report["largest_copy_bytes"] < pages // 8
    queries = wanted.num_tokens * wanted.num_q_heads // wanted.tensor * max(wanted.head_dim, 128) * 4
    assert report["temp_bytes"] < 4 * queries * (3 if wanted.variant == "family" else 1) + (24 << 20)


def test_every_generation_reports_its_own_chip(compiled):
    chips = {generation: rows[0]["report"]["vmem_capacity_bytes"] >> 20 for generation, rows in compiled.items()}
    assert chips == {"v5e": 128, "v6e": 128, "tpu7x": 64}
