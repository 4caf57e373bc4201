"""A cluster of two groups and two ingresses, whose parts the tests kill and stop."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest

from kvmesh.client import Client
from kvmesh.cluster.lifecycle import Endpoint
from tests.cluster.e2e.harness import (
    check_accounts,
    greedy_by_engine,
    serving,
    wait_for,
    wait_idle,
)
from tests.cluster.e2e.streams import PATIENT, PROMPTS, is_complete
from tests.cluster.e2e.two_groups.config import CONFIG, GROUPS, TOKENS, Outputs


@pytest.fixture(scope="package")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    with serving(CONFIG, tmp_path_factory.mktemp("config")) as endpoint:
        yield endpoint


@pytest.fixture(scope="package")
def outputs(endpoint: Endpoint) -> Outputs:
    """What streams say when nothing dies, each length computed once."""
    with Client(endpoint.target, api_key=endpoint.api_key) as client:
        ids = [client.tokenize(prompt).token_ids for prompt in PROMPTS]

    @functools.cache
    def of_length(tokens: int) -> dict[str, tuple[int, ...]]:
        return dict(zip(PROMPTS, greedy_by_engine(CONFIG, ids, tokens), strict=True))

    return of_length


@pytest.fixture(scope="package")
def expected(outputs: Outputs) -> dict[str, tuple[int, ...]]:
    """The output for each prompt when nothing dies."""
    return outputs(TOKENS)


@pytest.fixture
def client(endpoint: Endpoint) -> Iterator[Client]:
    """The cluster is complete before and after the test."""

    def wait_complete(what: str) -> None:
        wait_for(lambda: is_complete(endpoint, GROUPS), what, period_s=0.5)

    wait_complete("every part is up")
    with Client(endpoint.target, api_key=endpoint.api_key, retry=PATIENT) as client:
        wait_idle(client)
        yield client
        wait_complete("every part is up again")
        wait_idle(client)
        loads = client.loads()
        check_accounts(loads)
        assert loads.router.audit_faults_total == 0
