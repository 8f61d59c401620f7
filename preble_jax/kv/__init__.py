"""Pages and prefixes: page hashes, the page pool, the radix tree of cached pages, and the events that tell others.

Pure bookkeeping, no JAX, except `device.py`, which holds the arrays.
"""
