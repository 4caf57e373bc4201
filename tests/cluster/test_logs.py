"""Log lines have fields to find them by, and never hold prompts, output or keys."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterator
from typing import Any

import grpc
import pytest

from kvmesh.cluster.cli.server_commands import _announce
from kvmesh.cluster.config import ClusterConfig
from kvmesh.cluster.lifecycle import Endpoint
from kvmesh.cluster.telemetry.logs import OUR_LOGGER, SERVE_LOGGER, about, use_serve_log
from kvmesh.protos import pb
from tests.cluster.machine import machine
from tests.cluster.test_grpc_front import Served, failure, served
from tests.cluster.test_metrics import generate

assert served is not None  # a fixture

MANY = 10_000
SECRET = "SECRETWORDS"


@pytest.mark.parametrize(
    ("key", "group", "expected"),
    [
        ("tenant/a/b", "g", {"tenant": "tenant", "request_id": "a/b", "group": "g"}),
        ("tenant/", "", {"tenant": "tenant"}),
        ("", "g", {"group": "g"}),
        ("", "", {}),
    ],
)
def test_only_fields_that_are_known(key: str, group: str, expected: dict[str, str]) -> None:
    assert about(key, group) == expected


class Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


@pytest.fixture
def serve_log() -> Iterator[Lines]:
    """Serve's log, with a handler of our own in place of its file."""
    serve, ours = logging.getLogger(SERVE_LOGGER), logging.getLogger(OUR_LOGGER)
    before = [(x, list(x.handlers), x.level, x.propagate) for x in (serve, ours)]
    lines = Lines()
    serve.handlers = [lines]
    yield lines
    for logger, handlers, level, propagate in before:
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)


def test_our_lines_go_to_serves_file_with_the_group(serve_log: Lines) -> None:
    use_serve_log("engine-3")
    logging.getLogger("kvmesh.cluster.x").info("hello")
    logging.getLogger("kvmesh.workers.y").info("about another", extra=about("t/r", "engine-4"))
    groups = [getattr(record, "group", "") for record in serve_log.records]
    assert groups == ["engine-3", "engine-4"]


async def test_a_request_is_found_by_its_id_tenant_and_group(serve_log: Lines) -> None:
    use_serve_log()
    async with machine(groups=2) as built:
        running = asyncio.ensure_future(generate(built, 4, "my-request"))
        await built.until(lambda: any(engine.submitted for engine in built.engines.values()))
        (lost,) = [name for name, engine in built.engines.items() if engine.submitted]
        built.engines[lost].cut()
        built.allow(MANY)
        await running
    fields = [
        (getattr(x, "tenant", ""), getattr(x, "request_id", ""), getattr(x, "group", ""))
        for x in serve_log.records
    ]
    assert ("tenant", "my-request", lost) in fields
    assert ("", "", lost) in fields, "the router says that it is down"


def hostile() -> Iterator[Any]:
    """Requests with secrets in every text, most of them wrong in some way."""
    wrongs: list[dict[str, Any]] = [
        {},
        {"temperature": -1.0},
        {"max_tokens": 1 << 20},
        {"stop": [SECRET * 500]},
        {"n": 400},
        {"logit_bias": {1 << 30: 1.0}},
    ]
    for wrong in wrongs:
        params = pb.SamplingParams(**{"max_tokens": 3, **wrong})
        yield pb.GenerateRequest(prompt=pb.Prompt(text=SECRET), sampling_params=params)
        chat = pb.Chat(messages=[pb.ChatMessage(role=SECRET, content=SECRET)])
        yield pb.GenerateRequest(prompt=pb.Prompt(chat=chat), sampling_params=params)
    yield pb.GenerateRequest(prompt=pb.Prompt(text=SECRET), cache_salt=SECRET, model="other")


async def test_no_line_holds_a_prompt_output_or_key(
    served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    served.machine.allow(MANY)
    headers = (("authorization", "Bearer key"),)
    wrong_key = (("authorization", f"Bearer {SECRET}"),)
    codes: list[grpc.StatusCode | None] = []
    for request in hostile():
        for metadata in (headers, wrong_key):
            call = served.call("GenerateStream", request.SerializeToString(), metadata)
            try:
                async for _ in call:
                    pass
                codes.append(None)
            except grpc.aio.AioRpcError as error:
                codes.append(error.code())
    broken = served.call("GenerateStream", b"\xff" + SECRET.encode(), headers)
    await failure(broken)
    assert None in codes and grpc.StatusCode.INTERNAL not in codes
    refused = len(codes) - codes.count(None)
    kvmesh = [x for x in caplog.records if x.name.startswith(("kvmesh", "ray"))]
    assert len(kvmesh) >= refused > 10, "each refusal has a line"
    for record in kvmesh:
        written = json.dumps({**vars(record), "message": record.getMessage()}, default=str)
        assert SECRET not in written, written
        assert "Bearer" not in written


@pytest.mark.parametrize("url", ["http://127.0.0.1:8265", None])
def test_serve_says_how_to_get_into_rays_dashboard(
    url: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    endpoint = Endpoint(
        "127.0.0.1:9000", "http://127.0.0.1:8000", "the-key", None, dashboard_url=url
    )
    _announce(endpoint, ClusterConfig(), [])
    written = capsys.readouterr()
    shown = written.out + written.err
    assert ("ray get-auth-token" in shown) == (url is not None) == ("8265" in shown)
    assert "the-key" not in shown
