"""When it pays to read a shared prefix once, and not once a sequence: the planner's cost rule."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class FamilyCosts:
    """What the passes of a backend cost, in units of one decode slot reading one key (all heads of one layer).

    Attention is read in tiles of queries: every tile reads all its keys. Splitting a family off saves its members'
    passes over the shared keys and pays for passes of the family, whose tiles are full of everybody's queries, and for
    gathering each query and merging its result.

    prompt_tile, family_tile: queries of a tile. prompt_pass, family_pass: one tile reading one key. family_key: what
    a family's key costs whatever its tiles.
    row: a query gathered and merged. family: one more family. step: having any family at all.
    of_prompts: prompt chunks can be members; False: decode slots alone, and the other tokens are not even gathered.
    """

    prompt_tile: int
    prompt_pass: float
    family_tile: int
    family_pass: float
    row: float
    family: float
    step: float
    of_prompts: bool = True
    family_key: float = 0.0

    def plain(self, q_lens: np.ndarray, num_decode_slots: int) -> np.ndarray:
        """What each sequence pays for a key that it reads for itself, [S]."""
        costs = -(-q_lens // self.prompt_tile) * self.prompt_pass
        costs[:num_decode_slots] = 1.0
        return costs

    def saved(self, plain: float, num_tokens: int, num_keys: int) -> float:
        """By a family with `num_tokens` queries over `num_keys`, whose members pay `plain` a key without it."""
        passes = -(-num_tokens // self.family_tile) * self.family_pass
        return (plain - passes - self.family_key) * num_keys - num_tokens * self.row - self.family


# jnp: measured on 2 cores with AVX512-BF16 (9 query and 3 key heads of 64, bfloat16 pages of 16): a slot reads a key in
# 60 ns, a tile of 16 in 280 ns. Prompt tiles are full of rows there as it is: with families 8 chunks of 64 tokens
# behind 1,024 shared ones took as long as without. cpu: likewise, 8 families of 2 to 8 members over 1,552 keys: one
# of both cores reads a key in 37 ns for a slot, in 48 + 15 m for a family's m members; a row is gathered and merged in
# 1.6 us. tpu and gpu are estimates from bytes, not measured: a key is 4 * Hkv * D bytes, a gathered row about
# 14 * Hq * D, and a kernel's start some microseconds.
COSTS = {
    "jnp": FamilyCosts(
        prompt_tile=64,
        prompt_pass=8.0,
        family_tile=16,
        family_pass=4.7,
        row=60.0,
        family=300.0,
        step=500.0,
        of_prompts=False,
    ),
    "cpu": FamilyCosts(
        prompt_tile=32,
        prompt_pass=12.0,
        family_key=1.3,
        family_tile=1,
        family_pass=0.4,
        row=45.0,
        family=80.0,
        step=500.0,
        of_prompts=False,
    ),
    "tpu": FamilyCosts(
        prompt_tile=128, prompt_pass=2.0, family_tile=128, family_pass=2.0, row=16.0, family=64.0, step=4096.0
    ),
    "gpu": FamilyCosts(
        prompt_tile=64, prompt_pass=2.0, family_tile=64, family_pass=2.0, row=16.0, family=64.0, step=8192.0
    ),
}


def family_costs(backend: str) -> FamilyCosts:
    """Of a name in `BACKENDS`; an interpreted kernel plans like the compiled one."""
    return COSTS[backend.removesuffix("-interpret")]
