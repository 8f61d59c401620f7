"""The file that `preble-jax profile` writes and `sched.cost_file` names: JSON; what the scheduler reads are three keys.

The rest says what was measured, where and how, for people.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

from preble_jax.errors import ConfigError

COSTS = ("prefill_base_s", "prefill_token_s", "decode_token_s")


def read_costs(path: Path, where: str = "sched.cost_file") -> dict[str, float]:
    """{setting of the sched section: seconds}. where: what named the file, for messages. Raises ConfigError for a file
    that is missing, damaged or another's."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{where}: expected a file of `preble-jax profile` at {path}, cannot read it ({error}); make one: "
            f"preble-jax profile --output {path}"
        ) from error
    costs = {}
    for name in COSTS:
        value = content.get(name) if isinstance(content, dict) else None
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 <= value < math.inf:
            raise ConfigError(
                f"{where}: expected {name} in {path} to be seconds >= 0, got {value!r}; make such a file:"
                f" preble-jax profile --output {path}"
            )
        costs[name] = float(value)
    return costs


def write_costs(path: Path, content: Mapping[str, object]) -> None:
    """content: the costs, and whatever else should be known. Raises ConfigError where the file cannot be written."""
    missing = [name for name in COSTS if name not in content]
    assert not missing, missing
    try:
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--output: expected a file that can be written, got {path} ({error.strerror})") from error
