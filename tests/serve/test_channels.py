"""A frontend's channels: one an address, and none for ever."""

from __future__ import annotations

import pytest

from serve import channels as channels_module
from serve.channels import Channels


class FakeChannel:
    def __init__(self, address: str) -> None:
        self.address = address
        self.closed = False

    async def close(self) -> None:
        assert not self.closed
        self.closed = True


async def test_channels_of_workers_that_are_gone_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[FakeChannel] = []

    def open_channel(address: str) -> FakeChannel:
        opened.append(FakeChannel(address))
        return opened[-1]

    def is_open() -> list[str]:
        return [channel.address for channel in opened if not channel.closed]

    monkeypatch.setattr(channels_module, "open_channel", open_channel)
    known = {"kept", "short"}
    channels = Channels(lambda: known)
    async with channels.use("kept") as kept, channels.use("busy"), channels.use("busy"):
        pass
    async with channels.use("busy"):
        async with channels.use("short"):
            known.remove("short")
            async with channels.use("new"):
                assert is_open() == ["kept", "busy", "short", "new"], "those that somebody uses stay"
        async with channels.use("newer"):
            assert is_open() == ["kept", "busy", "newer"]
    async with channels.use("kept") as again:
        assert again is kept
    for i in range(50):
        async with channels.use(f"127.0.0.1:{i}"):
            pass
    assert is_open() == ["kept", "127.0.0.1:49"]
    await channels.close()
    assert is_open() == []
