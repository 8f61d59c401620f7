"""What names a prompt's beginning for the policies that route by it."""

from __future__ import annotations

from preble_jax.sched.messages import PlaceRequest


def prefix_key(request: PlaceRequest, num_blocks: int) -> bytes | None:
    """Equal for prompts whose first `num_blocks` pages are equal; of a shorter prompt, the key of all its full pages.
    None for a prompt below one page, which shares nothing. One chained hash covers all pages before it."""
    hashes = request.block_hashes
    return hashes[min(num_blocks, len(hashes)) - 1] if hashes else None
