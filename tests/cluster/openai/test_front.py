"""The HTTP front: who is heard, how much, how calls end, and what is counted."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterable
from typing import Any

import httpx2
import openai
import pytest

from kvmesh.cluster import reception
from kvmesh.cluster.http_front import FrontFirst, Message, Scope, attach
from kvmesh.cluster.ingress.validate import Limits
from kvmesh.cluster.openai import call as call_module
from kvmesh.cluster.telemetry import table
from kvmesh.v1 import kvmesh_pb2 as pb
from kvmesh.workers.errors import InvalidFieldError
from tests.cluster.machine import PATIENCE_S
from tests.cluster.openai.server import (
    KEY,
    MAX_BYTES,
    TENANT,
    HttpServer,
    ScriptedContract,
    delta,
    http_server,
    started,
    usage,
)

CHAT = {"messages": [{"role": "user", "content": "hi"}]}
POSTS = ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/tokenize", "/detokenize"]


def error_of(reply: httpx2.Response) -> dict[str, Any]:
    found: dict[str, Any] = reply.json()["error"]
    assert set(found) == {"message", "type", "param", "code", "kvmesh"}
    return found


def completions_scope() -> Scope:
    """Of a call that a server hands over by ASGI."""
    return {
        "type": "http",
        "method": "POST",
        "path": "/v1/completions",
        "query_string": b"",
        "headers": [(b"authorization", f"Bearer {KEY}".encode())],
    }


async def until(holds: Any) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not holds():
            await asyncio.sleep(0)


@pytest.mark.parametrize("authorization", [None, "Bearer wrong", "Basic x"])
@pytest.mark.parametrize(
    ("method", "path"),
    [
        *(("POST", path) for path in [*POSTS, "/health"]),
        *(("GET", path) for path in ["/v1/models", "/version", "/openapi.json", "/nothing"]),
    ],
)
async def test_unknown_callers_are_refused_before_they_send(
    server: HttpServer,
    contract: ScriptedContract,
    method: str,
    path: str,
    authorization: str | None,
) -> None:
    """The reply comes while the body is still missing, so nothing of it can be read."""
    reader, writer = await asyncio.open_connection(*server.url.removeprefix("http://").split(":"))
    length = 100 if method == "POST" else 0
    key = f"authorization: {authorization}\r\n" if authorization else ""
    head = f"{method} {path} HTTP/1.1\r\nhost: x\r\n{key}content-length: {length}\r\n\r\n"
    writer.write(head.encode())
    reply = (await reader.readuntil(b"}}}")).decode()
    writer.close()
    assert reply.startswith("HTTP/1.1 401 ")
    assert "www-authenticate: Bearer" in reply
    assert '"code":"invalid_api_key"' in reply
    assert not contract.requests


async def test_probes_need_no_key(server: HttpServer, contract: ScriptedContract) -> None:
    for ready, status in ((True, 200), (False, 503)):
        contract.ready = ready
        async with httpx2.AsyncClient(verify=False) as unknown:
            reply = await unknown.get(f"{server.url}/health")
            assert (await unknown.head(f"{server.url}/health")).status_code == status
        assert (reply.status_code, reply.json()["status"] == "ok") == (status, ready)


async def test_what_exists_is_listed(server: HttpServer) -> None:
    async with server.client() as client:
        (model,) = (await client.models.list()).data
        assert (model.id, model.owned_by) == ("tiny", "kvmesh")
        assert (await client.models.retrieve("tiny")).id == "tiny"
        with pytest.raises(openai.NotFoundError, match="'other' is not served here") as caught:
            await client.models.retrieve("other")
        assert caught.value.code == "model_not_found"
    assert (await server.http.get("/version")).json() == {"version": "1.2.3"}
    schema = (await server.http.get("/openapi.json")).json()
    assert {*POSTS, "/v1/models", "/health"} <= set(schema["paths"])
    body = schema["paths"]["/v1/completions"]["post"]["requestBody"]["content"]
    found = resolved(schema, body["application/json"]["schema"]["$ref"])
    assert "echo" in found["properties"]
    references = list(references_in(schema))
    assert len(references) > len(POSTS)
    for reference in references:
        resolved(schema, reference)


def references_in(node: Any) -> Iterable[str]:
    if isinstance(node, dict):
        for name, value in node.items():
            if name == "$ref":
                yield value
            elif name == "discriminator":
                yield from value.get("mapping", {}).values()
            yield from references_in(value)
    elif isinstance(node, list):
        for value in node:
            yield from references_in(value)


def resolved(document: Any, reference: str) -> Any:
    root, *names = reference.split("/")
    assert root == "#"
    for name in names:
        document = document[name]
    return document


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/nothing", 404),
        ("POST", "/", 404),
        ("GET", "/v1/completions", 405),
        ("DELETE", "/v1/models", 405),
        ("GET", "/docs", 404),
    ],
)
async def test_other_paths(server: HttpServer, method: str, path: str, status: int) -> None:
    reply = await server.http.request(method, path)
    assert reply.status_code == status
    assert f"there is no {method} {path}" in error_of(reply)["message"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "must be JSON"),
        (b"{", "must be JSON"),
        (b'{"prompt": "\xff"}', "must be JSON in UTF-8"),
        (b'{"prompt": "\\ud800"}', "must be JSON"),
        (b"[]", "must be a JSON object"),
        (b'{"prompt": NaN}', "must be JSON"),
        (b'{"prompt": ' + b"[" * 100_000, "nested too deeply"),
        (b'{"prompt": "a"} {}', "must be JSON"),
    ],
)
async def test_bodies_that_are_not_json(server: HttpServer, body: bytes, message: str) -> None:
    reply = await server.post("/v1/completions", body)
    assert reply.status_code == 400
    assert message in error_of(reply)["message"]
    assert error_of(reply)["param"] == "request"
    assert (await server.post("/v1/completions", {"prompt": "a"})).status_code == 200


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_body_that_is_too_large(
    server: HttpServer, contract: ScriptedContract, chunked: bool
) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(3):
            yield b" " * (MAX_BYTES // 2)

    content: Any = pieces() if chunked else b" " * (MAX_BYTES + 1)
    reply = await server.http.post("/v1/completions", content=content)
    assert reply.status_code == 413
    assert "must have at most 200,000 bytes" in error_of(reply)["message"]
    assert not contract.requests
    assert (await server.post("/v1/completions", {"prompt": "a"})).status_code == 200


async def test_a_body_without_an_end_is_refused_when_it_is_too_large(server: HttpServer) -> None:
    sent: list[Message] = []
    piece = {"type": "http.request", "body": b" " * (MAX_BYTES // 2), "more_body": True}
    pieces = iter([piece] * 3)

    async def receive() -> Message:
        return next(pieces)

    async def send(message: Message) -> None:
        sent.append(message)

    headers = [(b"authorization", f"Bearer {KEY}".encode())]
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": headers}
    await server.front(scope, receive, send)
    assert sent[0]["status"] == 413


async def test_a_compressed_body_is_refused(server: HttpServer) -> None:
    reply = await server.post("/v1/completions", b"{}", content_encoding="gzip")
    assert (reply.status_code, error_of(reply)["param"]) == (400, "content-encoding")


async def test_a_long_prompt_of_token_ids(contract: ScriptedContract) -> None:
    ids = [7, *range(100_000)]
    async with http_server(contract, Limits(max_request_bytes=4 << 20)) as server:
        reply = await server.post("/v1/completions", {"prompt": ids})
    assert reply.status_code == 200
    assert list(contract.requests[0].prompt.token_ids.ids) == ids


async def test_request_ids_go_both_ways(server: HttpServer, contract: ScriptedContract) -> None:
    reply = await server.post("/v1/completions", {"prompt": "a"}, x_request_id="mine-1")
    assert reply.headers.get_list("x-request-id") == ["mine-1"]
    assert contract.requests[-1].request_id == "mine-1"
    assert reply.json()["id"] == "cmpl-mine-1"
    reply = await server.post("/v1/completions", {"prompt": "a"})
    assert reply.headers["x-request-id"] == contract.requests[-1].request_id
    refused = await server.post("/v1/completions", {"prompt": 5}, x_request_id="mine-2")
    assert refused.headers["x-request-id"] == "mine-2"
    assert error_of(refused)["kvmesh"]["request_id"] == "mine-2"
    for bad in ("x" * 129, "caf\u00e9"):
        raw = httpx2.Headers({b"x-request-id": bad.encode("latin-1")})
        refused = await server.http.post("/v1/completions", json={}, headers=raw)
        assert (refused.status_code, error_of(refused)["param"]) == (400, "x-request-id")


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_ends_its_request(
    server: HttpServer, contract: ScriptedContract, stream: bool
) -> None:
    def play(request: pb.GenerateRequest) -> Iterable[Any]:
        yield started(request)
        yield delta("One")
        yield asyncio.Event()  # which nobody sets

    contract.script = play
    body = {"prompt": "a", "stream": stream}
    async with asyncio.TaskGroup() as group:
        call = group.create_task(server.post("/v1/completions", body))
        await until(lambda: contract.requests)
        call.cancel()
    await until(lambda: contract.ended == 1)
    await until(lambda: server.meters.of(table.REQUESTS, "/v1/completions", "cancelled") == 1)
    assert server.front._reception._calls == 0


async def test_a_client_that_leaves_while_it_is_sent_to_ends_its_request(
    server: HttpServer, contract: ScriptedContract, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody waits for the next event then. It is not left to the garbage collector to end it."""
    kept: list[Any] = []
    merged = call_module._merged

    def keep(*streams: Any) -> Any:
        kept.append(merged(*streams))
        return kept[-1]

    monkeypatch.setattr(call_module, "_merged", keep)
    sending, left, never = asyncio.Event(), asyncio.Event(), asyncio.Event()
    body = iter([json.dumps({"prompt": "a", "stream": True}).encode()])

    async def receive() -> Message:
        if (part := next(body, None)) is not None:
            return {"type": "http.request", "body": part}
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        if message.get("body"):
            sending.set()
            await never.wait()

    serving = asyncio.create_task(server.front(completions_scope(), receive, send))
    await sending.wait()
    assert (len(kept), contract.ended) == (1, 0)
    left.set()
    await serving
    assert contract.ended == 1


