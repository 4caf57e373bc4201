"""What is measured of kvmesh over gRPC, and of servers with OpenAI's API."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiohttp import web

from kvmesh.client import NO_RETRY, AsyncClient, AsyncFakeTransport, OverCapacityError
from kvmesh.cluster.bench.openai_target import Endpoint, OpenAITarget
from kvmesh.cluster.bench.targets import (
    BenchTarget,
    GrpcTarget,
    OutputChunk,
    ReplyFailed,
    TokenCounts,
)
from tests.cluster.openai.server import KEY, HttpServer, ScriptedContract, http_server


async def events_of(target: BenchTarget, prompt: Any, tokens: int = 8) -> list[Any]:
    return [event async for event in target.reply(prompt, tokens)]


def openai_target(url: str, endpoint: Endpoint = "completions", **options: Any) -> OpenAITarget:
    given: dict[str, Any] = {
        "model": None,
        "api_key": KEY,
        "temperature": 0.0,
        "ignore_eos": True,
        "timeout_s": None,
    }
    return OpenAITarget(url, endpoint=endpoint, **{**given, **options})


async def test_grpc() -> None:
    transport = AsyncFakeTransport(["one two three"])
    client = AsyncClient(transport=transport, retry=NO_RETRY)
    target = GrpcTarget(client, "kvmesh", temperature=0.0, ignore_eos=True)
    found = await events_of(target, [5, 6, 7])
    assert sum(x.tokens for x in found if isinstance(x, OutputChunk)) == 8
    counts = found[-1]
    assert isinstance(counts, TokenCounts)
    assert (counts.prompt, counts.output) == (3, 8)
    request = transport.server.requests[-1]
    assert list(request.prompt.token_ids.ids) == [5, 6, 7]
    assert request.sampling_params.max_tokens == 8
    assert request.sampling_params.ignore_eos


async def test_a_refusal_over_grpc_is_a_result() -> None:
    transport = AsyncFakeTransport(["one"])
    transport.server.fail(OverCapacityError("no room", reason="QUEUE_FULL", retry_after_s=1.0))
    client = AsyncClient(transport=transport, retry=NO_RETRY)
    target = GrpcTarget(client, "kvmesh", temperature=0.0, ignore_eos=True)
    with pytest.raises(ReplyFailed, match="no room") as caught:
        await events_of(target, [1])
    assert caught.value.kind == "OverCapacityError QUEUE_FULL"
    assert transport.server.slept_s == 0.0, "nothing is tried again"


@pytest.fixture
async def contract() -> ScriptedContract:
    return ScriptedContract()


@pytest.fixture
async def server(contract: ScriptedContract) -> AsyncIterator[HttpServer]:
    async with http_server(contract) as running:
        yield running


@pytest.mark.parametrize("path", ["", "/", "/v1", "/v1/"])
async def test_completions(contract: ScriptedContract, server: HttpServer, path: str) -> None:
    async with openai_target(server.url + path) as target:
        await target.find_model()
        found = await events_of(target, [5, 6, 7])
    assert found == [OutputChunk(), OutputChunk(), TokenCounts(5, 2, 3)]
    (request,) = contract.requests
    assert list(request.prompt.token_ids.ids) == [5, 6, 7]
    assert (request.sampling_params.max_tokens, request.sampling_params.ignore_eos) == (8, True)
    assert "tiny" in target.name


async def test_chat(contract: ScriptedContract, server: HttpServer) -> None:
    async with openai_target(server.url, "chat") as target:
        await target.find_model()
        found = await events_of(target, "the sea")
    assert found == [OutputChunk(), OutputChunk(), TokenCounts(5, 2, 3)]
    assert contract.requests[0].prompt.chat.messages[0].role == "user"


async def test_refusals_over_http_have_their_code(server: HttpServer) -> None:
    async with openai_target(server.url, api_key="another") as target:
        with pytest.raises(ReplyFailed) as caught:
            await target.find_model()
    assert caught.value.kind == "HTTP 401 invalid_api_key"
    async with openai_target(server.url, model="tiny") as target:
        with pytest.raises(ReplyFailed, match="token ids from 0") as caught:
            await events_of(target, [-1])
    assert caught.value.kind.startswith("HTTP 400 ")


async def test_no_server() -> None:
    async with openai_target("http://127.0.0.1:9/v1", model="m") as target:
        with pytest.raises(ReplyFailed) as caught:
            await events_of(target, [1])
    assert "Connect" in caught.value.kind


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://a/v1", "", "http://"])
def test_wrong_addresses(url: str) -> None:
    with pytest.raises(ValueError, match="must be an address such as"):
        openai_target(url)


class PlainServer:
    """Writes these pieces as the stream of every completion, then closes it or waits."""

    def __init__(self, *pieces: bytes, hangs: bool = False) -> None:
        self._pieces = pieces
        self._hangs = hangs
        self._released = asyncio.Event()

    async def __aenter__(self) -> str:
        app = web.Application()
        app.router.add_post("/v1/completions", self._stream)
        self._runner = web.AppRunner(app)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        return f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    async def __aexit__(self, *_: object) -> None:
        self._released.set()
        await self._runner.cleanup()

    async def _stream(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        for piece in self._pieces:
            await response.write(piece)
        if self._hangs:
            await self._released.wait()
        return response


async def replies(*pieces: bytes, hangs: bool = False, **options: Any) -> list[Any]:
    async with (
        PlainServer(*pieces, hangs=hangs) as url,
        openai_target(url, model="m", **options) as target,
    ):
        return await events_of(target, "a")


async def test_events_may_be_cut_anywhere_and_have_other_line_ends() -> None:
    found = await replies(
        b": a comment\r\n\r\nda",
        b'ta: {"choices": [{"text": "\xc3',
        b'\xa4"}]}\r\n\r\ndata:{"choices": [{"text": ""}]}\n',
        b'\ndata: {"choices": [{"text": "b", "finish_reason": "length"}]}\n\n',
        b'data: {"choices": [], "usage": {"prompt_tokens": 4, "completion_tokens": 9}}\n\n',
    )
    assert found == [OutputChunk(), OutputChunk(), TokenCounts(4, 9)]


@pytest.mark.parametrize(
    ("piece", "kind"),
    [
        (b'data: {"choices": [{"text": "b"}]}\n\n', "stream broken"),
        (b"", "stream broken"),
        (b'data: {"error": {"message": "boom", "code": 500}}\n\n', "HTTP 200 500"),
        (b"data: hello\n\n", "not JSON"),
        (b"data: [1]\n\n", "not JSON"),
    ],
)
async def test_streams_that_are_no_reply(piece: bytes, kind: str) -> None:
    with pytest.raises(ReplyFailed) as caught:
        await replies(piece)
    assert caught.value.kind == kind


async def test_the_time_of_a_request() -> None:
    with pytest.raises(ReplyFailed) as caught:
        await replies(b'data: {"choices": [{"text": "b"}]}\n\n', hangs=True, timeout_s=0.05)
    assert caught.value.kind == "timeout"
