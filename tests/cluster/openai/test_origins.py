"""Which web pages may call the API, as browsers ask."""

from __future__ import annotations

from typing import Any

import httpx2
import pytest

from kvmesh.cluster.config import build
from kvmesh.workers.errors import ConfigError
from tests.cluster.openai.server import ScriptedContract, http_server

PAGE = "https://chat.example.com"
PATH = "/v1/chat/completions"
HI: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}]}
ALLOWED = "access-control-allow-origin"


async def ask(http: httpx2.AsyncClient, origin: str) -> httpx2.Response:
    """The question that a browser asks before a call with a key, which it asks without one."""
    headers = {
        "origin": origin,
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type,x-stainless-os",
        "access-control-request-private-network": "true",
        "authorization": "",
    }
    return await http.options(PATH, headers=headers)


@pytest.mark.parametrize(
    ("origins", "allowed"), [([PAGE], PAGE), (["https://a.example", PAGE], PAGE), (["*"], "*")]
)
async def test_a_page_that_is_allowed_may_call(origins: list[str], allowed: str) -> None:
    contract = ScriptedContract()
    async with http_server(contract, origins=origins) as server:
        asked = await ask(server.http, PAGE)
        assert (asked.status_code, asked.headers[ALLOWED]) == (200, allowed)
        assert "POST" in asked.headers["access-control-allow-methods"]
        assert "authorization" in asked.headers["access-control-allow-headers"]
        assert not contract.requests
        for stream in (False, True):
            reply = await server.post(PATH, {**HI, "stream": stream}, origin=PAGE)
            assert (reply.status_code, reply.headers[ALLOWED]) == (200, allowed)
            assert "x-request-id" in reply.headers["access-control-expose-headers"]
        # A script can read why it was refused.
        refused = await server.post(PATH, HI, origin=PAGE, authorization="Bearer wrong")
        assert (refused.status_code, refused.headers[ALLOWED]) == (401, allowed)


@pytest.mark.parametrize("origins", [[], ["https://other.example.com"]])
async def test_other_pages_may_not(origins: list[str]) -> None:
    async with http_server(ScriptedContract(), origins=origins) as server:
        asked = await ask(server.http, PAGE)
        assert asked.status_code == (400 if origins else 401)
        reply = await server.post(PATH, HI, origin=PAGE)
        for found in (asked, reply):
            assert ALLOWED not in found.headers


async def test_calls_without_an_origin_are_served_as_before() -> None:
    async with http_server(ScriptedContract(), origins=[PAGE]) as server:
        reply = await server.post(PATH, HI)
        assert reply.status_code == 200 and ALLOWED not in reply.headers


@pytest.mark.parametrize(
    "origin", ["chat.example.com", "https://chat.example.com/", "https://a.example/path", ""]
)
def test_an_origin_that_no_browser_sends_is_refused(origin: str) -> None:
    with pytest.raises(ConfigError, match="without a path") as caught:
        build({"ingress": {"allowed_origins": [origin]}})
    assert caught.value.field == "ingress.allowed_origins.0"


@pytest.mark.parametrize("origin", ["*", PAGE, "http://localhost:3000", "chrome-extension://abc"])
def test_origins(origin: str) -> None:
    found = build({"ingress": {"allowed_origins": [origin]}})
    assert found.ingress.allowed_origins == (origin,)