async def test_a_client_that_leaves_one_of_several_prompts(
    server: HttpServer, contract: ScriptedContract
) -> None:
    def play(request: pb.GenerateRequest) -> Iterable[Any]:
        yield started(request)
        yield asyncio.Event()

    contract.script = play
    async with asyncio.TaskGroup() as group:
        call = group.create_task(server.post("/v1/completions", {"prompt": ["a"] * 20}))
        await until(lambda: len(contract.requests) == 16)  # the others wait for their turn
        call.cancel()
    await until(lambda: contract.ended == 16)


async def test_a_client_that_does_not_read_has_its_call_cancelled(
    server: HttpServer, contract: ScriptedContract, monkeypatch: pytest.MonkeyPatch
) -> None:
    def play(request: pb.GenerateRequest) -> Iterable[Any]:
        yield started(request)
        while True:
            yield delta("One")

    async def receive() -> Message:
        if bodies:
            return {"type": "http.request", "body": bodies.pop(), "more_body": False}
        await asyncio.get_running_loop().create_future()
        raise AssertionError("it stays")

    async def send(message: Message) -> None:
        if message["type"] == "http.response.body":
            await asyncio.get_running_loop().create_future()

    contract.script = play
    monkeypatch.setattr(reception, "UNREAD_TIMEOUT_S", 0.0)
    bodies = [json.dumps({"prompt": "a", "stream": True}).encode()]
    await asyncio.wait_for(server.front(completions_scope(), receive, send), PATIENCE_S)
    assert contract.ended == 1
    assert server.front._reception._calls == 0
    assert server.meters.of(table.REQUESTS, "/v1/completions", "cancelled") == 1


