"""Connections in a cluster: order, size, authentication, invalid data, peers that hang or die."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec
import pytest

from kvmesh.cluster import link
from kvmesh.cluster.identity import Identity
from kvmesh.cluster.link import Address, Link, LinkError, Listener, connect, listen

IDENTITY = Identity.make()


@pytest.fixture(autouse=True)
def beats_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """However slow the machine, only a test's own beats count."""
    monkeypatch.setattr(link, "BEAT_S", 1000.0)


class Number(msgspec.Struct, frozen=True, tag=True):
    value: int


class Blob(msgspec.Struct, frozen=True, tag=True):
    data: bytes


MESSAGES = Number | Blob


class Collector:
    """Collects messages; raises at the number `fail_at`."""

    def __init__(self, connection: Link, fail_at: int | None = None) -> None:
        self.connection = connection
        self.losses = 0
        self._fail_at = fail_at
        self._messages: asyncio.Queue[Number | Blob | None] = asyncio.Queue()

    def received(self, message: Number | Blob) -> None:
        if isinstance(message, Number) and message.value == self._fail_at:
            raise RuntimeError("failed on purpose")
        self._messages.put_nowait(message)

    def lost(self) -> None:
        self.losses += 1
        self._messages.put_nowait(None)

    async def next(self) -> Number | Blob | None:
        """The next message, or None when the connection is lost."""
        return await asyncio.wait_for(self._messages.get(), 60)


class Server:
    def __init__(self, fail_at: int | None = None) -> None:
        self.collectors: list[Collector] = []
        self._fail_at = fail_at

    def accept(self, connection: Link) -> Collector:
        self.collectors.append(Collector(connection, self._fail_at))
        return self.collectors[-1]

    async def collector(self, index: int = 0) -> Collector:
        async with asyncio.timeout(60):
            while len(self.collectors) <= index:
                await asyncio.sleep(0)
        return self.collectors[index]


@asynccontextmanager
async def listening(fail_at: int | None = None) -> AsyncIterator[tuple[Server, Listener]]:
    server = Server(fail_at)
    listener = await listen("127.0.0.1", IDENTITY, MESSAGES, server.accept)
    try:
        yield server, listener
    finally:
        listener.close()
        for collector in server.collectors:
            collector.connection.abort()


async def dial(address: Address, identity: Identity = IDENTITY) -> Collector:
    collectors: list[Collector] = []

    def handle(connection: Link) -> Collector:
        collectors.append(Collector(connection))
        return collectors[0]

    await connect(address, identity, MESSAGES, handle)
    return collectors[0]


async def test_messages_arrive_in_order_both_ways() -> None:
    async with listening() as (server, listener):
        near = await dial(listener.address)
        far = await server.collector()
        for value in range(1000):
            near.connection.send(Number(value))
            far.connection.send(Number(-value))
        for value in range(1000):
            assert await far.next() == Number(value)
            assert await near.next() == Number(-value)


async def test_large_messages_arrive_between_small_ones() -> None:
    async with listening() as (server, listener):
        near = await dial(listener.address)
        large = bytes(range(256)) * (1 << 16)
        for message in (Number(1), Blob(large), Number(2)):
            near.connection.send(message)
        far = await server.collector()
        assert [await far.next() for _ in range(3)] == [Number(1), Blob(large), Number(2)]


async def test_closing_notifies_both_ends_once_and_sends_queued_messages() -> None:
    async with listening() as (server, listener):
        near = await dial(listener.address)
        near.connection.send(Number(7))
        near.connection.close()
        far = await server.collector()
        assert await far.next() == Number(7)
        assert await far.next() is None
        assert await near.next() is None
        near.connection.send(Number(8))  # dropped without an error
        assert (near.losses, far.losses) == (1, 1)
        for end in (near, far):
            assert end.connection.closed
            assert end.connection._beats is not None
            assert end.connection._beats.cancelled(), "nothing is left of it"


async def test_a_peer_without_the_certificate_is_refused() -> None:
    async with listening() as (server, listener):
        with pytest.raises(LinkError):
            await dial(listener.address, Identity.make())
        # Peers that do not check the listener, with another certificate and with none.
        own = Identity.make().client_context()
        none = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        none.check_hostname = False
        for context in (own, none):
            context.verify_mode = ssl.CERT_NONE
            with contextlib.suppress(OSError):
                reader, writer = await asyncio.open_connection(
                    listener.address.host, listener.address.port, ssl=context
                )
                body = msgspec.msgpack.encode(Number(1))
                writer.write(struct.pack(">I", len(body)) + body)
                assert await asyncio.wait_for(reader.read(), 60) == b""
                writer.close()
        near = await dial(listener.address)
        near.connection.send(Number(2))
        assert await (await server.collector()).next() == Number(2)
        assert len(server.collectors) == 1, "an unauthenticated peer has reached a handler"


async def test_plain_bytes_on_the_port_do_not_affect_other_connections() -> None:
    async with listening() as (server, listener):
        near = await dial(listener.address)
        _, writer = await asyncio.open_connection(listener.address.host, listener.address.port)
        writer.write(b"GET / HTTP/1.1\r\n\r\n" * 100)
        near.connection.send(Number(1))
        assert await (await server.collector()).next() == Number(1)
        writer.close()


