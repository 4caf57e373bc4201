"""What the command line shows while a stream has no output yet."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator

import pytest
from rich.console import Console

import kvmesh.client
from kvmesh.client import Client, Delta, FakeTransport, Prefilling, Queued, Started, StreamEvent
from kvmesh.cluster.cli.console import human_wait
from kvmesh.cluster.cli.wait_display import WaitDisplay
from tests.in_process import run_kvmesh

WAITS = (Queued(3, 75.3), Queued(1, None), Queued(0, 0.2), Prefilling(1 << 19, 1024, 1 << 20))


def shown(*events: StreamEvent, terminal: bool = True) -> tuple[str, list[str]]:
    """All that was written, and the text of each frame."""
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, width=120, color_system=None)
    frames = []
    with WaitDisplay(console) as display:
        for event in events:
            before = len(file.getvalue())
            display.show(event)
            if display._live is not None and display._live.is_started:
                display._live.refresh()
            frames.append(re.sub(r"\x1b\[[0-9?]*[A-Za-z]", "", file.getvalue()[before:]))
    return file.getvalue(), frames


def test_the_queue_and_the_prompt_are_shown() -> None:
    _, frames = shown(*WAITS)
    assert "waiting for room: 3 requests ahead, about 1 min 15 s" in frames[0]
    assert "waiting for room: 1 request ahead" in frames[1]
    assert "about" not in frames[1]
    assert "waiting for room: next in line, about 1 s" in frames[2]
    assert "524,288 of 1,048,576 tokens (1,024 cached)" in frames[3]
    assert "━" in frames[3]


def test_the_line_of_the_queue_is_gone_once_the_request_has_started() -> None:
    started = Started("r", "m", "v", "g0", "int8", 7, 2048, 3, 4, 5)
    assert "0 of 2,048 tokens" in shown(Queued(0, None), started)[1][1]
    assert shown(started)[0] == ""


def test_everything_is_erased_before_the_output_and_nothing_is_shown_after_it() -> None:
    written, frames = shown(*WAITS, Delta(0, "Paris"), *WAITS)
    assert frames[5:] == [""] * len(WAITS)
    assert written.rstrip().endswith("\x1b[2K")  # the line is cleared
    assert written.count("\x1b[?25l") == written.count("\x1b[?25h")  # and the cursor is back


def test_nothing_is_written_without_a_terminal_or_a_wait() -> None:
    assert shown(*WAITS, Delta(0, "Paris"), terminal=False)[0] == ""
    assert shown(Delta(0, "Paris"))[0] == ""


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeTransport]:
    transport = FakeTransport(["Paris, of course."])
    transport.server.wait(*WAITS)
    monkeypatch.setattr(kvmesh.client, "Client", lambda *_, **__: Client(transport=transport))
    yield transport
    assert transport.server.open_streams == 0


@pytest.mark.parametrize("command", [["generate", "hi"], ["chat"]])
def test_piped_commands_print_the_text_alone(fake: FakeTransport, command: list[str]) -> None:

    result = run_kvmesh(command, input="hi\n\n")
    assert result.exit_code == 0
    assert "Paris, of course.\n" in result.stdout
    assert "ahead" not in result.output
    assert "tokens" not in result.output


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.0, "1 s"), (59.4, "59 s"), (59.6, "1 min 0 s"), (75.3, "1 min 15 s")]
)
def test_waits_are_in_whole_seconds(seconds: float, text: str) -> None:
    assert human_wait(seconds) == text
