"""Fair: DLPM's deficits between tenants, and within what they allow a bounded head start for what is cached.

The group's virtual time V is the prompt tokens it has been charged with so far. A request that comes at V with n
tokens that no page holds is ordered by its virtual arrival, V + floor(head_start * n), the least first; of equals, the
earlier. So it lets pass only those that come before the group has taken on another head_start * n tokens of prompts:
short work and hits go first, and for how long is known when the request comes. No clock, no cost model. head_start 0
is arrival order; a very large one is shortest uncached first.

Nobody starves. Let r come at V_r with L_r tokens in all (its prompt, and outputs it had made when it was preempted). It
lies at or before V_r + floor(head_start * L_r) whatever is evicted, and any s lies at or after V_s; both hold even for
places that lag (RankedByMatch). So whenever r may go (its tenant has a deficit left, its pages are not being computed),
every later arrival s with V_s >= V_r + head_start * L_r is admitted after r: r waits no longer than under first come,
first served, had it come when the group had taken on head_start * L_r tokens more. Nobody else may go while r is next
and pages are short, so a long prompt is not starved of them either. And V grows by a token at least at each first
admission, because a prompt's last token is always computed: an endless stream of hits moves it, too.

DLPM's bound between tenants, |W_f / w_f - W_g / w_g| <= 2 (U + Q), carries over word for word: it rests on who may go
(q > 0), what is charged, and when refills are made (nobody who waits has q > 0), none of which is touched here, and not
on the order of those that may go. So a tenant with requests waiting is served, and its requests in the order above.

V never goes back: prompt tokens given back stay in it, or a later arrival could lie before an earlier equal one. What a
preempted request computes again is not in it, as it is charged to nobody, and the request keeps its arrival.
"""

from __future__ import annotations

from preble_jax.config import TenantSettings
from preble_jax.sched.queues.dlpm import DLPM
from preble_jax.sched.sequence import Sequence

_ORDER_BITS = 40


class Fair(DLPM):
    """head_start: prompt tokens of the group that a request lets pass for each token of its own that is not cached."""

    def __init__(self, settings: TenantSettings, quantum: float, head_start: float) -> None:
        super().__init__(settings, quantum)
        self._head_start = head_start
        self._virtual_time = 0
        self._arrived: dict[int, int] = {}  # order of an unfinished request -> V when it came

    def add(self, sequence: Sequence) -> None:
        self._arrived.setdefault(sequence.order, self._virtual_time)
        super().add(sequence)

    def _key(self, sequence: Sequence, cached: int) -> int:
        """(virtual arrival, order) in one integer, which compares faster. A waiting request's tokens stay as many."""
        head_start = int(self._head_start * (len(sequence.tokens) - cached))
        return (self._arrived[sequence.order] + head_start << _ORDER_BITS) + sequence.order

    def served(self, sequence: Sequence, extend_tokens: int, output_tokens: int) -> None:
        if extend_tokens > 0:
            self._virtual_time += extend_tokens
        super().served(sequence, extend_tokens, output_tokens)

    def finished(self, sequence: Sequence) -> None:
        self._arrived.pop(sequence.order, None)
        super().finished(sequence)
