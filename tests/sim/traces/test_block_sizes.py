"""The block size of a trace comes out of its lengths."""

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from preble_jax.sim.traces import read_trace


def _size(path: Path, rows: list[tuple[int, int]]) -> int:
    """Of prompts of (tokens, blocks), no block shared."""
    first = 0
    lines = []
    for num_prompt, num_blocks in rows:
        ids = list(range(first, first + num_blocks))
        first += num_blocks
        lines.append(json.dumps({"input_length": num_prompt, "output_length": 1, "hash_ids": ids}))
    path.write_text("\n".join(lines))
    return read_trace(path, "mooncake", rate=1.0, block_size=None, seed=0).block_size


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    size=st.integers(1, 600),
    extra=st.lists(st.integers(1, 3_000), max_size=5),
    partial=st.booleans(),
)
def test_the_size_is_found_when_the_lengths_fix_it(tmp_path: Path, size: int, extra: list[int], partial: bool) -> None:
    lengths = [2 * size, 2 * size + 1, 3 * size - 1 if size > 1 else 3, *extra]
    rows = [(length, -(-length // size) if partial else length // size) for length in lengths]
    found = _size(tmp_path / "trace.jsonl", rows)
    up = all(count == -(-length // found) for length, count in rows)
    down = all(count == length // found for length, count in rows)
    assert up or down, "explains every prompt, all in one way"
    if partial:
        assert found == size  # 2 blocks hold 2 * size, and a token more does not fit


@pytest.mark.parametrize(
    ("rows", "size"),
    [
        ([(6758, 14), (7322, 15)], 512),  # Mooncake's first lines
        ([(1549, 96), (1581, 98)], 16),  # full blocks only
        ([(10, 1)], 512),  # everything fits: Mooncake's
        ([(100, 0)], 512),
        ([(1000, 62)], 16),
        ([(100, 3), (64, 2)], 32),  # 34 to 49 rounded up, 26 to 32 rounded down
        ([(50, 2), (75, 3), (99, 3), (101, 4)], 25),  # one of them rounded down: no way is everybody's
    ],
)
def test_known_sizes(tmp_path: Path, rows: list[tuple[int, int]], size: int) -> None:
    assert _size(tmp_path / "trace.jsonl", rows) == size
