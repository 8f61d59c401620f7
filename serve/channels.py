"""A frontend's channels to the workers, one an address; those of workers that are gone are closed."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager

import grpc

from serve.transport import open_channel


class Channels:
    """known: the addresses whose channels are kept though nobody uses them."""

    def __init__(self, known: Callable[[], Collection[str]]) -> None:
        self._known = known
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._num_users: Counter[str] = Counter()

    async def close(self) -> None:
        for channel in self._channels.values():
            await channel.close()

    @asynccontextmanager
    async def use(self, address: str) -> AsyncIterator[grpc.aio.Channel]:
        """address: host:port. The channel stays open inside."""
        self._num_users[address] += 1
        try:
            if address not in self._channels:
                self._channels[address] = open_channel(address)
                await self._close_unused()
            yield self._channels[address]
        finally:
            self._num_users[address] -= 1
            if not self._num_users[address]:
                del self._num_users[address]

    async def _close_unused(self) -> None:
        """A worker that starts again often has another address."""
        gone = self._channels.keys() - self._num_users.keys() - set(self._known())
        for channel in [self._channels.pop(address) for address in gone]:
            await channel.close()
