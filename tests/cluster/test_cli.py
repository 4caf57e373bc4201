"""Commands that call a server: what they print where, and how they end."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import typer
from typer.testing import Result

import kvmesh.client
from kvmesh.client import Client, FakeServer, FakeTransport, KVMeshError
from kvmesh.client import errors as sdk
from kvmesh.cluster.cli import options as cli_options
from kvmesh.cluster.cli.exits import CommandFailed, ExitCode, exit_code_of, friendly_errors
from kvmesh.cluster.errors import StartError
from kvmesh.protos import pb
from kvmesh.workers.errors import ConfigError, EngineError
from tests.client.servicer import (
    Action,
    ScriptedServicer,
    answering,
    delta,
    failing,
    finished,
    serving,
    started,
    usage,
)
from tests.client.test_tls import self_signed
from tests.in_process import run_kvmesh
from tests.repo.imports import ROOT

PATIENCE_S = 300.0  # on a machine with other work
COMMAND_LINE_PAGE = ROOT / "docs/command_line.md"
READS = (
    ("status",),
    ("models",),
    ("loads",),
    ("estimate", "--prompt-tokens", "7"),
    ("explain", "r1"),
    ("tokenize", "a b c"),
    ("detokenize", "3", "1", "2"),
)


def run(*arguments: str, **environ: str) -> Result:
    env = {"COLUMNS": "80", "TERM": "dumb", "KVMESH_API_KEY": None, "KVMESH_TARGET": None}
    return run_kvmesh(arguments, env={**env, **environ})


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeServer:
    """A server without a network, whatever a command's target is."""
    server = FakeServer(["Paris, of course."])

    def connect(*_: object, **__: object) -> Client:
        transport = FakeTransport()
        transport.server = server
        return Client(transport=transport)

    monkeypatch.setattr(kvmesh.client, "Client", connect)
    return server


