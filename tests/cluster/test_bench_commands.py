"""`kvmesh bench serve`: its options, what it prints, and how it ends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

import kvmesh.client
from kvmesh.client import AsyncClient, AsyncFakeTransport, FakeServer, OverCapacityError
from kvmesh.cluster.cli.exits import ExitCode
from kvmesh.cluster.cli.options import ServerOptions
from tests.cluster.test_cli import run

MOONCAKE = {"timestamp": 0, "input_length": 1200, "output_length": 3, "hash_ids": [0, 1]}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> FakeServer:
    """A server without a network, whatever a command's target is."""
    found = FakeServer(["a word"])

    def connect(*_: object, **options: Any) -> AsyncClient:
        transport = AsyncFakeTransport()
        transport._blocking.server = found
        return AsyncClient(transport=transport, retry=options["retry"])

    monkeypatch.setattr(kvmesh.client, "AsyncClient", connect)
    return found


def bench(*arguments: str) -> Result:
    return run("bench", "serve", *arguments)


@pytest.mark.parametrize(
    ("url", "other", "expected"),
    [
        ("http://198.51.100.1/v1", None, None),
        ("https://api.example.com/v1", None, None),
        ("https://127.0.0.1:80@example.com/v1", None, None),  # a user, a password and a host
        ("https://api.example.com/v1", "others-key", "others-key"),
        ("http://localhost:8000/v1", None, "own-key"),
        ("http://[::1]:8000/v1", None, "own-key"),
        ("http://localhost:8000/v1", "others-key", "others-key"),
    ],
)
def test_a_key_for_kvmesh_stays_on_this_machine(
    monkeypatch: pytest.MonkeyPatch, url: str, other: str | None, expected: str | None
) -> None:
    monkeypatch.setenv("KVMESH_API_KEY", "own-key")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    if other is not None:
        monkeypatch.setenv("OPENAI_API_KEY", other)
    assert ServerOptions().http_key(url) == expected
    assert ServerOptions(api_key="given-key").http_key(url) == "given-key"
    assert ServerOptions(api_key="").http_key(url) is None


def generations(server: FakeServer) -> list[Any]:
    return [x for x in server.requests if hasattr(x, "sampling_params")]


def test_a_run_is_shown(server: FakeServer) -> None:
    result = bench("--requests", "12", "--goodput", "ttft:60000", "tpot:60000",
                   "--input", "uniform:5,9", "--output", "4")  # fmt: skip
    assert result.exit_code == ExitCode.DONE, result.output
    assert "12 of 12 requests" in result.stdout
    for name in ("TTFT", "TPOT", "ITL", "E2E", "p50", "p99"):
        assert name in result.stdout
    assert "12 of 12 (100%) met TTFT ≤ 60000 ms, TPOT ≤ 60000 ms" in result.stdout
    sent = generations(server)
    assert len(sent) == 12 + 2, "with two before the run"
    assert all(5 <= len(x.prompt.token_ids.ids) <= 9 for x in sent)
    assert {x.sampling_params.max_tokens for x in sent} == {4}


def test_json_has_the_conditions_and_the_figures(server: FakeServer) -> None:
    result = bench("--requests", "3", "--rate", "inf", "--output", "2", "--json", "--warmup", "0")
    assert result.exit_code == ExitCode.DONE, result.output
    found = json.loads(result.stdout)
    assert found["complete"] == 3
    assert found["output_tokens"] == 6
    assert found["timings"]["ttft"]["count"] == 3
    assert found["conditions"]["load"]["rate"] is None, "infinity is none in JSON"
    assert found["conditions"]["workload"]["output"] == "2"
    assert len(generations(server)) == 3


