"""One engine with every default, as `LLM(...)` has it; `preble-jax bench` measures it."""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.serve = {"groups": 1}
    return config