def output(*reasons: pb.FinishReason.ValueType) -> Action:
    """Streams `Paris`, one choice for each way to end."""

    def act(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        yield started(request)
        for index, reason in enumerate(reasons):
            yield delta(0, "Paris", 5, index=index)
            yield finished(index, reason)
        yield usage(prompt_tokens=1, completion_tokens=1)

    return act


@pytest.mark.parametrize("command", READS)
def test_results_as_json_are_all_that_is_on_stdout(
    fake: FakeServer, command: tuple[str, ...]
) -> None:
    run("generate", "a", "--request-id", "r1")
    result = run(*command, "--json")
    assert result.exit_code == ExitCode.DONE, result.output
    assert json.loads(result.stdout)
    assert not result.stderr
    assert run(*command).exit_code == ExitCode.DONE


def test_top_prints_one_picture_if_nobody_watches(fake: FakeServer) -> None:
    for arguments in (("top", "--once"), ("top",)):
        result = run(*arguments, "--interval", "0.1")
        assert result.exit_code == ExitCode.DONE, result.output
        assert "0 of 0 groups up" in result.stdout and "\x1b" not in result.stdout
    fake.fail(sdk.PermissionDeniedError("this call needs an admin key"))
    refused = run("top", "--once")
    assert refused.exit_code != ExitCode.DONE and "admin key" in refused.stderr


def test_json_has_the_names_of_the_sdk(fake: FakeServer) -> None:
    status = json.loads(run("status", "--json").stdout)
    assert status["model"]["model"] == "fake"
    assert (status["groups"], status["loads"]["router"]["leases"]) == ([], 0)
    assert json.loads(run("models", "--json").stdout) == status.pop("model")
    assert json.loads(run("loads", "--json").stdout) == status
    fake.fail(sdk.PermissionDeniedError("not an admin"))
    own = json.loads(run("loads", "--json").stdout)
    assert (own["loads"], own["tenant"]["tenant"]) == (None, "fake")
    fake.fail(sdk.PermissionDeniedError("not an admin"))
    assert "tenant fake: 0 running" in run("loads").stdout
    tokens = json.loads(run("tokenize", "a b c", "--json").stdout)
    assert tokens == {"token_ids": [0, 1, 2], "max_model_len": 8192}
    assert "3 tokens; the context holds 8192\n0 1 2\n" in run("tokenize", "a b c").stdout
    estimate = json.loads(run("estimate", "a b", "--json").stdout)
    assert (estimate["prompt_tokens"], estimate["feasible_now"]) == (2, True)


def test_generate_prints_its_result_as_json(fake: FakeServer) -> None:
    result = run("generate", "hi", "--json", "--request-id", "r1", "--max-tokens", "4")
    completion = json.loads(result.stdout)
    assert completion["request_id"] == "r1"
    assert completion["choices"][0]["text"] == "Paris, of course."
    assert completion["choices"][0]["finish_reason"] == "stop"
    assert not result.stderr
    (request,) = fake.requests
    assert (request.request_id, request.sampling_params.max_tokens) == ("r1", 4)


def test_options_of_generate_reach_the_server(fake: FakeServer) -> None:
    options = ("--special-tokens", "--include-stop", "--stop", ".", "--prompt-logprobs", "2")
    printed = json.loads(run("generate", "a b c", "--json", *options, "--max-tokens", "0").stdout)
    sent = fake.requests[-1].sampling_params
    assert (sent.skip_special_tokens, sent.include_stop_str_in_output) == (False, True)
    assert (list(sent.stop), sent.prompt_logprobs, sent.max_tokens) == (["."], 2, 0)
    assert [x["chosen"]["token_id"] for x in printed["prompt_logprobs"]] == [1, 2]
    run("generate", "a b c")
    assert not fake.requests[-1].sampling_params.ListFields(), "the server's defaults"
    assert run("generate", "a", "--stop", "course", "--include-stop").stdout == "Paris, of course\n"


def test_status_shows_what_requests_get_that_set_nothing(fake: FakeServer) -> None:
    assert "defaults: temperature 0.7, top_k 20, max_tokens 256" in run("status").stdout


def test_abort_says_whether_there_was_such_a_request(fake: FakeServer) -> None:
    result = run("abort", "r1", "--json")
    assert json.loads(result.stdout) == {"request_id": "r1", "aborted": False}
    assert json.loads(result.stderr)["error"]["exit_code"] == result.exit_code == ExitCode.FAILED
    result = run("abort", "r1")
    assert "no request r1 of this key" in result.stderr and not result.stdout
    fake.open_streams = 1
    result = run("abort", "r1")
    assert (result.exit_code, result.stdout) == (ExitCode.DONE, "aborted r1\n")


def wire(code: grpc.StatusCode, reason: str, **fields: Any) -> pb.Error:
    value = pb.ErrorReason.Value(f"ERROR_REASON_{reason}")
    return pb.Error(code=code.value[0], reason=value, message="because", **fields)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (wire(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD"), ExitCode.REFUSED),
        (wire(grpc.StatusCode.UNAUTHENTICATED, "WRONG_KEY"), ExitCode.REFUSED),
        (wire(grpc.StatusCode.PERMISSION_DENIED, "NOT_ALLOWED"), ExitCode.REFUSED),
        (wire(grpc.StatusCode.NOT_FOUND, "UNKNOWN_MODEL"), ExitCode.REFUSED),
        (wire(grpc.StatusCode.ALREADY_EXISTS, "DUPLICATE_REQUEST_ID"), ExitCode.REFUSED),
        (
            wire(grpc.StatusCode.FAILED_PRECONDITION, "NEVER_FITS", needed_bytes=5),
            ExitCode.REFUSED,
        ),
        # So late that the SDK does not wait for it.
        (
            wire(grpc.StatusCode.RESOURCE_EXHAUSTED, "OVER_CAPACITY", retry_after_s=1e6),
            ExitCode.REFUSED,
        ),
        (wire(grpc.StatusCode.UNAVAILABLE, "DRAINING", retry_after_s=1e6), ExitCode.UNREACHABLE),
        (wire(grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_UNREACHABLE"), ExitCode.DEADLINE),
        (wire(grpc.StatusCode.INTERNAL, "INTERNAL"), ExitCode.FAILED),
    ],
    ids=lambda x: pb.ErrorReason.Name(x.reason) if isinstance(x, pb.Error) else x.name,
)
def test_an_error_of_the_server_has_an_exit_code_and_is_one_line(
    error: pb.Error, expected: ExitCode
) -> None:
    error.request_id = "r1"
    with serving(ScriptedServicer(failing(error))) as target:
        result = run("generate", "hi", "--target", target, "--api-key", "k")
        assert result.exit_code == expected
        assert not result.stdout.strip()
        (line,) = result.stderr.splitlines()
        assert line.startswith("error: because") and "(request r1)" in line
        result = run("generate", "hi", "--target", target, "--api-key", "k", "--json")
        assert result.exit_code == expected
        assert not result.stdout
        (line,) = result.stderr.splitlines()
        fields = json.loads(line)["error"]
    assert fields["exit_code"] == expected
    assert fields["reason"] == pb.ErrorReason.Name(error.reason).removeprefix("ERROR_REASON_")
    assert fields["message"] == "because" and fields["request_id"] == "r1"
    assert fields.get("needed_bytes") == (error.needed_bytes or None)


def test_every_error_of_the_sdk_has_an_exit_code() -> None:
    def below(kind: type[KVMeshError]) -> Iterator[type[KVMeshError]]:
        yield kind
        for child in kind.__subclasses__():
            yield from below(child)

    codes = {kind: exit_code_of(kind("x")) for kind in below(KVMeshError)}
    assert None not in codes.values()
    assert codes[sdk.UnavailableError] == ExitCode.UNREACHABLE
    assert codes[sdk.DeadlineExceededError] == ExitCode.DEADLINE
    assert codes[sdk.CredentialsError] == codes[sdk.OverCapacityError] == ExitCode.REFUSED
    assert codes[sdk.ProtocolError] == codes[KVMeshError] == ExitCode.FAILED
    assert exit_code_of(ConfigError("f", "m")) == ExitCode.USAGE
    assert exit_code_of(EngineError("m")) == exit_code_of(StartError("m")) == ExitCode.FAILED
    assert exit_code_of(KeyError("a bug")) is None


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli_options, "CONNECT_S", 0.2)


@pytest.mark.usefixtures("impatient")
def test_a_server_that_is_not_there_is_unreachable() -> None:
    result = run("status", "--target", "localhost:1", "--api-key", "k")
    assert result.exit_code == ExitCode.UNREACHABLE
    assert "is `kvmesh serve` running there?" in result.stderr


@pytest.mark.parametrize(
    ("reason", "expected", "text"),
    [
        (pb.FINISH_REASON_LENGTH, ExitCode.DONE, ""),
        (pb.FINISH_REASON_ABORT, ExitCode.FAILED, "was aborted"),
        (pb.FINISH_REASON_DEADLINE, ExitCode.DEADLINE, "ran out"),
    ],
)
def test_output_that_is_not_complete_is_no_success(
    reason: pb.FinishReason.ValueType, expected: ExitCode, text: str
) -> None:
    with serving(ScriptedServicer(output(reason))) as target:
        for extra in ((), ("--json",)):
            result = run("generate", "hi", "--target", target, "--api-key", "k", *extra)
            assert result.exit_code == expected
            assert "Paris" in result.stdout and text in result.stderr


def test_a_command_has_a_time_limit() -> None:
    hung = threading.Event()

    def hang(request: Any, context: grpc.ServicerContext) -> Any:
        hung.wait(PATIENCE_S)
        return pb.TokenizeResponse()

    with serving(ScriptedServicer(hang)) as target:
        result = run("tokenize", "hi", "--target", target, "--api-key", "k", "--timeout", "0.2")
        hung.set()
    assert result.exit_code == ExitCode.DEADLINE


def test_the_key_may_come_from_a_file(tmp_path: Path) -> None:
    servicer = ScriptedServicer(answering(pb.TokenizeResponse()))
    path = tmp_path / "key"
    path.write_text("secret\n")
    path.chmod(0o600)
    with serving(servicer) as target:
        options = ("tokenize", "hi", "--target", target, "--api-key-file")
        assert run(*options, str(path)).exit_code == ExitCode.DONE
        assert servicer.metadata[0]["authorization"] == "Bearer secret"
        path.chmod(0o644)
        assert "is open to others" in run(*options, str(path)).stderr
        missing = run(*options, str(tmp_path / "missing"))
        both = run(*options, str(path), "--api-key", "other")
    for result in (missing, both):
        assert result.exit_code == ExitCode.USAGE
        assert "--api-key-file" in result.stderr
    assert len(servicer.requests) == 1


@pytest.mark.usefixtures("impatient")
def test_the_connection_may_be_encrypted(tmp_path: Path) -> None:
    server, client = self_signed("localhost"), self_signed("client")
    files = {"ca": server.cert, "cert": client.cert, "key": client.key}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    credentials = grpc.ssl_server_credentials(
        [(server.key, server.cert)], client.cert, require_client_auth=True
    )
    servicer = ScriptedServicer(answering(pb.TokenizeResponse()))
    with serving(servicer, credentials=credentials) as target:
        options = ("tokenize", "hi", "--target", target, "--api-key", "k")
        trusted = (*options, "--tls-ca-file", str(tmp_path / "ca"))
        identity = ("--tls-cert-file", str(tmp_path / "cert"), "--tls-key-file")
        result = run(*trusted, *identity, str(tmp_path / "key"))
        assert result.exit_code == ExitCode.DONE, result.output
        assert run(*options, "--tls").exit_code == ExitCode.UNREACHABLE
        missing = run(*trusted, *identity, str(tmp_path / "missing"))
    assert missing.exit_code == ExitCode.REFUSED and "cannot read" in missing.stderr
    assert len(servicer.requests) == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ("--no-such-option",),
        ("no-such-command",),
        ("generate",),
        ("generate", "hi", "--max-tokens", "many"),
        ("estimate",),
        ("estimate", "a", "--prompt-tokens", "3"),
        ("formats", "--page-size", "48"),
        ("simulate", "--groups", "none"),
        ("eval", "recall"),
    ],
)
def test_wrong_arguments_are_usage_errors(arguments: tuple[str, ...]) -> None:
    result = run(*arguments)
    assert result.exit_code == ExitCode.USAGE
    assert "Usage:" in result.stderr and not result.stdout
    result = run(*arguments[:1], "--json", *arguments[1:])
    assert result.exit_code == ExitCode.USAGE and not result.stdout
    assert json.loads(result.stderr)["error"]["exit_code"] == ExitCode.USAGE


