"""Requests of a file, answered by a server over HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import RawTestServer

from kvmesh.cluster.batch import served_answers
from kvmesh.cluster.batch.errors import BatchRunError
from kvmesh.cluster.batch.line_request import LineRequest
from kvmesh.cluster.batch.output_file import OutputFile
from kvmesh.cluster.batch.run import BatchRun
from kvmesh.cluster.batch.served_answers import ServedAnswers, base_url
from kvmesh.cluster.errors import NotReadyError, RequestFaultError
from kvmesh.cluster.routing.errors import QueueFullError
from kvmesh.v1 import kvmesh_pb2 as pb
from tests.cluster.batch.test_batch_run import Files, asking
from tests.cluster.openai.server import (
    KEY,
    MODEL,
    Event,
    HttpServer,
    ScriptedContract,
    http_server,
    words,
)

FULL = QueueFullError("the queue is full", 0.0)


@pytest.fixture
async def contract() -> ScriptedContract:
    return ScriptedContract()


@pytest.fixture
async def server(contract: ScriptedContract) -> AsyncIterator[HttpServer]:
    async with http_server(contract) as running:
        yield running


@pytest.fixture
async def answers(server: HttpServer) -> AsyncIterator[ServedAnswers]:
    async with ServedAnswers(base_url(server.url), KEY) as made:
        made.pause_s = 0.0
        yield made


def refusing(*errors: Exception) -> Any:
    """A script that raises these, one for each request, and then answers."""
    left = iter(errors)

    def play(request: pb.GenerateRequest) -> Iterable[Event | Exception | asyncio.Event]:
        if (error := next(left, None)) is not None:
            yield error
        yield from words("Hello")(request)

    return play


def request(**body: Any) -> LineRequest:
    found = {"prompt": "p", **body}
    return LineRequest("batch_req_1_00", "a", "/v1/completions", json.dumps(found).encode(), b"")


async def test_a_file_is_answered_by_a_server(
    tmp_path: Path, answers: ServedAnswers, contract: ScriptedContract
) -> None:
    files = Files(tmp_path)
    chat = {"messages": [{"role": "user", "content": "Hi"}], "model": ""}
    files.ask(
        [
            asking("a"),
            asking("b", url="/v1/chat/completions", body=chat),
            asking("c", url="/v1/responses", body={"input": "Hi"}),
            asking("d", body={"prompt": "p", "temperature": "hot"}),
        ]
    )
    assert await answers.models() == [MODEL]
    with contextlib.closing(OutputFile(str(files.target))) as output:
        run = BatchRun(str(files.source), output)
        await run.run(answers, at_once=2)
    found = files.by_id()
    assert [found[x]["response"]["status_code"] for x in "abcd"] == [200, 200, 200, 400]
    assert found["a"]["response"]["body"]["choices"][0]["text"] == "Hello there."
    assert found["d"]["response"]["body"]["error"]["param"] == "temperature"
    assert found["a"]["response"]["request_id"] in {x.request_id for x in contract.requests}
    assert run.counts.failed == 1 and run.counts.tokens == 6


async def test_refusals_that_pass_are_tried_again(
    answers: ServedAnswers, contract: ScriptedContract
) -> None:
    contract.script = refusing(FULL, NotReadyError(), FULL)
    served_answers_max = served_answers.MAX_PAUSE_S
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(served_answers, "MAX_PAUSE_S", 0.0)  # of what the server asks for, too
        assert (await answers.answer(request())).status_code == 200
    assert served_answers_max > 0
    assert len(contract.requests) == 4
    assert len({x.request_id for x in contract.requests}) == 4


async def test_faults_of_a_request_are_its_answer(
    answers: ServedAnswers, contract: ScriptedContract
) -> None:
    contract.script = refusing(RequestFaultError("it fails"))
    assert (await answers.answer(request())).status_code == 500
    assert len(contract.requests) == 1


class Attempts:
    """A script whose requests take these seconds, and fail, except for those that are answered."""

    def __init__(self, *attempts: tuple[float, bool]) -> None:
        self.now_s = 0.0
        self._left = iter(attempts)

    def play(self, request: pb.GenerateRequest) -> Iterable[Event | Exception | asyncio.Event]:
        took_s, is_answered = next(self._left)
        self.now_s += took_s
        yield from words("Hello")(request) if is_answered else [FULL]

    def clock(self) -> float:
        return self.now_s


async def test_a_server_that_stays_away_ends_the_run(
    server: HttpServer, contract: ScriptedContract, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(served_answers, "MAX_PAUSE_S", 0.0)
    attempts = Attempts(*[(100.0, False)] * 100)
    contract.script = attempts.play
    async with ServedAnswers(base_url(server.url), KEY, attempts.clock) as answers:
        answers.pause_s = 0.0
        with pytest.raises(BatchRunError, match=r"refused all .*queue is full") as caught:
            await answers.answer(request())
    assert caught.value.unreachable
    assert attempts.now_s == 800.0  # the first failed at 100 s, and 600 s may pass


@pytest.mark.parametrize(
    "attempts",
    [
        [(500.0, False), (500.0, True)] * 3,
        # Outputs that take longer than an outage may.
        [(700.0, True), (700.0, False), (700.0, True)],
        [(1.0, False), (700.0, False), (1.0, False), (700.0, True)],
    ],
)
async def test_an_outage_counts_from_the_first_failure(
    server: HttpServer,
    contract: ScriptedContract,
    monkeypatch: pytest.MonkeyPatch,
    attempts: list[tuple[float, bool]],
) -> None:
    monkeypatch.setattr(served_answers, "MAX_PAUSE_S", 0.0)
    script = Attempts(*attempts)
    contract.script = script.play
    async with ServedAnswers(base_url(server.url), KEY, script.clock) as answers:
        answers.pause_s = 0.0
        for _ in filter(None, (is_answered for _, is_answered in attempts)):
            assert (await answers.answer(request())).status_code == 200
    assert len(contract.requests) == len(attempts)


async def test_a_server_at_work_on_an_earlier_request_is_not_lost(
    server: HttpServer, contract: ScriptedContract, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The long one may be what takes the room."""
    monkeypatch.setattr(served_answers, "MAX_PAUSE_S", 0.0)
    now_s, arrived, end = 0.0, asyncio.Event(), asyncio.Event()

    def play(asked: pb.GenerateRequest) -> Iterable[Event | Exception | asyncio.Event]:
        nonlocal now_s
        if asked.prompt.text == "long":
            arrived.set()
            yield end
        elif now_s < 2000.0:
            now_s += 500.0
            yield FULL
            return
        yield from words("Hello")(asked)

    contract.script = play
    async with ServedAnswers(base_url(server.url), KEY, lambda: now_s) as answers:
        answers.pause_s = 0.0
        long = asyncio.create_task(answers.answer(request(prompt="long")))
        await arrived.wait()
        now_s = 1.0
        assert (await answers.answer(request())).status_code == 200
        end.set()
        assert (await long).status_code == 200


