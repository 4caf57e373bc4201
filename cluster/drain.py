"""Waiting for a cluster's running requests before it stops, over the router's own connection.

It works even if Ray's own processes are gone.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

from kvmesh.cluster.identity import Identity
from kvmesh.cluster.ingress.router_link import RouterLink
from kvmesh.cluster.link import Address, LinkError

POLL_S = 0.2
ROUTER_TIMEOUT_S = 5.0

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class RouterContact:
    """Where the router listens, and the identity of its deployment's processes."""

    address: Address
    identity: Identity


class RouterCalls:
    """Calls from a program without an event loop: a loop in a thread, until closed.

    One for the life of a cluster, because Serve's handles keep to the loop that used them first.
    """

    def __init__(self, app_name: str) -> None:
        self._app_name = app_name
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="kvmesh-router", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Idempotent."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def contact(self) -> RouterContact:
        """How to connect to the router, according to Serve. Raises LinkError."""
        from ray import serve
        from ray.exceptions import RayError
        from ray.serve.exceptions import RayServeException

        from kvmesh.cluster.router_finder import router_finder

        async def find() -> RouterContact:
            router: Any = serve.get_deployment_handle("router", self._app_name)
            address = await router_finder(router)()
            async with asyncio.timeout(ROUTER_TIMEOUT_S):
                return RouterContact(address, await router.identity.remote())

        try:
            return self._run(find())
        except TimeoutError:
            raise LinkError("the router does not answer") from None
        except (RayError, RayServeException) as error:
            raise LinkError(f"Serve does not know the router: {error}") from error

    def drain(
        self,
        router: RouterContact,
        timeout_s: float,
        hurry: threading.Event,
        report: Callable[[int], None],
    ) -> None:
        """Make the router refuse new requests, and wait until none is left or `hurry` is set.

        report: called with the number of requests that are left
        Raises TimeoutError if the router does not answer; not after `timeout_s`.
        """

        async def find() -> Address:
            return router.address

        async def run() -> None:
            link = RouterLink(router.identity, find)
            connection = asyncio.create_task(link.run())
            try:
                await _wait_for_requests(link, timeout_s, hurry, report)
            finally:
                connection.cancel()
                await asyncio.gather(connection, return_exceptions=True)

        self._run(run())

    def _run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()


async def _wait_for_requests(
    router: RouterLink, timeout_s: float, hurry: threading.Event, report: Callable[[int], None]
) -> None:
    deadline = time.monotonic() + timeout_s
    idle_polls = 0
    while time.monotonic() < deadline and not hurry.is_set():
        async with asyncio.timeout(ROUTER_TIMEOUT_S):
            live_requests = (await router.status()).router.live_requests
        router.drain()
        # Poll once more, because a request's last output follows the end of its lease.
        idle_polls = 0 if live_requests else idle_polls + 1
        if idle_polls > 1:
            return
        if live_requests:
            report(live_requests)
        await asyncio.sleep(POLL_S)
