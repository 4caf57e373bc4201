"""Waiting until a cluster serves. Each function yields a few times a second while it waits."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import grpc

from kvmesh.cluster import deployment
from kvmesh.cluster.errors import StartError

POLL_S = 0.2


def until_running(timeout_s: float) -> Iterator[str]:
    """Wait for all deployments; yields what it waits for. Raises StartError."""
    deadline = time.monotonic() + timeout_s
    while (waiting := deployment.waiting_for()) is not None:
        if time.monotonic() > deadline:
            raise StartError(f"not ready within {timeout_s:g} s (timeouts.start_s); {waiting}")
        yield waiting
        time.sleep(POLL_S)


def until_serving(target: str, replicas: int, timeout_s: float) -> Iterator[None]:
    """Wait until health checks through the proxy return SERVING, from every ingress.

    The proxy gives consecutive calls to one ingress after the other. Raises StartError.
    """
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    deadline = time.monotonic() + timeout_s
    in_a_row = 0
    # Its host may have any name, but it is this machine: a proxy of $http_proxy is elsewhere.
    with grpc.insecure_channel(target, [("grpc.enable_http_proxy", 0)]) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        while time.monotonic() < deadline:
            with contextlib.suppress(grpc.RpcError):
                reply = stub.Check(health_pb2.HealthCheckRequest(), timeout=2.0)
                if reply.status == health_pb2.HealthCheckResponse.SERVING:
                    in_a_row += 1
                    if in_a_row > replicas:
                        return
                    continue
            in_a_row = 0
            yield
            time.sleep(POLL_S)
    raise StartError("the cluster was deployed, but its health check does not return SERVING")