@pytest.mark.parametrize(
    ("body", "written"),
    [
        (b'{\n  "model": "m \\n",\r\n  "n": 1.50\n}\n', b'{"model":"m \\n","n":1.50}'),
        (b"\xff", '{"error":{"message":"\ufffd"}}'.encode()),
        (b'{"model": "\xff"}', '{"error":{"message":"{\\"model\\": \\"\ufffd\\"}"}}'.encode()),
        (b"", b'{"error":{"message":""}}'),
    ],
)
async def test_a_body_is_written_in_one_line(body: bytes, written: bytes) -> None:
    async def reply(_: web.BaseRequest) -> web.Response:
        return web.Response(body=body)

    async with (
        RawTestServer(reply) as plain,
        ServedAnswers(base_url(str(plain.make_url(""))), None) as answers,
    ):
        response = await answers.answer(request())
    assert bytes(response.body) == written


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        (None, 0.0),
        ("3", 3.0),
        ("-1", 0.0),
        ("nan", 0.0),
        ("1e9", served_answers.MAX_PAUSE_S),
        ("Mon, 1", 0.0),
    ],
)
def test_a_server_may_ask_for_any_wait(header: str | None, seconds: float) -> None:
    assert served_answers._seconds(header) == seconds


async def test_a_refusal_in_no_text_is_one() -> None:
    replies = iter([(503, b'{"error": {"message": "\xff"}}'), (200, b"{}")])

    async def reply(_: web.BaseRequest) -> web.Response:
        status, body = next(replies)
        return web.Response(status=status, body=body)

    async with (
        RawTestServer(reply) as plain,
        ServedAnswers(base_url(str(plain.make_url(""))), None) as answers,
    ):
        answers.pause_s = 0.0
        assert (await answers.answer(request())).status_code == 200


async def test_a_connection_breaks_when_its_peer_is_gone(
    answers: ServedAnswers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A host that loses its power says nothing, and the answer has no limit of time."""
    made: list[socket.socket] = []
    make = socket.socket

    def keep(*args: Any, **kwargs: Any) -> socket.socket:
        made.append(make(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(socket, "socket", keep)
    assert (await answers.answer(request())).status_code == 200
    watched = [x for x in made if x.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)]
    assert watched
    tcp = [getattr(socket, x) for x in ("TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT")]
    assert [watched[0].getsockopt(socket.IPPROTO_TCP, x) for x in tcp] == [60, 10, 6]
    assert watched[0].getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 120_000


@pytest.mark.parametrize("names", [[], ["a"], ["a", "b"]])
async def test_a_server_may_have_several_models(names: list[str]) -> None:
    async def reply(_: web.BaseRequest) -> web.Response:
        return web.json_response({"data": [{"id": name} for name in names]})

    async with (
        RawTestServer(reply) as plain,
        ServedAnswers(base_url(str(plain.make_url(""))), None) as answers,
    ):
        if names:
            assert await answers.models() == names
        else:
            with pytest.raises(BatchRunError, match="status 200 and no models"):
                await answers.models()


async def test_what_is_no_such_server_is_named(server: HttpServer) -> None:
    async with ServedAnswers(base_url(server.url), "another-key") as answers:
        for call in (answers.models(), answers.answer(request())):
            with pytest.raises(BatchRunError, match="refuses the key"):
                await call
    async with ServedAnswers("http://127.0.0.1:1", None) as answers:
        with pytest.raises(BatchRunError, match="does not answer as OpenAI's API") as caught:
            await answers.models()
        assert caught.value.unreachable
    async with ServedAnswers(f"{server.url}/elsewhere", KEY) as answers:
        with pytest.raises(BatchRunError, match="status 404 and no models"):
            await answers.models()


@pytest.mark.parametrize(
    "address", ["h:1", "http://h:1", "http://h:1/", "http://h:1/v1", "http://h:1/v1/"]
)
def test_an_address_may_have_several_forms(address: str) -> None:
    assert base_url(address) == "http://h:1"


def test_a_body_that_is_not_json_becomes_an_error() -> None:
    assert json.loads(bytes(served_answers._json(b"<html>"))) == {"error": {"message": "<html>"}}