@pytest.fixture
def refusals(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each of the next generations is refused."""
    answer, planned = server.events, list[bool]()

    def events(*arguments: Any) -> Any:
        if planned and planned.pop(0):
            server.fail(OverCapacityError("the queue is full", reason="QUEUE_FULL"))
        return answer(*arguments)

    monkeypatch.setattr(server, "events", events)
    return planned


def test_some_failures_are_shown_by_kind(server: FakeServer, refusals: list[bool]) -> None:
    refusals += [True, False, True]
    result = bench("--requests", "5", "--warmup", "0", "--concurrency", "1", "--output", "2")
    assert result.exit_code == ExitCode.DONE
    assert "3 of 5 requests" in result.stdout
    assert "failed: 2 × OverCapacityError QUEUE_FULL: the queue is full" in result.stdout


def test_a_run_without_any_reply_fails(server: FakeServer, refusals: list[bool]) -> None:
    refusals += [True] * 3
    result = bench("--requests", "3", "--warmup", "0")
    assert result.exit_code == ExitCode.FAILED
    assert "failed: 3 × OverCapacityError QUEUE_FULL: the queue is full" in result.stdout


def test_a_server_that_refuses_the_warm_up_is_not_measured(
    server: FakeServer, refusals: list[bool]
) -> None:
    refusals += [True]
    result = bench("--requests", "3", "--warmup", "1")
    assert result.exit_code == ExitCode.FAILED
    assert "the server does not reply: the queue is full" in " ".join(result.stderr.split())
    assert len(generations(server)) == 1


def test_a_trace_is_replayed(server: FakeServer, tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    rows = [{**MOONCAKE, "timestamp": 5 * number} for number in range(4)]
    trace.write_text("\n".join(map(json.dumps, rows)))
    result = bench("--workload", str(trace), "--warmup", "0", "--scale", "0.5", "--speed", "10")
    assert result.exit_code == ExitCode.DONE, result.output
    prompts = [list(x.prompt.token_ids.ids) for x in generations(server)]
    assert [len(x) for x in prompts] == [600] * 4
    assert {tuple(x[:512]) for x in prompts} == {tuple(prompts[0][:512])}
    assert len({tuple(x) for x in prompts}) == 4


def test_a_sharegpt_file_is_counted_by_the_server(server: FakeServer, tmp_path: Path) -> None:
    file = tmp_path / "share.json"
    turns = [{"value": "one two three four five"}, {"value": "six seven eight nine"}]
    file.write_text(json.dumps([{"conversations": turns}]))
    result = bench("--workload", str(file), "--requests", "1")
    assert result.exit_code == ExitCode.DONE, result.output
    assert generations(server)[-1].prompt.text == "one two three four five"
    assert generations(server)[-1].sampling_params.max_tokens == 4


def test_a_plot(server: FakeServer, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    result = bench("--requests", "4", "--output", "3", "--png", str(tmp_path / "run.png"))
    assert result.exit_code == ExitCode.DONE, result.output
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("--rate", "2", "--concurrency", "3"), "one of --rate and --concurrency"),
        (("--rate", "0"), "must be more than 0"),
        (("--rate", "2", "--burstiness", "0"), "burstiness must be more than 0"),
        (("--input", "many"), "uniform:LOW,HIGH"),
        (("--output", "0"), "uniform:LOW,HIGH"),
        (("--goodput", "p99:3"), "ttft:MS"),
        (("ttft:3",), "--goodput comes first"),
        (("--workload", "shakespeare"), "random, sharegpt, or a file"),
        (("--workload", "none.jsonl"), "cannot read the trace none.jsonl"),
        (("--workload", "none.json"), "cannot read none.json"),
        (("--openai", "localhost:8000"), "http://localhost:8000/v1"),
        (("--endpoint", "embeddings"), "must be completions or chat"),
        (("--png", "/none/a.png"), "/none is not a directory"),
    ],
)
def test_wrong_options_are_named(server: FakeServer, arguments: tuple[str, ...], part: str) -> None:
    result = bench(*arguments)
    assert result.exit_code == ExitCode.USAGE, result.output
    words = " ".join(result.stderr.replace("│", " ").split())
    assert part in words
    assert not generations(server)


def test_no_server_is_one_line() -> None:
    for arguments in (("--target", "127.0.0.1:9"), ("--openai", "http://127.0.0.1:9/v1")):
        result = bench(*arguments)
        assert result.exit_code == ExitCode.UNREACHABLE, result.output
        assert len(result.stderr.strip().splitlines()) == 1, result.stderr
