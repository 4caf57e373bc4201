"""Waiting for a cluster's running requests before it stops, over the router's own connection.

It works even if Ray's own processes are gone.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from kvmesh.cluster.identity import Identity
from kvmesh.cluster.ingress.router_link import RouterLink
from kvmesh.cluster.link import Address, LinkError

POLL_S = 0.2
ROUTER_TIMEOUT_S = 5.0

T = TypeVar("T")


def router_address(app_name: str) -> Address:
    """Where the router listens, according to Serve. Raises LinkError."""
    from ray import serve
    from ray.exceptions import RayError
    from ray.serve.exceptions import RayServeException

    from kvmesh.cluster.app import router_finder

    async def find() -> Address:
        # Serve's handles need a running event loop.
        return await router_finder(serve.get_deployment_handle("router", app_name))()

    try:
        return _run_in_thread(find)
    except (RayError, RayServeException) as error:
        raise LinkError(f"Serve does not know the router: {error}") from error


def drain(
    router: Address,
    identity: Identity,
    timeout_s: float,
    hurry: threading.Event,
    report: Callable[[int], None],
) -> None:
    """Make the router refuse new requests, and wait until none is left or `hurry` is set.

    report: called with the number of requests that are left
    Raises TimeoutError if the router does not answer; not after `timeout_s`.
    """

    async def find() -> Address:
        return router

    async def run() -> None:
        link = RouterLink(identity, find)
        connection = asyncio.create_task(link.run())
        try:
            await _wait_for_requests(link, timeout_s, hurry, report)
        finally:
            connection.cancel()
            await asyncio.gather(connection, return_exceptions=True)

    _run_in_thread(run)


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


def _run_in_thread(make: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """The coroutine's result. In a thread, because the caller may be running an event loop."""
    with ThreadPoolExecutor(1, "kvmesh-router") as thread:
        return thread.submit(lambda: asyncio.run(make())).result()
