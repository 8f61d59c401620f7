"""Paged attention written again, independently: numpy float64, one sequence, query and head at a time, no blocks."""

from __future__ import annotations

import numpy as np


def attend(q, keys, values, q_lens, kv_lens, scale, *, kv_starts=None, causal=True, sliding_window=None, soft_cap=None):
    """q [T, Hq, D]; keys, values: per sequence [kv_len, Hkv, D] as plain numbers (what stood in an int8 or fp8 page is
    already multiplied by its scale); entries before a sequence's start are never looked at.

    A query's position is that of its own key: the sequence's last query is at kv_len - 1. It sees key j when
    start <= j < kv_len and, causal, j <= position and, with a window, position - j < window.
    Returns out [T, Hq, D] and lse [T, Hq], both float64; zeros and -inf for a query that sees nothing.
    """
    out = np.zeros(q.shape, np.float64)
    lse = np.full(q.shape[:2], -np.inf)
    starts = [0] * len(q_lens) if kv_starts is None else kv_starts
    token = 0
    for k, v, q_len, kv_len, start in zip(keys, values, q_lens, kv_lens, starts, strict=True):
        for i in range(q_len):
            position, j = kv_len - q_len + i, np.arange(start, kv_len)
            if causal:
                j = j[j <= position]
                j = j[position - j < sliding_window] if sliding_window is not None else j
            for head in range(q.shape[1] if len(j) else 0):
                kv_head = head * k.shape[1] // q.shape[1]
                scores = k[j, kv_head].astype(np.float64) @ q[token + i, head].astype(np.float64) * scale
                if soft_cap is not None:
                    scores = soft_cap * np.tanh(scores / soft_cap)
                weights = np.exp(scores - scores.max())
                out[token + i, head] = weights @ v[j, kv_head].astype(np.float64) / weights.sum()
                lse[token + i, head] = scores.max() + np.log(weights.sum())
        token += q_len
    return out, lse
