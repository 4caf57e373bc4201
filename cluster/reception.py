"""Who may make calls on an ingress, how many at a time, and what is logged when one fails.

One for all fronts of a process: calls over gRPC and over HTTP count together.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from typing import Any
from weakref import WeakValueDictionary

from kvmesh.cluster.errors import IngressBusyError, NotAllowedError
from kvmesh.cluster.ingress import error_table
from kvmesh.cluster.ingress.authenticate import Caller
from kvmesh.cluster.telemetry.logs import about
from kvmesh.cluster.telemetry.traces import note_headers
from kvmesh.v1 import kvmesh_pb2 as pb

logger = logging.getLogger("ray.serve")

READERS = 64  # requests that are received at the same time
READERS_PER_TENANT = 16
TURN_TIMEOUT_S = 1.0
READ_TIMEOUT_S = 30.0
# A client that reads nothing for this long has its call cancelled: it would stay open, and in the
# way of others, long after the engine has ended the request.
UNREAD_TIMEOUT_S = 60.0
MAX_TENANT_SHARE = 0.75  # of all calls, where there are several tenants
_TRACEPARENT = re.compile("[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}.{0,100}")

Headers = Iterable[tuple[str, Any]]  # of a call, with lower-case names; over gRPC its metadata


class UnreadReplyError(Exception):
    """The client does not read the reply, so its call is cancelled."""

    def __str__(self) -> str:
        return f"the reply was not read for {UNREAD_TIMEOUT_S:g} s"


async def sent(writing: Awaitable[None]) -> None:
    """Wait until a part of a reply is on its way. Raises UnreadReplyError."""
    try:
        async with asyncio.timeout(UNREAD_TIMEOUT_S):
            await writing
    except TimeoutError:
        raise UnreadReplyError() from None


class Reception:
    """All methods belong to one event loop.

    authenticate: who makes a call, by its headers; raises UnauthenticatedError
    max_calls: open at the same time
    turn_timeout_s: how long a call waits until it may send its request
    shared: whether there are several tenants, of whom none may have all calls
    """

    def __init__(
        self,
        authenticate: Callable[[Headers], Caller],
        max_calls: int,
        turn_timeout_s: float = TURN_TIMEOUT_S,
        shared: Callable[[], bool] = lambda: False,
    ) -> None:
        self._authenticate = authenticate
        self._max_calls = max_calls
        self._turn_timeout_s = turn_timeout_s
        self._shared = shared
        self._calls = 0
        self._calls_of = Counter[str]()  # by tenant, of those that were admitted
        self._readers = asyncio.Semaphore(READERS)
        self._tenants: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()

    @contextlib.contextmanager
    def call(self) -> Iterator[contextlib.ExitStack]:
        """A call is open; the stack is for `admit`."""
        self._calls += 1
        with contextlib.ExitStack() as at_its_end:
            at_its_end.callback(self._leave)
            yield at_its_end

    def caller(self, headers: Headers) -> Caller:
        """Who makes a call, whose trace is joined. Raises UnauthenticatedError."""
        caller = self._authenticate(headers)
        note_headers(headers)
        return caller

    def admit(self, caller: Caller, at_its_end: contextlib.ExitStack, admin: bool = False) -> None:
        """Raises NotAllowedError if only operators may make the call, and IngressBusyError."""
        if admin and not caller.admin:
            raise NotAllowedError()
        if self._calls > self._max_calls:
            raise IngressBusyError(f"this ingress already serves {self._max_calls} calls")
        tenant, own = caller.tenant, int(self._max_calls * MAX_TENANT_SHARE)
        if self._shared() and self._calls_of[tenant] >= own:
            raise IngressBusyError(f"this ingress already serves {own} calls of your tenant")
        self._calls_of[tenant] += 1
        at_its_end.callback(self._leave_tenant, tenant)

    def _leave(self) -> None:
        self._calls -= 1

    def _leave_tenant(self, tenant: str) -> None:
        self._calls_of[tenant] -= 1
        if not self._calls_of[tenant]:
            del self._calls_of[tenant]

    @contextlib.asynccontextmanager
    async def turn(self, tenant: str) -> AsyncIterator[None]:
        """A turn to receive a request: memory holds a bounded number of them as bytes.

        No tenant has all turns, or one that sends slowly could keep out the others. Nobody waits
        long: the proxy holds back what a client sends in all its calls while one is not read,
        perhaps those that have a turn. Raises IngressBusyError.
        """
        own = self._tenants.get(tenant)
        if own is None:
            own = self._tenants[tenant] = asyncio.Semaphore(READERS_PER_TENANT)
        async with contextlib.AsyncExitStack() as turns:
            try:
                async with asyncio.timeout(self._turn_timeout_s):
                    for readers in (own, self._readers):
                        await turns.enter_async_context(readers)
            except TimeoutError:
                raise IngressBusyError(
                    "too many requests are being received; send them one after the other"
                ) from None
            yield


def report(error: Exception, headers: Headers, request_id: str, tenant: str = "") -> pb.Error:
    """Log why a call fails, with what clients must not see; the error as they see it."""
    trace = _trace_id(headers)
    fields = about(f"{tenant}/{request_id}")
    if error_table.is_expected(error):
        logger.info("refused request %r%s: %s", request_id, trace, error, extra=fields)
    else:
        logger.error("failed at request %r%s", request_id, trace, exc_info=error, extra=fields)
    return error_table.to_wire(error, request_id)


def _trace_id(headers: Headers) -> str:
    """For a log: the trace that a call belongs to, by its `traceparent` as the W3C defines it."""
    for name, value in headers:
        if name == "traceparent" and (found := _TRACEPARENT.fullmatch(str(value))):
            return f" of trace {found[1]}"
    return ""