def test_json_in_a_prompt_is_not_an_option(fake: FakeServer) -> None:
    fake.fail(sdk.InvalidRequestError("wrong"))
    assert run("generate", "--", "--json").stderr == "error: wrong\n"


def test_the_version_and_the_exit_codes_are_shown() -> None:
    assert run("--version").stdout.startswith("kvmesh 0.")
    shown = run("--help").stdout
    for code in ExitCode:
        assert f" {code} {code.meaning[:40]}" in shown
    documented = COMMAND_LINE_PAGE.read_text("utf-8")
    for code in ExitCode:
        assert f"| {code} | {code.meaning} |" in documented


def test_quiet_leaves_results_and_errors(fake: FakeServer) -> None:
    for command in (("--quiet", "loads"), ("loads", "--quiet"), ("loads", "-q")):
        result = run(*command)
        assert "router: 0 of 0 waiting" in result.stdout and not result.stderr
    fake.fail(sdk.InvalidRequestError("wrong"))
    assert run("loads", "--quiet").stderr == "error: wrong\n"


def start(*arguments: str, **options: Any) -> subprocess.Popen[bytes]:
    """A command in its own process."""
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "KVMESH_API_KEY": "k"}
    environ |= options.pop("environ", {})
    code = "from kvmesh.cluster.cli import main; main()"
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments], env=environ, stderr=subprocess.PIPE, **options
    )


