"""`kvmesh run` with an engine on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from kvmesh.cluster.cli.exits import ExitCode
from tests.cluster.batch.test_batch_run import Files, asking
from tests.cluster.offline.tiny_llm import ENGINE, GREEDY, tiny_llm
from tests.in_process import run_kvmesh
from tests.workers.structured.tiny import model_path

SETTINGS = [f"--set=engine.{name}={value}" for name, value in ENGINE.items()]


def run(*arguments: str, **options: Any) -> Result:
    env = {"COLUMNS": "80", "TERM": "dumb", "KVMESH_API_KEY": None}
    return run_kvmesh(["run", *arguments], env=env, **options)


def run_here(files: Files, *more: str) -> Result:
    named = ["--input", str(files.source), "--output", str(files.target)]
    return run(*named, "--model", str(model_path()), *SETTINGS, *more)


@pytest.mark.slow
def test_answers_are_those_of_an_llm(tmp_path: Path) -> None:
    files = Files(tmp_path)
    body = {"max_tokens": 6, **GREEDY}
    chat = [{"role": "user", "content": "The ranks?"}]
    url = "/v1/chat/completions"
    lines = [asking(f"r{n}", body={"prompt": f"prompt {n}", **body}) for n in range(12)]
    lines += [asking("chat", url=url, body={"messages": chat, "max_tokens": 6, **GREEDY})]
    lines += [asking("response", url="/v1/responses", body={"input": "x", "max_output_tokens": 3})]
    files.ask(lines)
    result = run_here(files)
    assert result.exit_code == ExitCode.DONE, result.output
    assert f"14 of 14 answered in {files.target}" in result.stderr
    found = {x["custom_id"]: x["response"]["body"] for x in files.results}
    with tiny_llm() as llm:
        expected = llm.generate([f"prompt {n}" for n in range(12)], max_tokens=6, **GREEDY)
        answer = llm.chat(chat, max_tokens=6, **GREEDY)
    for n, completion in enumerate(expected):
        assert found[f"r{n}"]["choices"][0]["text"] == completion.text
    assert found["chat"]["choices"][0]["message"]["content"] == answer.text
    assert found["response"]["usage"]["output_tokens"] == 3
    assert "14 of 14 answered already" in run_here(files).stderr

    files.ask([*lines, asking("long", "z" * 3000), "{"])
    again = run_here(files)
    assert again.exit_code == ExitCode.FAILED
    assert "2 of 16 answers are errors" in again.stderr
    long = files.by_id()["long"]["response"]
    assert (long["status_code"], long["body"]["error"]["code"]) == (400, "context_length_exceeded")


def test_stdin_and_stdout_are_files_too(tmp_path: Path) -> None:
    line = json.dumps(asking("a", url="/v1/embeddings"))
    settings = ["--model", str(model_path()), *SETTINGS]
    result = run("-i", "-", "-o", str(tmp_path / "out"), *settings, input=line)
    assert result.exit_code == ExitCode.FAILED
    assert "1 of 1 answers are errors" in result.stderr
    assert "unsupported_url" in (tmp_path / "out").read_text()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("--model", "/nowhere"), ExitCode.USAGE, "is not a model"),
        (("--kv-format", "int9"), ExitCode.USAGE, "engine.kv_format"),
        (("--address", "127.0.0.1:1"), ExitCode.UNREACHABLE, "does not answer as OpenAI's API"),
        (("--address", "h:1", "--tp", "2"), ExitCode.USAGE, "that server's settings"),
        (("--address", "h:1", "--api-key-file", "/no"), ExitCode.USAGE, "there is no file /no"),
        (("--output", "{source}"), ExitCode.USAGE, "is the input"),
        (("--output", "/dev/full/x"), ExitCode.FAILED, "cannot write /dev/full/x"),
        (("--input", "/nowhere"), ExitCode.FAILED, "cannot read /nowhere"),
    ],
)
def test_what_cannot_be_done_has_an_exit_code(
    tmp_path: Path, arguments: tuple[str, ...], code: ExitCode, words: str
) -> None:
    files = Files(tmp_path)
    files.ask([asking("a")])
    arguments = tuple(x.format(source=files.source) for x in arguments)
    result = run("-i", str(files.source), "-o", str(files.target), *arguments)
    assert result.exit_code == code, result.output
    assert words in " ".join(result.stderr.replace("│", " ").split())
    assert "Traceback" not in result.output
