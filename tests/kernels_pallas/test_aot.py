"""Compiling ahead of time, as far as it needs no libtpu: finding it, reading what the compiler noted, the command."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from dataclasses import replace

import jax.numpy as jnp
import pytest

from kernels_pallas.aot import (
    PRESETS,
    VARIANTS,
    Case,
    CompileReport,
    LibtpuMissingError,
    TpuTopology,
    __main__,
    topology,
)
from kernels_pallas.aot.__main__ import Row, main, table
from kernels_pallas.aot.report import ArrayCopy, KernelMemory, copies_of, kernels_of

CASE = Case(name="llama-3-8b", variant="decode", **PRESETS["llama-3-8b"])
REPORT = CompileReport(
    generation="v6e",
    topology="2x2",
    num_devices=1,
    kernels=(
        KernelMemory(name="small", vmem_used_bytes=1 << 20, vmem_limit_bytes=1 << 27),
        KernelMemory(name="large", vmem_used_bytes=3 << 20, vmem_limit_bytes=1 << 27),
    ),
    copies=(),
    vmem_capacity_bytes=1 << 27,
    hbm_capacity_bytes=1 << 35,
    argument_bytes=5 << 20,
    output_bytes=0,
    alias_bytes=0,
    temp_bytes=1 << 19,
    flops=None,
    optimal_s=2e-6,
    lower_s=0.1,
    compile_s=0.5,
)
PROGRAM = """
  %copy.4 = bf16[4,8,2,16,128]{4,3,2,1,0:T(8,128)(2,1)} copy(%pages.1), metadata={op_name="x"}
  %copy-start.1 = (s32[257]{0:T(512)S(1)}, s32[257]{0:T(512)}, u32[]{:S(2)}) copy-start(%cu_q_lens.1)
  ROOT %f.1 = f32[8,128]{1,0} custom-call(%x.1), custom_call_target="tpu_custom_call", \
metadata={op_name="jit(f)/paged_attention_decode" stack_frame_id=2}, backend_config={"flag_configs":[],\
"scoped_memory_configs":[{"memory_space":"1","offset":"0","size":"16777216"}],"custom_call_config":{"body":"TUzv"},\
"used_scoped_memory_configs":[{"memory_space":"2","offset":"0","size":"7"},\
{"memory_space":"1","offset":"0","size":"4194304"}],"retry_config":{"retry_count":"0"}}
  %g.1 = f32[8]{0} custom-call(%x.1), custom_call_target="AllocateBuffer"