@pytest.mark.parametrize(("encoding", "shown"), [("latin-1", "?\xa0? ü"), ("utf-8", "東\xa0京 ü")])
def test_a_text_is_shown_as_far_as_the_locale_has_it(encoding: str, shown: str) -> None:
    def act(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        yield started(request)
        yield delta(0, "東\xa0京", 1)
        yield delta(1, " ü", 2)
        yield finished()
        yield usage()

    environ = {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    with (
        serving(ScriptedServicer(act)) as target,
        start("generate", "hi", "--target", target, stdout=subprocess.PIPE, environ=environ)
        as process,
    ):  # fmt: skip
        written, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == ExitCode.DONE, errors
    assert written.decode(encoding).strip() == shown


def hanging(seen: threading.Event) -> Action:
    """Sends a token, and then nothing until the call ends."""

    def act(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        ended = threading.Event()
        context.add_callback(ended.set)
        yield started(request)
        yield delta(0, "Paris", 5)
        seen.set()
        ended.wait(PATIENCE_S)

    return act


def test_ctrl_c_ends_a_generation_on_the_server_too() -> None:
    seen = threading.Event()
    servicer = ScriptedServicer(hanging(seen))
    with (
        serving(servicer) as target,
        start("generate", "hi", "--target", target, stdout=subprocess.PIPE) as process,
    ):
        assert seen.wait(PATIENCE_S)
        assert process.stdout is not None
        assert process.stdout.read(5) == b"Paris"
        process.send_signal(signal.SIGINT)
        written, errors = process.communicate(timeout=PATIENCE_S)
        assert servicer.ended.wait(PATIENCE_S)
    assert (written, errors, process.returncode) == (b"\n", b"", ExitCode.INTERRUPTED)


@pytest.mark.parametrize("arguments", [("formats",), ("formats", "--json"), ("config",)])
def test_a_reader_that_ends_early_is_no_error(arguments: tuple[str, ...]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with start(*arguments, stdout=writer) as process:
        os.close(writer)
        _, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == ExitCode.BROKEN_PIPE
    assert errors == b""


def test_a_reader_that_ends_early_ends_the_generation() -> None:
    stop = threading.Event()

    def act(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        yield started(request)
        for position in range(1_000_000):
            if stop.is_set() or not context.is_active():
                return
            yield delta(position, "x" * 1000, position)

    servicer = ScriptedServicer(act)
    with (
        serving(servicer) as target,
        start("generate", "hi", "--target", target, stdout=subprocess.PIPE) as process,
    ):
        assert process.stdout is not None
        assert process.stdout.read(1) == b"x"
        process.stdout.close()
        assert process.wait(PATIENCE_S) == ExitCode.BROKEN_PIPE
        stop.set()
        assert servicer.ended.wait(PATIENCE_S)
        assert process.stderr is not None
        assert process.stderr.read() == b""


def test_a_bug_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object, **options: object) -> Callable[[], None]:
        raise KeyError("a bug")

    monkeypatch.setattr(kvmesh.client, "Client", broken)
    assert isinstance(run("loads").exception, KeyError)


def test_what_cannot_be_answered_is_no_success(
    fake: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A script sees it by the exit code, and has what there is on stdout all the same."""
    result = run("explain", "never-sent", "--json")
    assert result.exit_code == ExitCode.FAILED
    assert json.loads(result.stdout)["decisions"] == []
    assert "never-sent is not known" in result.stderr
    never = pb.EstimateBudgetResponse(prompt_tokens=10**9)
    monkeypatch.setattr(fake, "unary", lambda *_: never)
    result = run("estimate", "--prompt-tokens", "1000000000")
    assert result.exit_code == ExitCode.REFUSED
    assert "no group could hold the request" in result.stderr


def test_a_prompt_comes_from_a_file_or_from_stdin(fake: FakeServer, tmp_path: Path) -> None:
    text = "the first line\nand the second, wörtlich\n"
    file = tmp_path / "prompt.txt"
    file.write_text(text, "utf-8")
    for arguments, stdin in ((("--file", str(file)), None), (("--file", "-"), text), ((), text)):
        result = run_kvmesh(("generate", *arguments), input=stdin)
        assert result.exit_code == ExitCode.DONE, result.output
        assert fake.requests[-1].prompt.text == text


@pytest.mark.parametrize(
    ("arguments", "stdin", "message"),
    [
        (("a", "--file", "b"), None, "one of PROMPT and --file"),
        (("--file", "nowhere.txt"), None, "cannot read nowhere.txt: No such file"),
        (("--file", "-"), b"ab\xff", "stdin must be text in UTF-8; byte 2 is not"),
    ],
)
def test_a_prompt_that_cannot_be_read_is_a_usage_error(
    fake: FakeServer, arguments: tuple[str, ...], stdin: bytes | None, message: str
) -> None:
    result = run_kvmesh(("generate", *arguments), input=stdin)
    assert result.exit_code == ExitCode.USAGE
    assert message in result.stderr
    assert not fake.requests


def test_a_chat_without_a_terminal_has_a_message_a_line(fake: FakeServer) -> None:
    """However long it is: a terminal's own line would be cut after 4,095 bytes."""
    long = "word " * 2_000
    result = run_kvmesh(("chat",), input=f"hello\n\n{long}\n")
    assert result.exit_code == ExitCode.DONE, result.output
    said = [[message.content for message in x.prompt.chat.messages] for x in fake.requests]
    assert said == [["hello"], ["hello", "Paris, of course.", long.strip()]]


def test_generate_sends_what_the_output_must_match(fake: FakeServer, tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "object"}')
    grammar = tmp_path / "answer.lark"
    grammar.write_text('start: "a"')
    for options, kind, value in (
        (["--json-schema", str(schema)], "json_schema", '{"type": "object"}'),
        (["--json-schema", '{"type": "null"}'], "json_schema", '{"type": "null"}'),
        (["--json-object"], "json_object", True),
        (["--regex", "a+"], "regex", "a+"),
        (["--grammar", str(grammar)], "grammar", 'start: "a"'),
        (["--choice", "a", "--choice", "b"], "choice", pb.OutputChoices(values=["a", "b"])),
    ):
        assert run("generate", "hi", *options).exit_code == 0
        sent = fake.requests[-1].structured_output
        assert (sent.WhichOneof("kind"), getattr(sent, kind)) == (kind, value)


def test_generate_takes_one_kind_of_structured_output(fake: FakeServer) -> None:
    both = run("generate", "hi", "--regex", "a", "--json-object")
    assert (both.exit_code, fake.requests) == (2, [])
    missing = run("generate", "hi", "--grammar", "/no/such/file")
    assert (missing.exit_code, fake.requests) == (2, [])
    assert "/no/such/file cannot be read" in missing.stderr


class ClosedPipe(io.StringIO):
    """Standard output whose reader has ended, which only a flush notices."""

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self._descriptor = descriptor

    def flush(self) -> None:
        raise BrokenPipeError

    def fileno(self) -> int:
        return self._descriptor


def test_what_is_still_buffered_for_a_closed_pipe_ends_as_such(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (tmp_path / "out").open("wb") as file:
        monkeypatch.setattr(sys, "stdout", ClosedPipe(file.fileno()))
        with pytest.raises(typer.Exit) as caught, friendly_errors():
            print("buffered")
        assert caught.value.exit_code == ExitCode.BROKEN_PIPE
        file.write(b"nowhere")
    assert not (tmp_path / "out").read_bytes(), "the rest goes nowhere"


def test_an_error_while_ctrl_c_is_handled_is_ctrl_c() -> None:
    """As where it comes in the middle of a lock's own code."""
    with pytest.raises(KeyboardInterrupt), friendly_errors():
        try:
            raise KeyboardInterrupt
        finally:
            try:
                threading.Lock().release()  # RuntimeError
            finally:
                raise CommandFailed("closing failed")
    with pytest.raises(typer.Exit) as caught, friendly_errors():
        raise CommandFailed("not interrupted")
    assert caught.value.exit_code == ExitCode.FAILED
