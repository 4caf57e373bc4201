"""Answers by a server of OpenAI's API over HTTP, such as `kvmesh serve`."""

from __future__ import annotations

import asyncio
import random
import secrets
import socket
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Final, Self

import aiohttp
import msgspec

from kvmesh.cluster.batch.errors import BatchRunError
from kvmesh.cluster.batch.line_request import LineRequest
from kvmesh.cluster.batch.output_file import LineResponse
from kvmesh.cluster.batch.run import error_body

# Refusals that pass: no room, a proxy without its server, a server that restarts.
PASSING: Final = (429, 502, 503)
MAX_OUTAGE_S: Final = 600.0
CONNECT_S: Final = 5.0
FIRST_PAUSE_S: Final = 0.5
MAX_PAUSE_S: Final = 15.0
# A connection on which nothing comes is probed, so that one whose other end is gone breaks: an
# answer may take long, so there is no limit to that.
IDLE_S: Final = 60
PROBE_S: Final = 10
PROBES: Final = 6
_WATCHED: Final = (
    ("TCP_KEEPIDLE", IDLE_S),
    ("TCP_KEEPINTVL", PROBE_S),
    ("TCP_KEEPCNT", PROBES),
    # What was sent and is not acknowledged has no probes.
    ("TCP_USER_TIMEOUT", (IDLE_S + PROBE_S * PROBES) * 1000),
)
_REFUSED_KEY: Final = (401, 403)


class ServedAnswers:
    """base: the server's URL, without /v1. A server that is lost, or has no room, is asked again,
    until none of the requests got an answer for MAX_OUTAGE_S after the first that failed. While it
    still has an earlier one than that which fails, it is at work, and that may take all the room.
    """

    def __init__(
        self, base: str, api_key: str | None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._base = base
        self._headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self._clock = clock
        self._outage_s: float | None = None  # when it began; None since an answer
        self._open: dict[str, float] = {}  # by id, when the server was asked what it still has
        self.pause_s = FIRST_PAUSE_S

    async def __aenter__(self) -> Self:
        # Without a limit of time: a long output takes as long as it takes.
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S)
        connector = aiohttp.TCPConnector(limit=0, socket_factory=_watched_socket)
        self._session = aiohttp.ClientSession(timeout=timeout, connector=connector)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._session.close()

    async def models(self) -> list[str]:
        """What the server serves. Raises BatchRunError if it is no such server."""
        url = f"{self._base}/v1/models"
        try:
            async with self._session.get(url, headers=self._headers) as reply:
                data, status = await reply.read(), reply.status
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise self._unreachable(error) from None
        if status in _REFUSED_KEY:
            raise BatchRunError(f"{self._base} refuses the key: {_message(data)}")
        try:
            models: Any = msgspec.json.decode(data)["data"]
            names = [str(model["id"]) for model in models]
        except (msgspec.DecodeError, UnicodeDecodeError, KeyError, TypeError):
            names = []
        if not names:
            raise self._unreachable(f"GET {url} has status {status} and no models")
        return names

    async def answer(self, request: LineRequest) -> LineResponse:
        pause_s = self.pause_s
        while True:
            wait_s, asked_s = 0.0, self._clock()
            # Another id for each attempt: a server may still be ending the one before.
            request_id = attempt = secrets.token_hex(16)
            self._open[attempt] = asked_s
            try:
                async with self._session.post(
                    self._base + request.url,
                    data=request.body,
                    headers={
                        **self._headers,
                        "content-type": "application/json",
                        "x-request-id": request_id,
                    },
                ) as reply:
                    data = await reply.read()
            except (aiohttp.ClientError, OSError, TimeoutError) as error:
                trouble: BatchRunError = self._unreachable(error)
            else:
                if reply.status in _REFUSED_KEY:
                    raise BatchRunError(f"{self._base} refuses the key: {_message(data)}")
                lasting = reply.headers.get("x-should-retry") == "false"
                if reply.status not in PASSING or lasting:
                    self._outage_s = None
                    request_id = reply.headers.get("x-request-id", request_id)
                    return LineResponse(reply.status, request_id, _json(data))
                trouble = self._refusing(_message(data))
                wait_s = _seconds(reply.headers.get("retry-after"))
            finally:
                del self._open[attempt]
            now_s = self._clock()
            # The server was at work on a request that took that long to fail.
            if self._outage_s is None or now_s - asked_s > MAX_OUTAGE_S:
                self._outage_s = now_s
            at_work = min(self._open.values(), default=asked_s) < asked_s
            if now_s - self._outage_s > MAX_OUTAGE_S and not at_work:
                raise trouble
            await asyncio.sleep(wait_s + random.uniform(0, pause_s))
            pause_s = min(pause_s * 2, MAX_PAUSE_S)

    def _refusing(self, why: str) -> BatchRunError:
        return BatchRunError(
            f"{self._base} refused all requests for {MAX_OUTAGE_S / 60:.0f} minutes ({why}); "
            "the same command continues later",
            unreachable=True,
        )

    def _unreachable(self, why: object) -> BatchRunError:
        return BatchRunError(
            f"{self._base} does not answer as OpenAI's API ({why}); `kvmesh serve` prints the "
            "address of its own",
            unreachable=True,
        )


def _watched_socket(address: aiohttp.AddrInfoType) -> socket.socket:
    """One that fails when its peer is gone, even if that said nothing."""
    family, kind, protocol, *_ = address
    made = socket.socket(family, kind, protocol)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _WATCHED:
        if (option := getattr(socket, name, None)) is not None:  # not on every system
            made.setsockopt(socket.IPPROTO_TCP, option, value)
    return made


def base_url(address: str) -> str:
    """A server's URL from HOST:PORT, or from a URL, perhaps with /v1 at its end."""
    url = address if "://" in address else f"http://{address}"
    return url.rstrip("/").removesuffix("/v1")


def _json(data: bytes) -> msgspec.Raw:
    """A body in one line, as some servers do not write it, or an error if it is not JSON."""
    try:
        data.decode()
        return msgspec.Raw(msgspec.json.format(data, indent=-1))
    except (msgspec.DecodeError, UnicodeDecodeError):
        body: msgspec.Raw = error_body(data[:500].decode(errors="replace"))
        return body


def _message(data: bytes) -> str:
    try:
        return str(msgspec.json.decode(data)["error"]["message"])
    except (msgspec.DecodeError, UnicodeDecodeError, KeyError, TypeError):
        return data[:200].decode(errors="replace")


def _seconds(text: str | None) -> float:
    try:
        seconds = float(text or 0)
    except ValueError:  # a date
        return 0.0
    return min(seconds, MAX_PAUSE_S) if seconds > 0 else 0.0  # not a number: none
