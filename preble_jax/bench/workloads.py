"""Offline workloads: prompts of token ids, and how many tokens each is to be continued by.

A workload file is JSON: {"name": "mine", "seed": 0, "max_tokens": 32, "prompts": [[1, 2, 3], [1, 2, 4]]}; the seed may
be left out. The named ones are made from a seed: prompts of random ids, in families that share a beginning.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from preble_jax.errors import InvalidRequestError

_FORMAT = '{"name": "mine", "max_tokens": 32, "prompts": [[1, 2, 3], ...]}'
_TOKENS = (100, 40_000)  # ids that the default model's vocabulary, and most others, have


@dataclass(frozen=True, kw_only=True)
class Workload:
    """All prompts arrive at once; each is continued by `max_tokens` tokens, greedily, whatever they are."""

    name: str
    seed: int
    max_tokens: int
    prompts: Sequence[Sequence[int]]

    @property
    def num_prompt_tokens(self) -> int:
        return sum(map(len, self.prompts))


@dataclass(frozen=True, kw_only=True)
class Shape:
    """num_prefix: tokens that a family's prompts share; num_own: those of each prompt alone; num_output: made."""

    num_families: int
    num_prefix: int
    num_requests: int
    num_own: int
    num_output: int


SHAPES = {
    "shared": Shape(num_families=4, num_prefix=1024, num_requests=64, num_own=64, num_output=32),
    "toolbench": Shape(num_families=8, num_prefix=1560, num_requests=48, num_own=275, num_output=43),
    "agent": Shape(num_families=3, num_prefix=2100, num_requests=48, num_own=180, num_output=16),
    "unshared": Shape(num_families=16, num_prefix=0, num_requests=16, num_own=512, num_output=32),
    "prefill": Shape(num_families=8, num_prefix=0, num_requests=8, num_own=512, num_output=1),
    "decode1": Shape(num_families=1, num_prefix=0, num_requests=1, num_own=16, num_output=64),
    "decode8": Shape(num_families=8, num_prefix=0, num_requests=8, num_own=16, num_output=64),
    "decode32": Shape(num_families=32, num_prefix=0, num_requests=32, num_own=16, num_output=64),
    "decode64": Shape(num_families=64, num_prefix=0, num_requests=64, num_own=16, num_output=64),
}


def find_workload(name: str, seed: int = 0, vocab_size: int = _TOKENS[1]) -> Workload:
    """name: one of SHAPES, or the path of a workload file, for which the seed does not count.

    vocab_size: of the model; a named workload uses the ids it has. Raises InvalidRequestError.
    """
    if name in SHAPES:
        return make_workload(name, SHAPES[name], seed, vocab_size)
    if not name.endswith(".json"):
        raise InvalidRequestError(f"workload: expected one of {', '.join(SHAPES)} or a .json file, got {name!r}")
    return read_workload(Path(name))


def make_workload(name: str, shape: Shape, seed: int, vocab_size: int = _TOKENS[1]) -> Workload:
    """Request i belongs to family i modulo the families, so that those of one family are spread out."""
    low, high = _TOKENS if vocab_size >= _TOKENS[1] else (0, vocab_size)
    rng = random.Random(seed)

    def draw(count: int) -> list[int]:
        return [rng.randrange(low, high) for _ in range(count)]

    prefixes = [draw(shape.num_prefix) for _ in range(shape.num_families)]
    prompts = [[*prefixes[i % shape.num_families], *draw(shape.num_own)] for i in range(shape.num_requests)]
    return Workload(name=name, seed=seed, max_tokens=shape.num_output, prompts=prompts)


def read_workload(path: Path) -> Workload:
    """Raises InvalidRequestError for a file that is missing or is no workload."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidRequestError(
            f"workload {path}: expected a file that can be read, got: {error.strerror}; "
            f"give another path, or one of {', '.join(SHAPES)}"
        ) from error
    except ValueError as error:  # bad JSON or bad UTF-8
        raise InvalidRequestError(f"workload {path}: expected JSON like {_FORMAT}, got: {error}; mend it") from error
    if not isinstance(value, dict):
        raise InvalidRequestError(
            f"workload {path}: expected an object like {_FORMAT}, got {type(value).__name__}; wrap it in one"
        )
    return Workload(
        name=_field(path, value, "name", str, path.stem),
        seed=_field(path, value, "seed", int, 0),
        max_tokens=_max_tokens(path, value),
        prompts=_prompts(path, value.get("prompts")),
    )


def _field(path: Path, value: dict[str, Any], key: str, kind: type, default: Any) -> Any:
    got = value.get(key, default)
    if not isinstance(got, kind) or isinstance(got, bool):
        raise InvalidRequestError(f"workload {path}: {key}: expected {kind.__name__}, got {got!r:.80}; change it")
    return got


def _max_tokens(path: Path, value: dict[str, Any]) -> int:
    got = value.get("max_tokens")
    if not isinstance(got, int) or isinstance(got, bool) or got < 1:
        raise InvalidRequestError(
            f"workload {path}: max_tokens: expected an integer of at least 1, got {got!r:.80}; it says how many tokens "
            "each prompt is continued by"
        )
    return got


def _prompts(path: Path, prompts: object) -> list[list[int]]:
    if not isinstance(prompts, list) or not prompts:
        raise InvalidRequestError(
            f"workload {path}: prompts: expected a list of at least one list of token ids, got {prompts!r:.80}; "
            f"the format is {_FORMAT}"
        )
    for index, prompt in enumerate(prompts):
        if not isinstance(prompt, list) or not prompt or not all(type(token) is int for token in prompt):
            raise InvalidRequestError(
                f"workload {path}: prompt {index}: expected a list of token ids, got {prompt!r:.80}; "
                "tokenise texts before"
            )
    return prompts
