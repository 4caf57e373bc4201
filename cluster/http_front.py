"""OpenAI's HTTP API on the server that Ray Serve runs in an ingress replica.

    a browser's question ──► answered, without a key
    headers ── unknown caller, too many calls, too large ──► error, and the body is never read
        │
        └── wait for a turn ──► read the body ──► openai/app.py ──► reply, or a stream
                                                       │
                         the client leaves ──► cancel ─┘

Serve reaches the application through its ingress (`serve.ingress`), which reads a whole body into
memory before anyone can look at its key. So a middleware in front of Serve (`middlewares`) takes
the calls of this process's application as soon as their headers are there. Calls that come by
another way, such as through Serve's proxy while no replica is up, are served all the same.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from contextlib import ExitStack
from typing import Any

from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Route

from kvmesh.cluster.ingress.refuse import refuse
from kvmesh.cluster.ingress.validate import MAX_ID_CHARS, Limits, check_size
from kvmesh.cluster.openai.app import CALL, KEYLESS, openai_app
from kvmesh.cluster.openai.call import KV_BYTES, Contract, HttpCall
from kvmesh.cluster.reception import (
    READ_TIMEOUT_S,
    Reception,
    UnreadReplyError,
    report,
    sent,
)
from kvmesh.cluster.telemetry.meters import IngressMeters
from kvmesh.v1 import kvmesh_pb2 as pb

REQUEST_ID = "x-request-id"
# Headers of replies that scripts of web pages can read besides those of any page.
SHOWN_TO_SCRIPTS = (REQUEST_ID, KV_BYTES, "retry-after", "retry-after-ms", "x-should-retry")
SERVE_PATHS = "/-/"  # Serve's own health and routes

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]


class ClientLeftError(Exception):
    """The client has left before its body was there."""


class HttpFront:
    """An ASGI application; all methods belong to one event loop.

    contract: what serves the calls
    version: of the server
    origins: of web pages whose scripts may call it; "*" for all
    """

    def __init__(
        self,
        contract: Contract,
        version: str,
        reception: Reception,
        limits: Limits,
        meters: IngressMeters,
        origins: Sequence[str] = (),
    ) -> None:
        self._entry: Application = self._serve
        if origins:
            self._entry = CORSMiddleware(
                self._serve,
                allow_origins=origins,
                allow_methods=("GET", "HEAD", "POST"),
                allow_headers=("*",),
                allow_private_network=True,
                expose_headers=SHOWN_TO_SCRIPTS,
            )
        self._app = openai_app(contract, version)
        self._paths = frozenset(
            route.path for route in self._app.routes if isinstance(route, Route)
        )
        self._reception = reception
        self._limits = limits
        self._meters = meters

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._entry(scope, receive, send)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # the lifespan
            await self._app(scope, receive, send)
            return
        headers = {k.decode("latin-1").lower(): v.decode("latin-1") for k, v in scope["headers"]}
        given_id = headers.get(REQUEST_ID, "")
        usable = len(given_id) <= MAX_ID_CHARS and given_id.isascii() and given_id.isprintable()
        request_id = given_id if given_id and usable else secrets.token_hex(16)

        def log(error: Exception) -> pb.Error:
            return report(error, headers.items(), request_id, call.tenant)

        call = HttpCall("", request_id, headers, log)
        answer = Answer(send, {REQUEST_ID: request_id})
        with self._reception.call() as at_its_end:
            try:
                try:
                    if not usable:
                        refuse(REQUEST_ID, f"must have at most {MAX_ID_CHARS} printable characters")
                    self._admit(call, scope, at_its_end)
                    call.body = await self._body(call, scope, receive)
                except ClientLeftError:
                    call.outcome = "cancelled"
                    return
                except Exception as error:
                    await call.failed(error)(scope, receive, answer.send)
                    return
                await self._run(call, scope, receive, answer)
            except asyncio.CancelledError:
                call.outcome = "cancelled"
                raise
            finally:
                path = scope["path"] if scope["path"] in self._paths else "other"
                self._meters.call(path, call.outcome, call.tenant or None)

    def _admit(self, call: HttpCall, scope: Scope, at_its_end: ExitStack) -> None:
        if (scope["method"], scope["path"]) in KEYLESS:
            return
        caller = self._reception.caller(call.headers.items())
        call.tenant = caller.tenant
        self._reception.admit(caller, at_its_end)

    async def _body(self, call: HttpCall, scope: Scope, receive: Receive) -> bytes:
        """The call's body, when it is its turn. Raises InvalidFieldError(request)."""
        if scope["method"] in ("GET", "HEAD"):
            return b""
        if call.headers.get("content-encoding", "identity") != "identity":
            refuse("content-encoding", "must be identity: send the body as it is")
        length = call.headers.get("content-length", "")
        check_size(int(length) if length.isdecimal() else 0, self._limits)
        parts: list[bytes] = []
        size = 0
        async with self._reception.turn(call.tenant):
            try:
                async with asyncio.timeout(READ_TIMEOUT_S):
                    while True:
                        message = await receive()
                        if message["type"] == "http.disconnect":
                            raise ClientLeftError()
                        parts.append(message.get("body", b""))
                        size += len(parts[-1])
                        check_size(size, self._limits)
                        if not message.get("more_body", False):
                            return b"".join(parts)
            except TimeoutError:
                refuse("request", f"must arrive within {READ_TIMEOUT_S:g} s")

    async def _run(self, call: HttpCall, scope: Scope, receive: Receive, answer: Answer) -> None:
        """Serve the call, until it ends or its client leaves, which cancels it."""

        async def client_leaves() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass

        async def nothing_more() -> Message:
            return await asyncio.get_running_loop().create_future()  # type: ignore[no-any-return]

        work = asyncio.create_task(self._app({**scope, CALL: call}, nothing_more, answer.send))
        left = asyncio.create_task(client_leaves())
        try:
            await asyncio.wait((work, left), return_when=asyncio.FIRST_COMPLETED)
            if answer.complete:
                await asyncio.wait((work,))
            if answer.unread or not work.done():
                call.outcome = "cancelled"
            elif (bug := work.exception()) is not None and isinstance(bug, Exception):
                call.fail(bug)  # the framework has answered it
        finally:
            for task in (work, left):
                task.cancel()
            await asyncio.gather(work, left, return_exceptions=True)
            await call.opened.aclose()


class Answer:
    """The reply to a call, on its way.

    headers: of any reply, in place of those it has
    unread: its client does not read it
    """

    def __init__(self, send: Send, headers: dict[str, str]) -> None:
        self._send = send
        self.headers = headers
        self.complete = False
        self.unread = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            MutableHeaders(scope=message).update(self.headers)
        try:
            await sent(self._send(message))
        except UnreadReplyError:
            self.unread = True
            raise
        if message["type"] == "http.response.body":
            self.complete = not message.get("more_body", False)


# Serve's server

_front: HttpFront | None = None


def attach(front: HttpFront | None) -> None:
    """Serve the calls of this process's server with `front`; None: with nothing."""
    global _front
    _front = front


class FrontFirst:
    """A middleware that gives calls to the attached front, if there is one, and not to Serve."""

    def __init__(self, app: Application) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        mine = scope["type"] == "http" and not scope["path"].startswith(SERVE_PATHS)
        await (_front if _front is not None and mine else self._app)(scope, receive, send)


def middlewares() -> list[Middleware]:
    """Named in Serve's environment: called for each HTTP server of Serve before it starts."""
    return [Middleware(FrontFirst)]