async def test_an_error_of_one_prompt_ends_the_others(
    server: HttpServer, contract: ScriptedContract
) -> None:
    def play(request: pb.GenerateRequest) -> Iterable[Any]:
        yield started(request)
        yield RuntimeError("secret") if request.prompt.text == "b" else asyncio.Event()

    contract.script = play
    reply = await server.post("/v1/completions", {"prompt": ["a", "b", "c"]})
    assert (reply.status_code, contract.ended) == (500, 3)
    assert "secret" not in reply.text
    assert reply.headers["x-should-retry"] == "false"


async def test_calls_beyond_the_limit_are_refused(
    server: HttpServer, contract: ScriptedContract
) -> None:
    def play(request: pb.GenerateRequest) -> Iterable[Any]:
        yield started(request)
        yield asyncio.Event()

    contract.script = play
    server.front._reception._max_calls = 2
    async with asyncio.TaskGroup() as group:
        calls = [group.create_task(server.post("/v1/completions", {"prompt": "a"})) for _ in "ab"]
        await until(lambda: len(contract.requests) == 2)
        refused = await server.post("/v1/completions", {"prompt": "a"})
        for call in calls:
            call.cancel()
    assert (refused.status_code, error_of(refused)["code"]) == (429, "queue_full")
    assert refused.headers["retry-after"] == "1"


