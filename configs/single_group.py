"""One device group on this machine's CPU: no placement to decide, all cores and memory to one engine."""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.model = {"name": "smollm2-135m-instruct"}
    config.kv = {"memory_gib": 1.0}
    config.engine = {"max_num_seqs": 32, "prefill_buckets": (64, 256)}
    config.serve = {"groups": 1}
    return config
