"""Waiting for the last requests of a cluster."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from types import SimpleNamespace

import pytest

from kvmesh.cluster import drain


class FakeRouter:
    """Stands in for the connection to a router with so many requests, one status after another."""

    def __init__(self, live_requests: Sequence[int]) -> None:
        self.left = list(live_requests)
        self.drains = 0

    async def status(self) -> object:
        return SimpleNamespace(router=SimpleNamespace(live_requests=self.left.pop(0)))

    def drain(self) -> None:
        self.drains += 1


async def wait(router: FakeRouter, timeout_s: float, hurry: threading.Event) -> list[int]:
    """The numbers that were reported."""
    reported: list[int] = []
    await drain._wait_for_requests(router, timeout_s, hurry, reported.append)  # type: ignore[arg-type]
    return reported


async def test_it_is_over_when_no_request_was_left_twice_in_a_row(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The last output of a request follows the end of its lease."""
    monkeypatch.setattr(drain, "POLL_S", 0.0)
    router = FakeRouter([2, 0, 1, 0, 0, 7])
    assert await wait(router, 1000.0, threading.Event()) == [2, 1]
    assert router.left == [7]
    assert router.drains == 5, "a router that has started meanwhile must hear it too"


async def test_it_waits_neither_in_a_hurry_nor_beyond_its_time() -> None:
    router, hurry = FakeRouter([]), threading.Event()
    assert await wait(router, 0.0, hurry) == []
    hurry.set()
    assert await wait(router, 1000.0, hurry) == []
