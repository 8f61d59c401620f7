"""The default model in this process, in float32, and a tiny one with random weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from preble_jax import LLM

GOLDENS = Path(__file__).parent.parent / "goldens"


@pytest.fixture(scope="session")
def smollm2(default_model: Path) -> LLM:
    return LLM(str(default_model), dtype="float32", max_num_seqs=16, prefill_buckets=(256,), memory_gib=0.5)


@pytest.fixture(scope="session")
def tiny() -> LLM:
    return LLM(
        str(GOLDENS / "tiny_llama3"),
        skip_tokenizer=True,
        dtype="float32",
        max_num_seqs=8,
        prefill_buckets=(64,),
        num_pages=64,
    )
