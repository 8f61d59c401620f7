"""The default deployment: two device groups on this machine's CPU. `preble-jax serve`, `preble-jax demo`.

Buckets are few and small because every one is compiled at start, on the same two or four cores that serve.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.model = {"name": "smollm2-135m-instruct"}
    config.kv = {"memory_gib": 0.5}
    config.engine = {"max_num_seqs": 16, "prefill_buckets": (64, 256)}
    config.serve = {"groups": 2}
    return config
