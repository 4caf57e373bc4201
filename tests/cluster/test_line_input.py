"""A chat's line editor, with keys as a terminal sends them."""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import PipeInput, create_pipe_input
from prompt_toolkit.output import DummyOutput

from kvmesh.cluster.cli import line_input

UP = "\x1b[A"
ALT_ENTER = "\x1b\r"


@pytest.fixture
def keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[PipeInput]:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    with create_pipe_input() as pipe, create_app_session(input=pipe, output=DummyOutput()):
        yield pipe


def reads(keys: PipeInput, typed: str, read: Callable[[], str]) -> str:
    keys.send_text(typed)
    return read()


def test_a_pasted_text_is_one_message(keys: PipeInput) -> None:
    pasted = "\x1b[200~first paragraph\n\nsecond one\x1b[201~"
    read = line_input.message_reader()
    assert reads(keys, f"{pasted}\r", read) == "first paragraph\n\nsecond one"
    assert reads(keys, f"a{ALT_ENTER}b\r", read) == "a\nb"
    long = "x" * 5_000
    assert reads(keys, f"\x1b[200~{long}\x1b[201~\r", read) == long


def test_messages_are_remembered_for_their_user_alone(keys: PipeInput, tmp_path: Path) -> None:
    reads(keys, "what is KV?\r", line_input.message_reader())
    read = line_input.message_reader()
    assert reads(keys, f"{UP}\r", read) == "what is KV?"
    file = tmp_path / "kvmesh" / "chat_history"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_a_home_that_cannot_be_written_to_ends_no_chat(
    keys: PipeInput, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    assert reads(keys, "hello\r", line_input.message_reader()) == "hello"


def test_the_end_of_input_ends_the_chat(keys: PipeInput) -> None:
    with pytest.raises(EOFError):
        reads(keys, "\x04", line_input.message_reader())
