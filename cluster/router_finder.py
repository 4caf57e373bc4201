"""Asking Serve where the router listens."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from kvmesh.cluster.link import Address, LinkError

FIND_TIMEOUT_S = 5.0


def router_finder(router: DeploymentHandle[Any]) -> Callable[[], Awaitable[Address]]:
    """A function that asks Serve for the router's address; it raises LinkError."""

    async def find() -> Address:
        response: Any = router.address.remote()
        try:
            async with asyncio.timeout(FIND_TIMEOUT_S):
                address = await response
        except TimeoutError:
            response.cancel()
            raise LinkError("the router does not answer") from None
        except (RayError, RayServeException) as error:
            raise LinkError(f"the router cannot be reached: {error}") from error
        assert isinstance(address, Address)
        return address

    return find
