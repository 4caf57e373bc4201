"""A cluster of one group that sends traces to a collector."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kvmesh.client import Client
from kvmesh.cluster.lifecycle import Endpoint
from tests.cluster.e2e.harness import serving
from tests.cluster.e2e.one_group.config import config
from tests.cluster.otlp import Batch, receiver


@pytest.fixture(scope="package")
def traces() -> Iterator[tuple[str, list[Batch]]]:
    """A collector's address, and what has arrived there: calls that their callers trace."""
    with receiver() as collector:
        yield collector


@pytest.fixture(scope="package")
def endpoint(
    tmp_path_factory: pytest.TempPathFactory, traces: tuple[str, list[Batch]]
) -> Iterator[Endpoint]:
    with serving(config(traces[0]), tmp_path_factory.mktemp("config")) as endpoint:
        yield endpoint


@pytest.fixture
def client(endpoint: Endpoint) -> Iterator[Client]:
    with Client(endpoint.target, api_key=endpoint.api_key) as client:
        yield client
