"""Paged attention written again, independently: numpy float64, one sequence and one head at a time, no blocks."""

from __future__ import annotations

import numpy as np


def attend(q, keys, values, q_lens, kv_lens, scale):
    """q [T, Hq, D]; keys, values: per sequence [kv_len, Hkv, D]. Returns out [T, Hq, D], lse [T, Hq], both float64."""
    out = np.zeros(q.shape, np.float64)
    lse = np.full(q.shape[:2], -np.inf)
    start = 0
    for k, v, q_len, kv_len in zip(keys, values, q_lens, kv_lens, strict=True):
        group = q.shape[1] // k.shape[1] if kv_len else 1
        for i in range(q_len):
            num_visible = kv_len - q_len + i + 1
            if num_visible <= 0:
                continue
            for head in range(q.shape[1]):
                scores = (
                    k[:num_visible, head // group].astype(np.float64) @ q[start + i, head].astype(np.float64) * scale
                )
                peak = scores.max()
                weights = np.exp(scores - peak)
                out[start + i, head] = weights @ v[:num_visible, head // group].astype(np.float64) / weights.sum()
                lse[start + i, head] = peak + np.log(weights.sum())
        start += q_len
    return out, lse
