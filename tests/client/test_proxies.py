"""A proxy that the environment names is for servers on other machines."""

from __future__ import annotations

import pytest

from kvmesh import AsyncClient, Client, RetryPolicy, UnavailableError
from kvmesh.protos import pb
from tests.client.proxy import http_proxy
from tests.client.servicer import ScriptedServicer, answering, serving

ONCE = RetryPolicy(max_attempts=1)
TOKENS = answering(pb.TokenizeResponse(token_ids=[1]))


async def test_a_server_on_this_machine_is_called_directly(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with serving(ScriptedServicer(TOKENS)) as target, http_proxy(monkeypatch) as asked:
        for name in (target, target.replace("localhost", "127.0.0.1")):
            with Client(name, api_key="secret", retry=ONCE) as client:
                client.tokenize("hi")
            async with AsyncClient(name, api_key="secret", retry=ONCE) as other:
                await other.tokenize("hi")
    assert asked == []


async def test_a_server_elsewhere_is_called_through_the_proxy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with http_proxy(monkeypatch) as asked:
        with Client("a.invalid:1", retry=ONCE) as client, pytest.raises(UnavailableError):
            client.tokenize("hi")
        async with AsyncClient("b.invalid:1", retry=ONCE) as other:
            with pytest.raises(UnavailableError):
                await other.tokenize("hi")
    assert {line.split()[1] for line in asked} == {"a.invalid:1", "b.invalid:1"}
