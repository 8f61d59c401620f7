"""Serves workload files once each, offline, all prompts at once, and prints a line of JSON for each: what
beside_vllm.py runs, with either engine's interpreter.

    PYTHON offline_round.py {preble-jax,vllm} MODEL WORKLOAD.json ...
"""

import json
import os
import sys
import time
from pathlib import Path


class PrebleJax:
    def __init__(self, model):
        from preble_jax import LLM, SamplingParams

        self._llm, self._sampling = LLM(model), SamplingParams

    def serve(self, prompts, max_tokens):
        """Returns the number of tokens made."""
        sampling = self._sampling(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
        return sum(len(output.token_ids) for output in self._llm.generate(prompts, sampling))

    def forget(self):
        self._llm.reset_prefix_cache()


class Vllm:
    def __init__(self, model):
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{len(os.sched_getaffinity(0)) - 1}")
        from vllm import LLM, SamplingParams

        settings = {"dtype": "bfloat16", "max_model_len": 4096, "max_num_seqs": 64, "disable_log_stats": True}
        self._llm, self._sampling = LLM(model, enable_prefix_caching=True, **settings), SamplingParams

    def serve(self, prompts, max_tokens):
        sampling = self._sampling(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
        asked = [{"prompt_token_ids": prompt} for prompt in prompts]
        return sum(len(answer.outputs[0].token_ids) for answer in self._llm.generate(asked, sampling, use_tqdm=False))

    def forget(self):
        self._llm.reset_prefix_cache()


def main():
    name, model, *files = sys.argv[1:]
    engine = {"preble-jax": PrebleJax, "vllm": Vllm}[name](model)
    for file in files:
        workload = json.loads(Path(file).read_text())
        prompts, max_tokens = workload["prompts"], workload["max_tokens"]
        engine.serve(prompts[:2], max_tokens)
        engine.forget()
        began = time.perf_counter()
        tokens = engine.serve(prompts, max_tokens)
        seconds = time.perf_counter() - began
        print(json.dumps({"workload": workload["name"], "seconds": seconds, "output_tokens": tokens}), flush=True)


if __name__ == "__main__":
    main()