@pytest.mark.parametrize("data", [b"\xff\xff\xff\xff", b"\x00\x00\x00\x03abc"])
async def test_invalid_data_ends_only_its_own_connection(data: bytes) -> None:
    async with listening() as (server, listener):
        good, bad = await dial(listener.address), await dial(listener.address)
        assert bad.connection._transport is not None
        bad.connection._transport.write(data)
        assert await bad.next() is None
        good.connection.send(Number(1))
        assert await (await server.collector(0)).next() == Number(1)


async def test_a_handler_that_fails_ends_only_its_own_connection() -> None:
    async with listening(fail_at=13) as (server, listener):
        good, bad = await dial(listener.address), await dial(listener.address)
        bad.connection.send(Number(13))
        assert await bad.next() is None
        good.connection.send(Number(1))
        assert await (await server.collector(0)).next() == Number(1)


async def test_a_peer_that_does_not_read_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link, "MAX_UNSENT_BYTES", 1 << 20)
    async with listening() as (server, listener):
        near = await dial(listener.address)
        far = await server.collector()
        assert far.connection._transport is not None
        far.connection._transport.pause_reading()
        while not near.connection.closed:
            near.connection.send(Blob(bytes(1 << 20)))
            await asyncio.sleep(0)
        assert await near.next() is None


class FullTransport(asyncio.Transport):
    """Keeps all that is written, each time as much as one of the largest messages."""

    def __init__(self) -> None:
        super().__init__()
        self.writes = 0
        self.aborted = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.writes += 1

    def get_write_buffer_size(self) -> int:
        return self.writes * link.MAX_FRAME_BYTES

    def abort(self) -> None:
        self.aborted = True


async def test_some_of_the_largest_messages_may_be_on_their_way() -> None:
    near = Link(MESSAGES, Collector)
    near._transport = transport = FullTransport()
    for _ in range(4):
        near.send(Number(1))
        await asyncio.sleep(0)
        assert not transport.aborted
    near.send(Number(1))
    await asyncio.sleep(0)
    assert (transport.writes, transport.aborted) == (5, True)


def hang(connection: Link) -> None:
    """Stop its beats, as if its process were stopped."""
    assert connection._beats is not None
    connection._beats.cancel()


async def test_a_silent_peer_is_cut_off() -> None:
    async with listening() as (server, listener):
        near = await dial(listener.address)
        far = await server.collector()
        hang(far.connection)
        for _ in range(link.MAX_SILENT_BEATS):
            near.connection.beat()
            assert not near.connection.closed
        near.connection.beat()
        assert await near.next() is None
        assert await far.next() is None


@pytest.mark.parametrize("life", ["a beat", "a message", "a part of a message"])
async def test_any_sign_of_life_keeps_the_connection(life: str) -> None:
    async with listening() as (server, listener):
        near = await dial(listener.address)
        far = await server.collector()
        hang(far.connection)
        for _ in range(3):
            for _ in range(link.MAX_SILENT_BEATS):
                near.connection.beat()
            if life == "a beat":
                far.connection.beat()
                hang(far.connection)
                async with asyncio.timeout(60):
                    while near.connection._silent_beats:
                        await asyncio.sleep(0)
            elif life == "a message":
                far.connection.send(Number(1))
                assert await near.next() == Number(1)
            else:  # one that takes its time
                near.connection.data_received(b"\0")
        near.connection.beat()
        for _ in range(9):
            await asyncio.sleep(0)
        assert not near.connection.closed
        assert far.losses == 0


async def test_beats_are_not_messages() -> None:
    async with listening() as (server, listener):
        near = await dial(listener.address)
        far = await server.collector()
        near.connection.beat()
        near.connection.send(Number(1))
        near.connection.beat()
        near.connection.send(Number(2))
        assert [await far.next(), await far.next()] == [Number(1), Number(2)]


async def test_a_lost_connection_is_replaced(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(link, "RECONNECT_S", 0.0)
    async with listening() as (server, listener):
        asked = 0

        async def find() -> Address:
            nonlocal asked
            asked += 1
            if asked in (2, 3, 5, 6):
                raise LinkError(f"not known at {asked}")
            return listener.address

        collectors: list[Collector] = []

        def handle(connection: Link) -> Collector:
            collectors.append(Collector(connection))
            connection.send(Number(len(collectors)))
            return collectors[-1]

        task = asyncio.create_task(link.stay_connected(find, IDENTITY, MESSAGES, handle))
        assert await (await server.collector(0)).next() == Number(1)
        for number, after in ((1, 4), (2, 7)):
            server.collectors[number - 1].connection.abort()
            assert await (await server.collector(number)).next() == Number(number + 1)
            assert asked == after
        task.cancel()
        assert await server.collectors[2].next() is None
    logged = [record.message for record in caplog.records if "trying again" in record.message]
    assert logged == [f"not known at {first}; trying again" for first in (2, 5)], "once each time"
