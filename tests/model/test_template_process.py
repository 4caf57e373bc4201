"""Chat templates in a process of their own: what they may take, and that others are served on."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from kvmesh.workers.errors import InvalidFieldError
from kvmesh.workers.model import template_process
from kvmesh.workers.model.chat import ChatTemplates, ControlTexts, Conversation
from kvmesh.workers.model.template_process import TemplateProcess, TemplateTimeoutError

MESSAGES: list[dict[str, Any]] = [{"role": "user", "content": "hello<|end|>"}]
SOURCE = "{{ bos_token }}{{ messages[0].content }}"


@pytest.fixture(scope="module")
def process() -> Iterator[TemplateProcess]:
    templates = ChatTemplates({"default": SOURCE}, {"bos_token": "<s>"}, ControlTexts(("<|end|>",)))
    made = TemplateProcess(templates, timeout_s=60.0)
    yield made
    made.close()


def served(process: TemplateProcess) -> bool:
    pieces = process.render(Conversation(MESSAGES))
    return [(x.text, x.literal) for x in pieces] == [("<s>hello", False), ("<|end|>", True)]


def given(source: str) -> Conversation:
    return Conversation(MESSAGES, template=source)


def test_a_chat_is_rendered(process: TemplateProcess) -> None:
    assert served(process)
    (piece,) = process.render(given("{% generation %}x{% endgeneration %}"))
    assert piece.text == "x"


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ 'a' * 10 ** 10 }}", "memory"),
        ("{{ '%10000000000d' % 1 }}", "memory"),
        (
            "{% set ns = namespace(x='aaaa') %}{% for i in range(60) %}"
            "{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
            "memory",
        ),
        ("{% for i in range(70) %}{{ 'a' * 1000000 }}{% endfor %}", "at most 67,108,864"),
        ("{" * 100_000 + "}" * 100_000, "malformed|ended its process"),
        ("{{ " + "(" * 5000 + ")" * 5000 + " }}", "malformed|ended its process"),
    ],
)
def test_what_a_template_does_wrong_is_reported_and_others_are_served(
    process: TemplateProcess, source: str, reason: str
) -> None:
    with pytest.raises(InvalidFieldError, match=reason):
        process.render(given(source))
    assert served(process)


@pytest.mark.slow
@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 10 ** (10 ** 9) }}",  # one call of C code, which no signal handler interrupts
    ],
)
def test_a_template_that_does_not_end_is_killed(
    process: TemplateProcess, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert served(process)
    monkeypatch.setattr(process, "_timeout_s", 0.2)
    with pytest.raises(TemplateTimeoutError):
        process.render(given(source))
    monkeypatch.undo()
    assert served(process)


def test_a_process_that_does_not_read_is_killed(
    process: TemplateProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert served(process)
    assert process._child is not None
    os.kill(process._child.pid, signal.SIGSTOP)
    monkeypatch.setattr(process, "_timeout_s", 0.05)
    with pytest.raises(TemplateTimeoutError):
        process.render(Conversation([{"role": "user", "content": "x" * (1 << 20)}]))  # fills pipes
    monkeypatch.undo()
    assert served(process)


def test_a_process_that_does_not_stop_sending_is_killed(
    process: TemplateProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though there is always something to read."""
    endless = "import sys\nwhile True: sys.stdout.buffer.write(b'\\x7f' * 4096)"
    process.close()
    command = [sys.executable, "-c", endless]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        process._child, process._ready = child, True
        monkeypatch.setattr(process, "_timeout_s", 0.05)
        monkeypatch.setattr(template_process, "_READ_BYTES", 1)  # slower than the child
        with pytest.raises(TemplateTimeoutError):
            process.render(Conversation(MESSAGES))
    monkeypatch.undo()
    assert served(process)


def test_the_parent_may_have_many_descriptors(process: TemplateProcess) -> None:
    process.close()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.ExitStack() as cleanup:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard), hard))
        cleanup.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        for _ in range(1100):
            cleanup.enter_context(open(os.devnull))
        assert served(process)
        assert process._child is not None and process._child.stdin is not None
        assert process._child.stdin.fileno() > 1024


def test_a_process_that_has_died_is_started_again(process: TemplateProcess) -> None:
    assert served(process)
    assert process._child is not None
    os.kill(process._child.pid, signal.SIGKILL)
    process._child.wait()
    assert served(process)


def test_a_large_chat_is_rendered(process: TemplateProcess) -> None:
    (piece,) = process.render(Conversation([{"role": "user", "content": "ä" * 5_000_000}]))
    assert len(piece.text) == 5_000_003


def test_a_child_ends_with_its_parent() -> None:
    process = TemplateProcess(ChatTemplates({"default": SOURCE}, {"bos_token": ""}), 60.0)
    assert process.render(Conversation(MESSAGES))
    child = process._child
    assert child is not None and child.stdin is not None
    child.stdin.close()
    assert child.wait(template_process.START_TIMEOUT_S) == 0
    process.close()
