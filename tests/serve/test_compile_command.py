"""`preble-jax compile` leaves everything that a start needs: the start after it compiles nothing."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from preble_jax import env

ROOT = Path(__file__).resolve().parents[2]
TINY_FOLDER = ROOT / "tests" / "goldens" / "tiny_llama3"
CONFIG = f"""
from ml_collections import ConfigDict


def get_config():
    config = ConfigDict()
    config.model = {{"name": {str(TINY_FOLDER)!r}, "dtype": "float32"}}
    config.kv = {{"num_pages": 64}}
    config.engine = {{"max_num_seqs": 8, "prefill_buckets": (64,)}}
    return config
"""
SERVE = """
import sys
from preble_jax import LLM, SamplingParams
from preble_jax.engine.compile_cache import num_compiles, num_from_cache
llm = LLM(sys.argv[1], skip_tokenizer=True)
llm.generate([[1, 2, 3]], SamplingParams(temperature=0.0, max_tokens=4))
print(num_compiles(), num_from_cache())
"""


def run(home: Path, *command: str) -> str:
    child_env = env.child_environment({"PREBLE_HOME": str(home), "PYTHONPATH": str(ROOT)})
    done = subprocess.run([sys.executable, *command], env=child_env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_start_after_it_finds_everything(tmp_path: Path) -> None:
    config = tmp_path / "mine.py"
    config.write_text(CONFIG)
    said = run(tmp_path, "-m", "serve.cli", "compile", "--config", str(config))
    total, compiled, found = map(int, re.search(r"(\d+) programs, (\d+) of .* and (\d+) found", said).groups())
    assert total == compiled + found
    assert compiled >= 3, "two step shapes, and the clearing of the pages"
    assert str(tmp_path / "xla") in said

    num_compiles, num_found = map(int, run(tmp_path, "-c", SERVE, str(config)).split())
    assert num_compiles == num_found > 0, "something was compiled again"
