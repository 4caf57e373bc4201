"""Asking Serve where the router listens: if that fails, for whatever reason, it is asked again."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from kvmesh.cluster.link import Address, LinkError
from tests.cluster.machine import PATIENCE_S

ADDRESS = Address("10.0.0.1", 7000)


async def ask_for(answer: asyncio.Future[Address]) -> Address:
    """What is found with a handle of the router that gives this answer."""
    from kvmesh.cluster.router_finder import router_finder

    router: Any = SimpleNamespace(address=SimpleNamespace(remote=lambda: answer))
    async with asyncio.timeout(PATIENCE_S):
        return await router_finder(router)()


async def test_the_router_says_where_it_listens() -> None:
    answer = asyncio.get_running_loop().create_future()
    answer.set_result(ADDRESS)
    assert await ask_for(answer) == ADDRESS


async def test_what_ray_and_serve_raise_means_that_there_is_no_router_yet() -> None:
    from ray.exceptions import ActorDiedError, RayError
    from ray.serve.exceptions import (
        BackPressureError,
        DeploymentUnavailableError,
        RayServeException,
    )

    router: Any = SimpleNamespace(name="router", app_name="kvmesh")
    for error in (
        RayError("a process of Ray has died"),
        ActorDiedError(),
        RayServeException("Serve has shut down"),
        DeploymentUnavailableError(router),
        BackPressureError(1, 1),
    ):
        answer = asyncio.get_running_loop().create_future()
        answer.set_exception(error)
        with pytest.raises(LinkError, match="the router cannot be reached") as caught:
            await ask_for(answer)
        assert caught.value.__cause__ is error


async def test_a_router_that_does_not_answer_is_waited_for_no_longer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from kvmesh.cluster import router_finder

    monkeypatch.setattr(router_finder, "FIND_TIMEOUT_S", 0.0)
    answer = asyncio.get_running_loop().create_future()
    with pytest.raises(LinkError, match="the router does not answer"):
        await ask_for(answer)
    assert answer.cancelled()