"""


@pytest.fixture
def without_libtpu(monkeypatch, tmp_path):
    """No libtpu among the packages, none named, none beside them; returns where the last one would be."""
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "libtpu" else find_spec(name))
    return tmp_path / topology.BESIDE_PACKAGES


def test_without_libtpu_the_error_says_what_to_install(without_libtpu, capsys):
    with pytest.raises(LibtpuMissingError, match=r"pip install 'preble-jax\[aot\]'"):
        topology.find_libtpu()
    assert main(["--variant", "decode"]) == 2
    assert "preble-jax[aot]" in capsys.readouterr().err


def test_libtpu_beside_the_packages_or_where_the_environment_says(without_libtpu, monkeypatch, tmp_path):
    without_libtpu.parent.mkdir(parents=True)
    without_libtpu.touch()
    assert topology.find_libtpu() == without_libtpu
    named = tmp_path / "mine.so"
    monkeypatch.setenv("TPU_LIBRARY_PATH", str(named))
    with pytest.raises(LibtpuMissingError, match=r"expected a libtpu\.so, got .*mine\.so"):
        topology.find_libtpu()
    named.touch()
    assert topology.find_libtpu() == named


def test_an_unknown_generation_is_refused_before_libtpu_is_looked_for(without_libtpu):
    with pytest.raises(ValueError, match="expected one of v5e, v6e, tpu7x, got 'v9'"):
        TpuTopology.of("v9")


def test_kernels_and_copies_are_read_from_a_program():
    (kernel,) = kernels_of(PROGRAM)
    assert kernel == KernelMemory(name="paged_attention_decode", vmem_used_bytes=4194304, vmem_limit_bytes=16777216)
    assert [*copies_of(PROGRAM)] == [
        ArrayCopy(array="bf16[4,8,2,16,128]", num_bytes=4 * 8 * 2 * 16 * 128 * 2),
        ArrayCopy(array="s32[257]", num_bytes=257 * 4),
    ]


def test_a_refusal_is_told_without_the_kernel_it_quotes():
    message = 'Ran out of vmem for %f.1, backend_config={"custom_call_config":{"body":"TUzv"}}. Limit 16.00M exceeded'
    told = topology._without_program(message)
    assert "TUzv" not in told and told.startswith("Ran out of vmem") and told.endswith("Limit 16.00M exceeded")


def test_a_step_has_the_tokens_that_its_variant_says():
    sizes = {variant: replace(CASE, variant=variant) for variant in VARIANTS}
    assert {name: case.num_decode_slots for name, case in sizes.items()} == {
        "decode": 256, "prefill": 0, "mixed": 128, "family": 256, "write": 128, "layer": 128,
    }  # fmt: skip
    assert sizes["decode"].num_tokens == sizes["family"].num_tokens == 256
    assert (sizes["prefill"].num_tokens, sizes["mixed"].num_tokens) == (2048, 128 + 2048)


def test_pages_for_all_sequences_unless_memory_is_short():
    assert CASE.layout.num_pages == 2048  # 1 GiB of pages of 128 tokens, 8 heads, 2 x 128 numbers of 2 bytes
    assert CASE.page_array_bytes == 1 << 30
    assert replace(CASE, page_dtype="int8").layout.num_pages == 4096
    assert replace(CASE, context=1000, num_seqs=2).layout.num_pages == 2 * 8
    assert replace(CASE, tensor=8).page_array_bytes == 1 << 27
    assert CASE.layout.dtype == jnp.bfloat16 and CASE.layout.backend == "tpu"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "llama-9"], "expected some of llama-3-8b, .*got llama-9"),
        (["--generation", "v6e,v1"], "expected some of v5e, v6e, tpu7x, got v1"),
        (["--context", "8k"], "expected numbers separated by commas, got '8k'"),
    ],
)
def test_bad_options_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tensor": 3}, "expected a divisor of the 8 key heads, got 3"),
        ({"context": 0}, "context: expected at least 1, got 0"),
        ({"page_dtype": "int4"}, "page_dtype: expected one of bfloat16, float32, int8, fp8, got 'int4'"),
        ({"variant": "encode"}, "variant: expected one of decode, .*got 'encode'"),
    ],
)
def test_sizes_that_do_not_fit_together_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(CASE, **change)


def test_the_table_has_a_line_for_each_row_and_the_reasons_below():
    rows = [
        Row(case=CASE, generation="v6e", outcome=REPORT),
        Row(case=CASE, generation="v5e", outcome="VMEM: too much"),
    ]
    lines = table(rows).splitlines()
    assert [cell.strip() for cell in lines[2].split("|")[1:-1]] == [
        "llama-3-8b", "8192", "decode", "v6e", "3.0", "128", "5.0", "0.5", "0.0", "0.5",
    ]  # fmt: skip
    assert "refused" in lines[3] and len({len(line) for line in lines[:4]}) == 1
    assert lines[4] == "refused: llama-3-8b 8192 decode v5e: VMEM: too much"
    assert json.loads(json.dumps(rows[0].as_json()))["report"]["vmem_used_bytes"] == 3 << 20
    assert rows[1].as_json()["error"] == "VMEM: too much"


def test_a_refused_case_does_not_stop_the_others(monkeypatch, capsys):
    chip = TpuTopology(generation="v6e", shape="2x2", devices=())
    monkeypatch.setattr(TpuTopology, "of", classmethod(lambda cls, generation, shape=None: chip))

    def compile_case(case: Case, topology: TpuTopology) -> CompileReport:
        if case.variant == "decode":
            raise ValueError("page table: too long")
        return REPORT

    monkeypatch.setattr(__main__.Case, "compile", compile_case)
    assert main(["--variant", "decode,prefill", "--generation", "v6e"]) == 1
    printed = capsys.readouterr()
    assert "prefill" in printed.out.splitlines()[3] and "page table: too long" in printed.out
    assert printed.err.splitlines() == [
        "[1/2] llama-3-8b decode 8192 v6e: refused: page table: too long",
        "[2/2] llama-3-8b prefill 8192 v6e: compiled",
    ]
    assert main(["--variant", "prefill", "--generation", "v6e", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["page_array"]["num_bytes"] == 1 << 30
