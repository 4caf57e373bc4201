"""Streams continue when a part hangs (SIGSTOP), and when the front proxy dies."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator

import psutil
import pytest

from kvmesh.client import Client
from kvmesh.cluster.lifecycle import Endpoint
from tests.cluster.e2e.harness import (
    processes_named,
    wait_for,
)
from tests.cluster.e2e.streams import (
    PROMPTS,
    Streams,
    check_complete,
    kill,
)
from tests.cluster.e2e.two_groups.config import GROUPS, TOKENS

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(1800),
    # Ray's own, at its import.
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray"),
]

MANY = PROMPTS * 4  # more than the groups hold at once, so that some wait


@pytest.fixture
def stopped() -> Iterator[Callable[[str], psutil.Process]]:
    """Stops processes, which may already be dead at the end of the test."""
    found: list[psutil.Process] = []

    def stop(name: str) -> psutil.Process:
        process = processes_named(name)[0]
        found.append(process)
        process.suspend()
        return process

    yield stop
    for process in found:
        if process.is_running():
            process.kill()


async def disturbed(
    endpoint: Endpoint, expected: dict[str, tuple[int, ...]], disturb: Callable[[], object]
) -> None:
    """Many streams, with a disturbance after a third of their tokens."""
    streams = Streams(endpoint, MANY, TOKENS)
    await streams.received(len(MANY) * TOKENS // 3)
    disturb()
    check_complete(await streams.ends(), MANY, expected)


async def test_streams_survive_a_rank_that_hangs(
    endpoint: Endpoint,
    client: Client,
    expected: dict[str, tuple[int, ...]],
    stopped: Callable[[str], psutil.Process],
) -> None:
    ranks: list[psutil.Process] = []
    await disturbed(endpoint, expected, lambda: ranks.append(stopped("ray::RankActor")))
    await asyncio.to_thread(wait_for, lambda: not ranks[0].is_running(), "the rank is ended")


async def test_streams_survive_an_engine_that_hangs(
    endpoint: Endpoint,
    client: Client,
    expected: dict[str, tuple[int, ...]],
    stopped: Callable[[str], psutil.Process],
) -> None:
    """Serve replaces it, and its ranks are ended with it."""
    parts: list[psutil.Process] = []
    before = {process.pid for process in processes_named("ray::RankActor")}
    await disturbed(
        endpoint,
        expected,
        lambda: parts.append(stopped("ray::ServeReplica:kvmesh:engine-0")),
    )
    await asyncio.to_thread(wait_for, lambda: not parts[0].is_running(), "the hung engine is ended")

    def one_rank_is_new() -> bool:
        return len(before & {x.pid for x in processes_named("ray::RankActor")}) == GROUPS - 1

    await asyncio.to_thread(wait_for, one_rank_is_new, "the ranks of the hung engine are gone")


async def test_streams_survive_an_ingress_that_hangs(
    endpoint: Endpoint,
    client: Client,
    expected: dict[str, tuple[int, ...]],
    stopped: Callable[[str], psutil.Process],
) -> None:
    """Serve ends it, and its clients resume at the other one."""
    await disturbed(endpoint, expected, lambda: stopped("ray::ServeReplica:kvmesh:ingress"))


async def test_streams_survive_a_router_that_hangs(
    endpoint: Endpoint,
    client: Client,
    expected: dict[str, tuple[int, ...]],
    stopped: Callable[[str], psutil.Process],
) -> None:
    """Those that wait for a place are placed by its replacement."""
    await disturbed(endpoint, expected, lambda: stopped("ray::ServeReplica:kvmesh:router"))


async def test_streams_survive_the_death_of_the_front_proxy(
    endpoint: Endpoint, client: Client, expected: dict[str, tuple[int, ...]]
) -> None:
    def kill_proxy() -> None:
        for process in processes_named("haproxy"):
            if "ray::" not in " ".join(process.cmdline()):
                kill(process)

    await disturbed(endpoint, expected, kill_proxy)
