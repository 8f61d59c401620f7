"""Workloads: the same for the same seed, of the shape they are named for, and refused clearly when they are none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from preble_jax.bench.workloads import SHAPES, find_workload, read_workload
from preble_jax.errors import InvalidRequestError


@pytest.mark.parametrize("name", SHAPES)
def test_a_named_workload_has_its_shape(name: str) -> None:
    shape, workload = SHAPES[name], find_workload(name, seed=5)
    assert (len(workload.prompts), workload.max_tokens, workload.seed) == (shape.num_requests, shape.num_output, 5)
    assert {len(prompt) for prompt in workload.prompts} == {shape.num_prefix + shape.num_own}
    families = {tuple(prompt[: shape.num_prefix]) for prompt in workload.prompts}
    assert len(families) == (shape.num_families if shape.num_prefix else 1)
    assert len({tuple(prompt) for prompt in workload.prompts}) == shape.num_requests, "each has a part of its own"


def test_seeds_repeat_and_differ() -> None:
    assert find_workload("decode8", 1) == find_workload("decode8", 1)
    assert find_workload("decode8", 1).prompts != find_workload("decode8", 2).prompts


def test_the_first_tokens_are_pinned() -> None:
    """So that a result of one version can be compared with that of another."""
    assert find_workload("decode1", 0).prompts[0][:4] == [25347, 27662, 2753, 17068]


def test_a_small_vocabulary_is_kept_to() -> None:
    tokens = {token for prompt in find_workload("shared", 0, vocab_size=64).prompts for token in prompt}
    assert tokens == set(range(64))


def test_a_file_is_read(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"max_tokens": 3, "prompts": [[1, 2], [3]]}))
    workload = find_workload(str(file), seed=9)
    assert (workload.name, workload.seed, workload.max_tokens, workload.prompts) == ("mine", 0, 3, [[1, 2], [3]])
    assert workload.num_prompt_tokens == 3
    file.write_text(json.dumps({"name": "n", "seed": 4, "max_tokens": 3, "prompts": [[1]]}))
    assert (read_workload(file).name, read_workload(file).seed) == ("n", 4)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "expected JSON like"),
        ("[]", "expected an object like .*, got list"),
        ('{"prompts": [[1]]}', "max_tokens: expected an integer of at least 1, got None"),
        ('{"max_tokens": 0, "prompts": [[1]]}', "max_tokens: .* got 0"),
        ('{"max_tokens": true, "prompts": [[1]]}', "max_tokens: .* got True"),
        ('{"max_tokens": 1}', "prompts: expected a list of at least one list of token ids, got None"),
        ('{"max_tokens": 1, "prompts": []}', r"prompts: .* got \[\]"),
        ('{"max_tokens": 1, "prompts": [[1], []]}', "prompt 1: expected a list of token ids"),
        ('{"max_tokens": 1, "prompts": ["text"]}', "prompt 0: .* got 'text'; tokenise"),
        ('{"max_tokens": 1, "prompts": [[1, 2.5]]}', "prompt 0"),
        ('{"max_tokens": 1, "prompts": [[1]], "seed": "x"}', "seed: expected int, got 'x'"),
        ('{"max_tokens": 1, "prompts": [[1]], "name": 3}', "name: expected str, got 3"),
    ],
)
def test_what_is_no_workload_is_refused(content: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "bad.json"
    file.write_text(content)
    with pytest.raises(InvalidRequestError, match=rf"bad\.json: {words}"):
        find_workload(str(file))


def test_unknown_names_and_missing_files_say_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match=r"expected one of shared, .* or a \.json file, got 'decode9'"):
        find_workload("decode9")
    with pytest.raises(InvalidRequestError, match=r"nowhere\.json: expected a file that can be read"):
        find_workload(str(tmp_path / "nowhere.json"))
