"""Attention of PyTorch and, where it is installed, FlashInfer on the shapes of gpu_kernels.py, which runs this.

One JSON row a line: name, contender, median_s, least_s, most_s; or name and error. Device time by CUDA events.
"""

from __future__ import annotations

import json
import statistics
import sys

import torch
from torch.nn.functional import scaled_dot_product_attention

HEADS, KV_HEADS, DIM, PAGE = 32, 8, 128, 64
REPEATS = 20
DECODE = {"decode_64x8k": (64, 8192), "decode_1x128k": (1, 131072)}
PREFILL = {"prefill_2k_over_8k": (2048, 8192)}


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.bfloat16, device="cuda")


def report(name: str, contender: str, make) -> None:
    """Times make() and prints its row; whatever it raises is printed instead."""
    try:
        run = make()
        for _ in range(5):
            run()
        seconds = []
        for _ in range(REPEATS):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            end.synchronize()
            seconds.append(start.elapsed_time(end) / 1e3)
        row = {"median_s": statistics.median(seconds), "least_s": min(seconds), "most_s": max(seconds)}
    except Exception as error:  # a peer that cannot is a finding, not an end
        row = {"error": f"{type(error).__name__}: {error}"[:1500]}
    print(json.dumps({"name": name, "contender": contender, **row}), flush=True)
    torch.cuda.empty_cache()


def sdpa(num: int, q_len: int, keys: int):
    """Dense keys. A chunk's queries are the last of its keys."""
    q, k, v = random(num, HEADS, q_len, DIM), random(num, KV_HEADS, keys, DIM), random(num, KV_HEADS, keys, DIM)
    if q_len == 1:
        return lambda: scaled_dot_product_attention(q, k, v, enable_gqa=True)
    from torch.nn.attention.bias import causal_lower_right

    k, v = (x.repeat_interleave(HEADS // KV_HEADS, dim=1) for x in (k, v))  # the mask object takes no groups
    mask = causal_lower_right(q_len, keys)
    return lambda: scaled_dot_product_attention(q, k, v, attn_mask=mask)


def pages_of(num: int, keys: int):
    """FlashInfer's arrays: pages [P, 2, PAGE, Hkv, D], indptr, shuffled indices, length of each last page."""
    count = keys // PAGE
    indptr = torch.arange(num + 1, dtype=torch.int32, device="cuda") * count
    indices = torch.randperm(num * count, device="cuda").to(torch.int32)
    last = torch.full((num,), PAGE, dtype=torch.int32, device="cuda")
    return random(num * count, 2, PAGE, KV_HEADS, DIM), indptr, indices, last


def flashinfer_decode(num: int, keys: int):
    import flashinfer

    pages, indptr, indices, last = pages_of(num, keys)
    space = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(space, "NHD", use_tensor_cores=True)
    wrapper.plan(indptr, indices, last, HEADS, KV_HEADS, DIM, PAGE, q_data_type=torch.bfloat16)
    q = random(num, HEADS, DIM)
    return lambda: wrapper.run(q, pages)


def flashinfer_prefill(new: int, cached: int):
    import flashinfer

    pages, indptr, indices, last = pages_of(1, new + cached)
    space = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(space, "NHD")
    q_indptr = torch.tensor([0, new], dtype=torch.int32, device="cuda")
    wrapper.plan(q_indptr, indptr, indices, last, HEADS, KV_HEADS, DIM, PAGE, causal=True, q_data_type=torch.bfloat16)
    q = random(new, HEADS, DIM)
    return lambda: wrapper.run(q, pages)


def main() -> int:
    for name, (num, keys) in DECODE.items():
        report(name, "torch sdpa, dense", lambda num=num, keys=keys: sdpa(num, 1, keys))
        report(name, "flashinfer, paged", lambda num=num, keys=keys: flashinfer_decode(num, keys))
    for name, (new, cached) in PREFILL.items():
        report(name, "torch sdpa, dense", lambda new=new, cached=cached: sdpa(1, new, new + cached))
        report(name, "flashinfer, paged", lambda new=new, cached=cached: flashinfer_prefill(new, cached))
    return 0


if __name__ == "__main__":
    sys.exit(main())
