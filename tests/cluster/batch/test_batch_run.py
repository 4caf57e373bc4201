"""Files of requests and answers: what is read, written, continued and refused."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kvmesh.cluster.batch import run as run_module
from kvmesh.cluster.batch.errors import BatchRunError
from kvmesh.cluster.batch.output_file import OutputFile
from tests.cluster.batch.echo_run import EchoAnswers, echo
from tests.repo.imports import ROOT


def asking(custom_id: Any, prompt: Any = "p", **fields: Any) -> dict[str, Any]:
    line = {"custom_id": custom_id, "method": "POST", "url": "/v1/completions"}
    return {**line, "body": {"prompt": prompt}, **fields}


class Files:
    def __init__(self, directory: Path) -> None:
        self.source = directory / "requests.jsonl"
        self.target = directory / "results.jsonl"

    def ask(self, lines: Sequence[Any]) -> None:
        """lines: JSON, or text as it is"""
        texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        self.source.write_text("".join(f"{text}\n" for text in texts))

    async def run(self, answers: EchoAnswers | None = None) -> run_module.RunCounts:
        return await echo(str(self.source), str(self.target), answers)

    @property
    def results(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.target.read_text().splitlines()]

    def by_id(self) -> dict[str, dict[str, Any]]:
        found = {line["custom_id"]: line for line in self.results}
        assert len(found) == len(self.results)
        return found


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


async def test_every_line_gets_an_answer(files: Files) -> None:
    files.ask([asking(f"r{n}", f"prompt {n}") for n in range(50)])
    counts = await files.run()
    assert (counts.lines, counts.done, counts.failed, counts.tokens) == (50, 50, 0, 100)
    for n in range(50):
        line = files.by_id()[f"r{n}"]
        assert line["response"]["status_code"] == 200 and line["error"] is None
        assert line["response"]["body"]["prompt"] == f"prompt {n}"
        assert line["response"]["request_id"] == line["id"]


async def test_equal_beginnings_follow_each_other(files: Files) -> None:
    files.ask([asking(f"{n % 5}-{n}", f"{n % 5} " * 200 + str(n)) for n in range(40)])
    answers = EchoAnswers()
    await files.run(answers)
    groups = [custom_id[0] for custom_id in answers.asked]
    assert groups == sorted(groups)


async def test_as_many_are_asked_at_once_as_wanted(files: Files) -> None:
    together = asyncio.Barrier(4)

    class Together(EchoAnswers):
        async def answer(self, request: Any) -> Any:
            await together.wait()
            return await super().answer(request)

    files.ask([asking(f"r{n}") for n in range(8)])
    assert (await files.run(Together())).done == 8


@pytest.mark.parametrize(
    ("line", "code", "words"),
    [
        ("{not json", "invalid_json", "line 2 is not a JSON object"),
        ("[1]", "invalid_json", "line 2 is not a JSON object"),
        ("[" * 100_000, "invalid_json", "line 2"),
        ('{"custom_id": "\\ud800"}', "invalid_json", "line 2"),
        (asking(7), "invalid_request", "custom_id: must be text, got 7"),
        (asking(""), "invalid_request", "custom_id: must be text"),
        (asking("a", method="GET"), "invalid_request", "method: must be \"POST\", got 'GET'"),
        (asking("a", url="/v1/embeddings"), "unsupported_url", "got '/v1/embeddings'"),
        (asking("a", url=None), "unsupported_url", "url: must be one of /v1/chat"),
        ({"custom_id": "a", "method": "POST", "url": "/v1/completions"}, "invalid_request", "body"),
        (asking("a", body=[]), "invalid_request", "body: must be a JSON object"),
        (asking("a", body={"prompt": "", "stream": True}), "invalid_request", "body.stream"),
        (asking("first"), "duplicate_custom_id", "a line before has the same"),
    ],
)
async def test_a_line_that_asks_nothing_is_answered_with_an_error(
    files: Files, line: Any, code: str, words: str
) -> None:
    files.ask([asking("first"), line, asking("last")])
    for _ in range(2):  # the second finds all answered
        counts = await files.run()
        assert (counts.done, counts.failed, counts.lines) == (3, 1, 3)
    (wrong,) = [found for found in files.results if found["error"] is not None]
    assert wrong["response"] is None and wrong["error"]["code"] == code
    assert words in wrong["error"]["message"]
    assert wrong["custom_id"] in (None, "a", "first")


async def test_a_body_that_is_not_utf_8_is_answered_with_an_error(files: Files) -> None:
    lines = [json.dumps(asking(name)).encode() for name in "ab"]
    wrong = lines[0].replace(b'"body": {', b'"body": {"stream": "\xff", ')
    files.source.write_bytes(b"\n".join([wrong, lines[1]]))
    counts = await files.run()
    assert (counts.done, counts.failed) == (2, 1)
    assert "body: must be a JSON object" in files.by_id()["a"]["error"]["message"]


async def test_errors_of_requests_are_counted_and_stay(files: Files) -> None:
    files.ask([asking("a", "bad"), asking("b")])
    assert (await files.run()).failed == 1
    answers = EchoAnswers()
    assert (await files.run(answers)).failed == 1
    assert answers.asked == []


async def test_blank_lines_and_marks_of_other_systems_are_no_lines(files: Files) -> None:
    lines = [json.dumps(asking("a")), "", "  ", json.dumps(asking("ü"))]
    files.source.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    assert (await files.run()).done == 2
    assert set(files.by_id()) == {"a", "ü"}


async def test_an_empty_input_is_done(files: Files) -> None:
    files.ask([])
    assert (await files.run()).done == 0


# Continuing


async def test_a_torn_last_line_is_answered_again(files: Files) -> None:
    files.ask([asking(f"r{n}") for n in range(10)])
    await files.run()
    whole = files.target.read_bytes()
    lines = whole.splitlines(keepends=True)
    for cut in (1, 30, len(lines[6]) - 1):
        files.target.write_bytes(b"".join(lines[:6]) + lines[6][:cut])
        answers = EchoAnswers()
        counts = await files.run(answers)
        assert (counts.before, counts.answered, len(answers.asked)) == (6, 4, 4)
        assert sorted(files.by_id()) == sorted(f"r{n}" for n in range(10))


def test_killed_runs_lose_and_repeat_nothing(files: Files) -> None:
    """Killed with their output at some size, wherever that cuts; the last one ends by itself."""
    files.ask([asking(f"r{n}", f"prompt {n % 7} {n}") for n in range(3000)])
    files.target.touch()
    command = [sys.executable, "-m", "tests.cluster.batch.echo_run"]
    command += [str(files.source), str(files.target)]
    for goal in (1000, 150_000, 310_001, None):
        process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
        while goal is not None and files.target.stat().st_size < goal:
            assert process.poll() is None
        if goal is not None:
            process.send_signal(signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL
            with files.target.open("ab") as file:
                file.write(b'{"id": "batch_req_')  # a line that was being written
    assert process.wait() == 0
    assert sorted(files.by_id()) == sorted(f"r{n}" for n in range(3000))


async def test_windows_of_the_input_are_read_one_after_another(
    files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "WINDOW_BYTES", 500)
    files.ask([asking(f"r{n}", f"{-n}") for n in range(100)])
    answers = EchoAnswers()
    await files.run(answers)
    assert sorted(files.by_id()) == sorted(f"r{n}" for n in range(100))
    at = [int(custom_id[1:]) for custom_id in answers.asked]
    assert at != sorted(at) and all(abs(n - place) < 10 for place, n in enumerate(at))


async def test_lines_that_were_added_are_answered(files: Files) -> None:
    files.ask([asking("a")])
    await files.run()
    files.ask([asking("a"), asking("b")])
    assert (await files.run()).answered == 1


@pytest.mark.parametrize("read_before", range(5))
async def test_a_refused_line_leaves_its_custom_id_to_a_later_one(
    files: Files, read_before: int
) -> None:
    """In one run, or in two of which the first has read so many lines."""
    lines = [asking("a", method="GET"), asking("a"), asking("a", url=None), asking("a")]
    for read in (read_before, len(lines)):
        files.ask(lines[:read])
        await files.run()
    refused = {
        int(line["id"].split("_")[2]): line["error"] and line["error"]["code"]
        for line in files.results
    }
    assert refused == {
        1: "invalid_request", 2: None, 3: "unsupported_url", 4: "duplicate_custom_id"
    }  # fmt: skip


# Refusals


@pytest.mark.parametrize(
    "other",
    [[asking("a", "else"), asking("b")], [asking("a")], [asking("a"), "", asking("b")], []],
)
async def test_the_output_of_another_input_is_left_as_it_is(files: Files, other: Any) -> None:
    files.ask([asking("a"), asking("b")])
    await files.run()
    before = files.target.read_bytes()
    files.ask(other)
    with pytest.raises(BatchRunError, match="belongs to another input: it answers line"):
        await files.run()
    assert files.target.read_bytes() == before


@pytest.mark.parametrize("content", [b"notes\n", b'{"id": "x", "custom_id": "a"}\n', b"\0\0\n"])
async def test_a_file_that_is_no_output_is_left_as_it_is(files: Files, content: bytes) -> None:
    files.ask([asking("a")])
    files.target.write_bytes(content)
    with pytest.raises(BatchRunError, match=r"is not the output of a run \(line 1\)"):
        await files.run()
    assert files.target.read_bytes() == content


@pytest.mark.parametrize(
    "body", ["[]", "null", '"text"', '{"model": null}', '{"model": "m", "usage": 1}']
)
async def test_replies_in_another_form_are_kept_and_not_counted(files: Files, body: str) -> None:
    files.ask([asking("a"), asking("b")])
    answers = EchoAnswers()
    answers.body = msgspec.Raw(body.encode())
    counts = await files.run(answers)
    assert (counts.answered, counts.failed, counts.tokens) == (2, 0, 0)
    assert files.results[0]["response"]["body"] == json.loads(body)
    again = await files.run()
    assert (again.before, again.answered) == (2, 0)


async def test_the_answers_of_another_model_are_not_added_to(files: Files) -> None:
    files.ask([asking("a", "bad"), asking("b")])
    await files.run()
    output = OutputFile(str(files.target))
    run_module.check_model(output, ["other", "echo"])
    with pytest.raises(BatchRunError, match="has answers of echo, and these would be of other or"):
        run_module.check_model(output, ["other", "third"])
    with pytest.raises(BatchRunError, match="another run is writing"):
        OutputFile(str(files.target))
    output.close()
    OutputFile(str(files.target)).close()


async def test_what_cannot_be_opened_says_why(files: Files, tmp_path: Path) -> None:
    with pytest.raises(BatchRunError, match=r"cannot read .*: No such file or directory"):
        await files.run()
    files.ask([asking("a")])
    for target in (tmp_path / "none" / "results", tmp_path):
        with pytest.raises(BatchRunError, match="cannot write"):
            await echo(str(files.source), str(target))
    with pytest.raises(BatchRunError, match="cannot write /dev/full: No space left on device"):
        await echo(str(files.source), "/dev/full")


async def test_a_full_disk_leaves_whole_lines_and_the_next_run_continues(files: Files) -> None:
    files.ask([asking(f"r{n}") for n in range(100)])
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, before[1]))
        with pytest.raises(BatchRunError, match=r"cannot write .*: File too large"):
            await files.run()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert files.target.read_bytes().endswith(b"\n")
    assert 10 < len(files.by_id()) < 100
    await files.run()
    assert len(files.by_id()) == 100


async def test_an_output_that_may_not_be_on_the_disk_is_reported_and_closed(
    files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(file: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fail)
    files.ask([asking("a")])
    with pytest.raises(BatchRunError, match=r"cannot write .*: Input/output error"):
        await files.run()
    monkeypatch.undo()
    assert (await files.run()).before == 1, "and its lock is free again"


async def test_a_run_that_fails_leaves_what_was_answered(files: Files) -> None:
    class Lost(EchoAnswers):
        async def answer(self, request: Any) -> Any:
            if len(self.asked) == 20:
                raise BatchRunError("the server is lost", unreachable=True)
            return await super().answer(request)

    files.ask([asking(f"r{n}") for n in range(100)])
    with pytest.raises(BatchRunError, match="the server is lost"):
        await files.run(Lost())
    assert 16 <= len(files.by_id()) <= 20
    assert (await files.run()).done == len(files.by_id()) == 100