async def test_calls_are_counted_by_path_and_outcome(server: HttpServer) -> None:
    await server.post("/v1/chat/completions", CHAT)
    await server.post("/v1/chat/completions", {})
    await server.http.get("/v1/" + "x" * 500)
    expected = {
        ("/v1/chat/completions", "ok"): 1.0,
        ("/v1/chat/completions", "invalid_field"): 1.0,
        ("other", "unsupported"): 1.0,
    }
    await until(lambda: server.meters.values.get(table.REQUESTS.name) == expected)
    assert server.meters.of(table.TENANT_REQUESTS, TENANT, "ok") == 1


async def test_serve_is_left_its_own_paths_and_other_applications(server: HttpServer) -> None:
    served: list[str] = []

    async def serve(scope: Scope, receive: Any, send: Any) -> None:
        served.append(scope["path"])

    async def nothing(*_: Any) -> Message:
        raise AssertionError("it is not read")

    first = FrontFirst(serve)

    async def ask(path: str) -> None:
        scope = {"type": "http", "method": "GET", "path": path, "headers": [], "query_string": b""}
        sent: list[Message] = []

        async def send(message: Message) -> None:
            sent.append(message)

        await first({**scope, "http_version": "1.1", "root_path": ""}, nothing, send)

    await ask("/v1/models")  # nothing is attached: another application's replica
    attach(server.front)
    try:
        await ask("/-/healthz")
        await ask("/version")
    finally:
        attach(None)
    assert served == ["/v1/models", "/-/healthz"]


async def test_a_stream_that_fails_ends_with_its_error(
    server: HttpServer, contract: ScriptedContract
) -> None:
    def play(request: pb.GenerateRequest) -> Iterable[Any]:
        yield started(request)
        yield delta("One")
        yield RuntimeError("secret")

    contract.script = play
    *_, text, error = await server.events("/v1/completions", {"prompt": "a", "stream": True})
    assert json.loads(text.removeprefix("data: "))["choices"][0]["text"] == "One"
    assert json.loads(error.removeprefix("data: "))["error"]["code"] == "internal"
    async with server.client() as client:
        with pytest.raises(openai.APIError, match="internal error"):
            async for _ in await client.completions.create(model="tiny", prompt="a", stream=True):
                pass
    await until(lambda: server.meters.of(table.REQUESTS, "/v1/completions", "internal") == 2)


@pytest.mark.parametrize(
    ("path", "body", "field", "param"),
    [
        ("/v1/completions", {"prompt": "a"}, "prompt.text", "prompt"),
        ("/v1/chat/completions", CHAT, "prompt.chat", "messages"),
        ("/v1/responses", {"input": "a"}, "sampling_params.max_tokens", "max_output_tokens"),
    ],
)
async def test_an_error_in_a_stream_names_the_field_as_openai_does(
    server: HttpServer,
    contract: ScriptedContract,
    monkeypatch: pytest.MonkeyPatch,
    path: str,
    body: dict[str, Any],
    field: str,
    param: str,
) -> None:
    """The stream began while the request waited, so that it could not have its status."""
    monkeypatch.setattr("kvmesh.cluster.openai.call.HOLD_S", 0.0)
    waiting = pb.GenerateStreamResponse(queued=pb.Queued())
    contract.script = lambda request: [waiting, InvalidFieldError(field, "is too long")]
    *_, error = await server.events(path, {**body, "stream": True})
    assert json.loads(error.removeprefix("data: "))["error"]["param"] == param


async def test_a_stream_that_waits_says_so_in_comments(
    server: HttpServer, contract: ScriptedContract, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvmesh.cluster.openai.call.HOLD_S", 0.0)

    def play(request: pb.GenerateRequest) -> Iterable[Any]:
        yield pb.GenerateStreamResponse()
        yield pb.GenerateStreamResponse(queued=pb.Queued(position=3, projected_wait_s=1.5))
        yield started(request)
        progress = pb.Prefilling(computed_tokens=10, total_tokens=40)
        yield pb.GenerateStreamResponse(prefilling=progress)
        yield delta("One")
        yield usage()

    contract.script = play
    lines = await server.events("/v1/completions", {"prompt": "a", "stream": True})
    assert [line for line in lines if line.startswith(":")] == [
        ": reading the prompt",
        ": queued position=3 projected_wait_s=1.5",
        ": prefilling 10/40",
    ]
    async with server.client() as client:
        stream = await client.completions.create(model="tiny", prompt="a", stream=True)
        assert "".join([x.choices[0].text async for x in stream if x.choices]) == "One"
