"""Block hashes: the identity of a full page of tokens *and of everything before it*.

Chained and keyed, so that two equal hashes mean equal prefixes under the same model, adapter and tenant salt. A
collision would let one tenant read another's cache, hence a cryptographic hash (blake2b, 128 bits).
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from hashlib import blake2b

HASH_BYTES = 16
_KEY_BYTES = 32


def cache_salt(model: str, tenant_salt: bytes = b"", adapter: str = "") -> bytes:
    """The key under which a request's pages are hashed (32 bytes). Different arguments never share pages."""
    digest = blake2b(digest_size=_KEY_BYTES)
    for part in (model.encode(), adapter.encode(), tenant_salt):
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.digest()


class BlockHasher:
    """Hashes a growing token sequence page by page; each full page is hashed once.

    known: hashes of its first pages, as many as somebody has worked out, be it that their tokens are still to come.
    """

    def __init__(self, page_size: int, salt: bytes = b"", known: Iterable[bytes] = ()) -> None:
        self._page_size = page_size
        self._salt = salt if len(salt) <= blake2b.MAX_KEY_SIZE else blake2b(salt, digest_size=_KEY_BYTES).digest()
        self._known = tuple(known)
        self.hashes: list[bytes] = []

    def extend(self, token_ids: Sequence[int]) -> list[bytes]:
        """`token_ids` is the whole sequence so far. Returns the hashes of its full pages, `self.hashes`."""
        size, hashes = self._page_size, self.hashes
        num_full = len(token_ids) // size
        if num_full <= len(hashes):
            return hashes
        hashes += self._known[len(hashes) : num_full]
        parent = hashes[-1] if hashes else b""
        for start in range(len(hashes) * size, num_full * size, size):
            page = array("i", list(token_ids[start : start + size])).tobytes()
            parent = blake2b(parent + page, digest_size=HASH_BYTES, key=self._salt).digest()
            hashes.append(parent)
        return hashes


def block_hashes(token_ids: Sequence[int], page_size: int, salt: bytes = b"") -> list[bytes]:
    """Hashes of the full pages of `token_ids`: `len(token_ids) // page_size` of them, 16 bytes each."""
    return BlockHasher(page_size, salt).extend(token_ids)
