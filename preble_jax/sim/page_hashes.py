"""Names of the pages of simulated requests, in place of hashes of tokens.

A block id stands for its block and everything before it. So a page is named by the block in which its last token lies
and that token's place in the block, whatever the sizes of pages and blocks. Pages that end beyond the blocks are named
by their request. 16 bytes, as preble_jax.kv.hashing makes them.

What a request says comes back in the prompt that follows it, and is named there: its pages have these names from the
beginning. Output that comes back in no prompt is named by its request: it is nobody else's. A prompt contains what it
follows if it begins with the same blocks and is long enough for prompt and output; where answers, or parts of them, are
left out of the conversation, it is shorter.
"""

from __future__ import annotations

import numpy as np

from preble_jax.errors import InvalidRequestError
from preble_jax.kv.hashing import HASH_BYTES
from preble_jax.sim.request import SimRequest, Workload

_OWN = -1  # in place of a place: the page is its request's alone


class PageHashes:
    """Of one workload's requests."""

    def __init__(self, workload: Workload, page_size: int) -> None:
        self._page_size = page_size
        self._block_size = workload.block_size
        self._requests = workload.requests
        self._continued: dict[int, SimRequest] = {}  # by number, the first request that contains this one's output
        for request in workload.requests:
            if request.follows is not None and _contains(request, workload.requests[request.follows]):
                self._continued.setdefault(request.follows, request)
        longest = max((request.num_prompt + request.num_output for request in workload.requests), default=0)
        last = np.arange(1, longest // page_size + 1, dtype=np.int64) * page_size - 1  # each page's last token
        self._block_of, self._place_of = np.divmod(last, workload.block_size)
        self._number_of = np.arange(len(last), dtype=np.int64)

    def of(self, index: int) -> tuple[bytes, ...]:
        """Names of the full pages of prompt and output of request number `index`."""
        request = self._requests[index]
        num_pages = (request.num_prompt + request.num_output) // self._page_size
        blocks, num_named = request.blocks, request.num_prompt // self._page_size
        if (later := self._continued.get(index)) is not None:
            blocks, num_named = later.blocks, num_pages
        num_covered = min(len(blocks) * self._block_size // self._page_size, num_named)
        names = np.empty((num_pages, 2), np.int64)
        if num_covered:
            names[:num_covered, 0] = np.array(blocks, np.int64)[self._block_of[:num_covered]]
            names[:num_covered, 1] = self._place_of[:num_covered]
        if num_covered < num_pages:
            names[num_covered:, 0] = self._number_of[num_covered:num_pages]
            names[num_covered:, 1] = _OWN - index
        return tuple(names.view(f"V{HASH_BYTES}")[:, 0].tolist())


def _contains(later: SimRequest, earlier: SimRequest) -> bool:
    """The later prompt begins with prompt and output of the earlier request."""
    return (
        later.num_prompt >= earlier.num_prompt + earlier.num_output
        and later.blocks[: len(earlier.blocks)] == earlier.blocks
    )


def check_workload(workload: Workload) -> None:
    """Raises InvalidRequestError for a workload that cannot be sent."""
    last_s = 0.0
    for index, request in enumerate(workload.requests):
        where = f"workload {workload.name!r}, request {index}"
        if request.num_prompt < 1 or request.num_output < 1:
            raise InvalidRequestError(
                f"{where}: expected at least a prompt token and an output token, got {request.num_prompt} and "
                f"{request.num_output}"
            )
        if not last_s <= request.arrival_s < float("inf"):
            raise InvalidRequestError(
                f"{where}: expected a time >= {last_s}, that of the request before, got {request.arrival_s}; sort them"
            )
        if request.follows is not None and not (0 <= request.follows < index and request.think_s >= 0):
            raise InvalidRequestError(
                f"{where}: expected follows to name an earlier request and think_s >= 0, got {request.follows} and "
                f"{request.think_s}"
            )
        if len(request.blocks) > -(-request.num_prompt // workload.block_size):
            raise InvalidRequestError(
                f"{where}: expected at most {-(-request.num_prompt // workload.block_size)} blocks of "
                f"{workload.block_size} tokens for {request.num_prompt} tokens, got {len(request.blocks)}"
            )
        last_s = request.arrival_s
