"""Waiting for a cluster asks every ingress, and gives up in the end."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from kvmesh.cluster import readiness
from kvmesh.cluster.errors import StartError
from kvmesh.cluster.readiness import until_serving
from tests.client.proxy import http_proxy

PATIENCE_S = 120.0


class Ingresses(health_pb2_grpc.HealthServicer):
    """Answers as the ingresses behind a proxy do, in turns.

    serving: whether each one serves; None if it cannot be reached
    """

    def __init__(self, count: int) -> None:
        self.serving: list[bool | None] = [False] * count
        self.asked = 0

    def Check(
        self, request: health_pb2.HealthCheckRequest, context: Any
    ) -> health_pb2.HealthCheckResponse:
        serving = self.serving[self.asked % len(self.serving)]
        self.asked += 1
        if serving is None:
            context.abort(grpc.StatusCode.UNAVAILABLE, "it is away")
        reply = health_pb2.HealthCheckResponse
        return reply(status=reply.SERVING if serving else reply.NOT_SERVING)


@pytest.fixture
def ingresses() -> Iterator[tuple[Ingresses, str]]:
    servicer = Ingresses(2)
    server = grpc.server(ThreadPoolExecutor(1))
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield servicer, f"127.0.0.1:{port}"
    server.stop(None)


def test_a_cluster_serves_once_all_of_its_ingresses_do(ingresses: tuple[Ingresses, str]) -> None:
    servicer, target = ingresses
    waits = until_serving(target, 2, PATIENCE_S)
    for index in range(2):
        next(waits)
        servicer.serving[index] = True
    servicer.asked = 0
    assert list(waits) == []
    assert servicer.asked == 3, "each was asked, and the first one twice"


@pytest.mark.parametrize("failing", [False, None])
def test_one_ingress_that_serves_is_not_taken_for_all(
    ingresses: tuple[Ingresses, str], failing: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However often it has said so, if the other one says no, or nothing at all, in between."""
    monkeypatch.setattr(readiness, "POLL_S", 0.0)
    servicer, target = ingresses
    servicer.serving = [True, failing]
    waits = until_serving(target, 2, PATIENCE_S)
    for times in range(1, 9):
        next(waits)
        assert servicer.asked == 2 * times
    servicer.serving = [True, True]
    assert list(waits) == []
    assert servicer.asked == 16 + 3


def test_a_cluster_that_never_serves_did_not_start(ingresses: tuple[Ingresses, str]) -> None:
    _, target = ingresses
    waits = until_serving(target, 2, 0.3)
    with pytest.raises(StartError, match="does not return SERVING"):
        list(waits)


def test_a_proxy_of_the_environment_is_not_asked(
    ingresses: tuple[Ingresses, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    servicer, target = ingresses
    servicer.serving = [True, True]
    with http_proxy(monkeypatch) as asked:
        assert list(until_serving(target, 2, PATIENCE_S)) == []
    assert asked == []
