"""Connections between the processes of the control plane: typed messages, in order.

    connect(address) ── TLS, both ends authenticated ──► Listener
    length (4 bytes) | msgpack | length | msgpack | …     both ways, in order, once

`send` only queues, so it is safe in a `finally`. Everything that has arrived is handed to the
handler before any other task runs. A closed connection, for whatever reason, means that the
peer is gone: nothing is sent again. Both ends send a beat every second, an empty message; a peer
that is silent hangs, or its host has vanished, and its connection is closed.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import struct
from collections.abc import Awaitable, Callable
from typing import Any, Protocol, cast

import msgspec

from kvmesh.cluster.identity import Identity

logger = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 5.0
RECONNECT_S = 0.1
MAX_FRAME_BYTES = 256 << 20  # above prompts of tens of millions of tokens
# What may be on its way to a peer, so that it cannot exhaust our memory: some of the largest
# messages at once. A peer that lives reads them all; one that hangs is known by its silence.
MAX_UNSENT_BYTES = 4 * MAX_FRAME_BYTES
BEAT_S = 1.0
MAX_SILENT_BEATS = 5
_LENGTH = struct.Struct(">I")
_BEAT = _LENGTH.pack(0)
_encoder = msgspec.msgpack.Encoder()


class Address(msgspec.Struct, frozen=True):
    """Where a process listens."""

    host: str
    port: int


class LinkError(Exception):
    """No connection could be made."""


class Handler(Protocol):
    """Receives one end's messages. Neither method may block."""

    def received(self, message: Any) -> None: ...

    def lost(self) -> None:
        """The connection is closed and no more messages will come. Called once."""


class Link(asyncio.Protocol):
    """One end of a connection.

    messages: the union of message types that the peer may send
    """

    def __init__(self, messages: Any, handle: Callable[[Link], Handler]) -> None:
        self._decoder = msgspec.msgpack.Decoder(messages)
        self._handle = handle
        self._handler: Handler | None = None
        self._transport: asyncio.Transport | None = None
        self._received = bytearray()
        self._unsent: list[bytes] = []
        self._beats: asyncio.TimerHandle | None = None
        self._silent_beats = 0
        self._gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @property
    def closed(self) -> bool:
        return self._gone.done()

    async def wait_closed(self) -> None:
        await asyncio.shield(self._gone)

    def send(self, message: msgspec.Struct) -> None:
        """Queue a message. On a closed connection this does nothing."""
        if self.closed:
            return
        if not self._unsent:
            # All messages of one turn of the event loop leave in one write.
            asyncio.get_running_loop().call_soon(self._flush)
        body = _encoder.encode(message)
        self._unsent += (_LENGTH.pack(len(body)), body)

    def close(self) -> None:
        """Close without waiting; queued messages are still sent."""
        if self._transport is not None and not self.closed:
            self._flush()
            self._transport.close()

    def abort(self) -> None:
        """Close at once, without sending what is queued."""
        if self._transport is not None:
            self._transport.abort()

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        sock: socket.socket = transport.get_extra_info("socket")
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._handler = self._handle(self)
        self._beats = asyncio.get_running_loop().call_later(BEAT_S, self.beat)

    def data_received(self, data: bytes) -> None:
        self._silent_beats = 0
        self._received += data
        try:
            for message in self._messages():
                assert self._handler is not None
                self._handler.received(message)
        except Exception:
            logger.exception("cannot handle a message; closing its connection")
            self.abort()

    def connection_lost(self, error: Exception | None) -> None:
        self._gone.set_result(None)
        self._unsent.clear()
        if self._beats is not None:
            self._beats.cancel()
        if self._handler is not None:
            self._handler.lost()

    def _messages(self) -> list[Any]:
        """Takes all complete messages out of the buffer."""
        buffer, messages, start = self._received, [], 0
        while len(buffer) - start >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(buffer, start)
            if length > MAX_FRAME_BYTES:
                raise ValueError(
                    f"a message must have at most {MAX_FRAME_BYTES} bytes, got {length}"
                )
            end = start + _LENGTH.size + length
            if end > len(buffer):
                break
            if length:
                with memoryview(buffer) as view:
                    messages.append(self._decoder.decode(view[start + _LENGTH.size : end]))
            start = end
        del buffer[:start]
        return messages

    def beat(self) -> None:
        """Send a beat, or close the connection if the peer has been silent for too many.

        Our own beats are counted, not the clock: after this process has hung, it reads what has
        arrived meanwhile before it can blame the peer.
        """
        assert self._transport is not None
        if self._silent_beats == MAX_SILENT_BEATS:
            logger.warning("a peer has been silent for %g s", BEAT_S * MAX_SILENT_BEATS)
            self.abort()
            return
        self._silent_beats += 1
        if not self._transport.is_closing():
            self._transport.write(_BEAT)
        self._beats = asyncio.get_running_loop().call_later(BEAT_S, self.beat)

    def _flush(self) -> None:
        if self.closed or not self._unsent:
            return
        assert self._transport is not None
        data, self._unsent = b"".join(self._unsent), []
        self._transport.write(data)
        if self._transport.get_write_buffer_size() > MAX_UNSENT_BYTES:
            logger.error("a peer does not keep up; closing its connection")
            self.abort()


class Listener:
    """Accepts connections until closed."""

    def __init__(self, server: asyncio.Server, address: Address) -> None:
        self._server = server
        self.address = address

    def close(self) -> None:
        """Accept no new connections; open ones stay."""
        self._server.close()


async def listen(
    host: str, identity: Identity, messages: Any, handle: Callable[[Link], Handler]
) -> Listener:
    """Listen on a free port.

    messages: the union of message types that peers may send
    handle: called with each new connection; returns the handler of its messages
    """
    server = await asyncio.get_running_loop().create_server(
        lambda: Link(messages, handle), host, 0, ssl=identity.server_context()
    )
    port: int = server.sockets[0].getsockname()[1]
    return Listener(server, Address(host, port))


async def connect(
    address: Address, identity: Identity, messages: Any, handle: Callable[[Link], Handler]
) -> Link:
    """Connect to a listener; raises LinkError."""
    failure = f"cannot connect to {address.host}:{address.port}"
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            _, connection = await asyncio.get_running_loop().create_connection(
                lambda: Link(messages, handle),
                address.host,
                address.port,
                ssl=identity.client_context(),
            )
    except TimeoutError:
        raise LinkError(f"{failure}: no answer within {CONNECT_TIMEOUT_S:g} s") from None
    except OSError as error:
        raise LinkError(f"{failure}: {error}") from error
    return connection


async def stay_connected(
    find: Callable[[], Awaitable[Address]],
    identity: Identity,
    messages: Any,
    handle: Callable[[Link], Handler],
) -> None:
    """Connect, and connect again whenever the connection is lost; runs until cancelled.

    find: where the peer is now; raises LinkError while it is not known
    """
    failed = False
    while True:
        try:
            connection = await connect(await find(), identity, messages, handle)
        except LinkError as error:
            if not failed:  # log the first failure only
                logger.warning("%s; trying again", error)
            failed = True
        else:
            failed = False
            try:
                await connection.wait_closed()
            finally:
                connection.close()
        await asyncio.sleep(RECONNECT_S)
