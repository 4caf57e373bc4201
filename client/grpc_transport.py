"""The transports over gRPC."""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self, TypeAlias

import grpc
import grpc.aio

from kvmesh.client.checks import Metadata
from kvmesh.client.credentials import is_local
from kvmesh.client.errors import ClosedError, InvalidRequestError, UsageError
from kvmesh.client.options import TLS
from kvmesh.client.transport import GENERATE_STREAM, Method, Reply, Request, RpcFailure
from kvmesh.protos import pb

Channel: TypeAlias = grpc.Channel
AsyncChannel: TypeAlias = grpc.aio.Channel
Interceptor: TypeAlias = grpc.UnaryUnaryClientInterceptor | grpc.UnaryStreamClientInterceptor
AsyncInterceptor: TypeAlias = grpc.aio.ClientInterceptor

_CHANNEL_OPTIONS: tuple[tuple[str, int | str], ...] = (
    # Only the server limits sizes: a million-token prompt takes about 4 MB.
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    # Retries are made by `failures.RetryState`, which knows what is safe to retry.
    ("grpc.enable_retries", 0),
    # Pings are for unary calls, whose server is silent until the reply. gRPC servers, Serve's
    # among them, end a connection at more than one ping in 5 minutes without data, and say
    # "Too many pings". A stream's server is never silent: see `silence_timeout_s`.
    ("grpc.keepalive_time_ms", 360_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.http2.max_pings_without_data", 0),  # no limit; by default 2, then one in a while
    # Long enough for a server to restart, short enough to reconnect quickly.
    ("grpc.max_reconnect_backoff_ms", 2_000),
    ("grpc.initial_reconnect_backoff_ms", 100),
    # In spite of its name, how long an attempt to connect may take: TCP, TLS and the first frames
    # of HTTP/2 are several round trips, and a busy server is slow to answer.
    ("grpc.min_reconnect_backoff_ms", 5_000),
)


class GrpcStreamCall:
    """silence_timeout_s: a read that waits for longer ends the call as lost; None: no limit"""

    def __init__(self, call: Any, silence_timeout_s: float | None) -> None:
        self._call = call
        self._silence_timeout_s = silence_timeout_s
        self._waiting_since: float | None = None  # while a read waits
        self._silent = False
        # Its `put` takes no lock that a thread could have when garbage collection cancels the call.
        self._ended: queue.SimpleQueue[None] = queue.SimpleQueue()
        if silence_timeout_s is not None:
            self._watch(silence_timeout_s)

    def read(self) -> pb.GenerateStreamResponse | None:
        self._waiting_since = time.monotonic()
        try:
            event: pb.GenerateStreamResponse = next(self._call)
        except StopIteration:
            self._ended.put(None)
            return None
        except grpc.RpcError as error:
            self._ended.put(None)
            raise (_lost(self._silence_timeout_s) if self._silent else _failure(error)) from None
        self._waiting_since = None
        return event

    def cancel(self) -> None:
        self._ended.put(None)
        self._call.cancel()

    def _watch(self, limit_s: float) -> None:
        """Start to watch, until the call has ended."""
        threading.Thread(
            target=self._wait_for_silence,
            args=(limit_s, self._ended),
            name="kvmesh-silence",
            daemon=True,
        ).start()

    def _wait_for_silence(self, limit_s: float, ended: queue.SimpleQueue[None]) -> None:
        """It looks when the last event came, however many arrive while it waits."""
        remaining_s = limit_s
        while remaining_s > 0:
            with contextlib.suppress(queue.Empty):
                ended.get(timeout=remaining_s)
                return
            since, now = self._waiting_since, time.monotonic()
            remaining_s = limit_s - (0.0 if since is None else now - since)
        self._silent = True
        self._call.cancel()


class GrpcTransport:
    """Blocking calls over one channel; safe to use from several threads.

    channel: closed with the transport
    silence_timeout_s: a stream that is silent for longer is lost; None: no limit
    """

    def __init__(self, channel: Channel, silence_timeout_s: float | None = None) -> None:
        self._silence_timeout_s = silence_timeout_s
        self._channel = channel
        self._process = os.getpid()
        self._closed = False

    @classmethod
    def connect(
        cls,
        target: str,
        tls: TLS | None,
        interceptors: Sequence[Interceptor] = (),
        silence_timeout_s: float | None = None,
    ) -> Self:
        options = _options(target, tls)
        channel = (
            grpc.insecure_channel(target, options)
            if tls is None
            else grpc.secure_channel(target, _credentials(tls), options)
        )
        return cls(grpc.intercept_channel(channel, *interceptors), silence_timeout_s)

    def unary(
        self,
        method: Method[Request, Reply],
        request: Request,
        timeout_s: float | None,
        metadata: Metadata,
    ) -> Reply:
        self._check_usable()
        call = self._channel.unary_unary(
            method.path,
            request_serializer=method.request_type.SerializeToString,
            response_deserializer=method.reply_type.FromString,
        )
        try:
            reply: Reply = call(request, timeout=timeout_s, metadata=metadata)
        except grpc.RpcError as error:
            raise _failure(error) from None
        return reply

    def stream(
        self, request: pb.GenerateRequest, timeout_s: float | None, metadata: Metadata
    ) -> GrpcStreamCall:
        self._check_usable()
        call = self._channel.unary_stream(
            GENERATE_STREAM.path,
            request_serializer=GENERATE_STREAM.request_type.SerializeToString,
            response_deserializer=GENERATE_STREAM.reply_type.FromString,
        )
        return GrpcStreamCall(
            call(request, timeout=timeout_s, metadata=metadata), self._silence_timeout_s
        )

    def now(self) -> float:
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def close(self) -> None:
        self._closed = True
        if os.getpid() == self._process:
            self._channel.close()

    def _check_usable(self) -> None:
        if self._closed:
            raise ClosedError("the client has been closed")
        check_process(self._process)


class AsyncGrpcStreamCall:
    """silence_timeout_s: a read that waits for longer ends the call as lost; None: no limit"""

    def __init__(self, call: Any, silence_timeout_s: float | None) -> None:
        self._call = call
        self._silence_timeout_s = silence_timeout_s
        self._loop = asyncio.get_running_loop()

    async def read(self) -> pb.GenerateStreamResponse | None:
        try:
            async with asyncio.timeout(self._silence_timeout_s):
                event: Any = await self._call.read()
        except TimeoutError:
            raise _lost(self._silence_timeout_s) from None
        except grpc.RpcError as error:
            raise _failure(error) from None
        except asyncio.CancelledError:
            raise_if_cancelling()
            raise RpcFailure("CANCELLED", "the server cancelled the call") from None
        if event is grpc.aio.EOF:
            return None
        response: pb.GenerateStreamResponse = event
        return response

    def cancel(self) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed, and its calls with it
            self._loop.call_soon_threadsafe(self._call.cancel)


class AsyncGrpcTransport:
    """Calls over one channel, which belongs to the event loop of the first call.

    channel: closed with the transport. If it is a function, the first call makes the channel,
        since that needs a running loop
    silence_timeout_s: a stream that is silent for longer is lost; None: no limit
    """

    def __init__(
        self,
        channel: AsyncChannel | Callable[[], AsyncChannel],
        silence_timeout_s: float | None = None,
    ) -> None:
        self._silence_timeout_s = silence_timeout_s
        self._make_channel = channel if callable(channel) else lambda: channel
        self._channel: AsyncChannel | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._process = os.getpid()
        self._closed = False

    @classmethod
    def connect(
        cls,
        target: str,
        tls: TLS | None,
        interceptors: Sequence[AsyncInterceptor] = (),
        silence_timeout_s: float | None = None,
    ) -> Self:
        options = _options(target, tls)
        if tls is None:
            return cls(
                lambda: grpc.aio.insecure_channel(target, options, interceptors=interceptors),
                silence_timeout_s,
            )
        credentials = _credentials(tls)
        return cls(
            lambda: grpc.aio.secure_channel(
                target, credentials, options, interceptors=interceptors
            ),
            silence_timeout_s,
        )

    async def unary(
        self,
        method: Method[Request, Reply],
        request: Request,
        timeout_s: float | None,
        metadata: Metadata,
    ) -> Reply:
        call = self._open_channel().unary_unary(
            method.path,
            request_serializer=method.request_type.SerializeToString,
            response_deserializer=method.reply_type.FromString,
        )
        try:
            reply: Reply = await call(request, timeout=timeout_s, metadata=metadata)
        except grpc.RpcError as error:
            raise _failure(error) from None
        except asyncio.CancelledError:
            raise_if_cancelling()
            raise RpcFailure("CANCELLED", "the server cancelled the call") from None
        return reply

    def stream(
        self, request: pb.GenerateRequest, timeout_s: float | None, metadata: Metadata
    ) -> AsyncGrpcStreamCall:
        call = self._open_channel().unary_stream(
            GENERATE_STREAM.path,
            request_serializer=GENERATE_STREAM.request_type.SerializeToString,
            response_deserializer=GENERATE_STREAM.reply_type.FromString,
        )
        return AsyncGrpcStreamCall(
            call(request, timeout=timeout_s, metadata=metadata), self._silence_timeout_s
        )

    def now(self) -> float:
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    async def close(self) -> None:
        self._closed = True
        if self._channel is not None and os.getpid() == self._process:
            self._check_loop()
            await self._channel.close()

    def _open_channel(self) -> AsyncChannel:
        if self._closed:
            raise ClosedError("the client has been closed")
        check_process(self._process)
        if self._channel is None:
            self._loop = asyncio.get_running_loop()
            self._channel = self._make_channel()
        self._check_loop()
        return self._channel

    def _check_loop(self) -> None:
        if asyncio.get_running_loop() is not self._loop:
            raise UsageError(
                "this AsyncClient belongs to the event loop in which it was first used; "
                "make another one in this loop"
            )


def check_process(process: int) -> None:
    """Raise UsageError in any other process: gRPC's connections do not survive a fork."""
    if os.getpid() != process:
        raise UsageError(
            f"this client was made before process {os.getpid()} was forked; make another one in it"
        )


def raise_if_cancelling() -> None:
    """Re-raise the current CancelledError if this task is the one being cancelled.

    grpc.aio raises the same error for a call that the server cancelled.
    """
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise


def _failure(error: grpc.RpcError) -> RpcFailure:
    # What grpc raises is an RpcError that is also a Call (or AioRpcError); its
    # type annotations do not say so.
    call: Any = error
    return RpcFailure(
        call.code().name,
        call.details() or "",
        tuple((name, value) for name, value in call.trailing_metadata() or ()),
    )


def _lost(silence_timeout_s: float | None) -> RpcFailure:
    return RpcFailure("UNAVAILABLE", f"the server has sent nothing for {silence_timeout_s:g} s")


def _options(target: str, tls: TLS | None) -> list[tuple[str, int | str]]:
    options = list(_CHANNEL_OPTIONS)
    if is_local(target):
        # gRPC would use the proxy of $http_proxy even for this machine, and the proxy's host is
        # another: it does not reach the server, and would see the key.
        options.append(("grpc.enable_http_proxy", 0))
    if tls is not None and tls.server_name is not None:
        options.append(("grpc.ssl_target_name_override", tls.server_name))
    return options


def _credentials(tls: TLS) -> grpc.ChannelCredentials:
    return grpc.ssl_channel_credentials(
        root_certificates=_pem(tls.root_ca, "root_ca"),
        private_key=_pem(tls.client_key, "client_key"),
        certificate_chain=_pem(tls.client_cert, "client_cert"),
    )


def _pem(source: bytes | str | Path | None, name: str) -> bytes | None:
    if source is None or isinstance(source, bytes):
        return source
    try:
        return Path(source).read_bytes()
    except OSError as error:
        raise InvalidRequestError.of(
            f"tls.{name}", f"cannot read {source}: {error.strerror}"
        ) from error
