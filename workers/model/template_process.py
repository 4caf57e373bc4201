"""Renders chat templates in a process of their own, with limits on time and memory.

A template is a program: it may loop without end or double a string until no memory is left, in
calls that no thread can interrupt. So a child process runs it, which is killed when it takes too
long, cannot allocate more than it may, and is started again when it has ended.

    parent ── _Setup, then _Job, _Job, … ──► child      _Done back for each job

Frames are 8 bytes of length, then msgpack: what a child sends cannot make the parent run code.
"""

from __future__ import annotations

import contextlib
import os
import resource
import select
import signal
import subprocess
import sys
import time
from typing import Any, BinaryIO

import msgspec

from kvmesh.workers.errors import InvalidFieldError
from kvmesh.workers.model.chat import ChatTemplates, ControlTexts, Conversation, PromptPiece

MEMORY_BYTES = 1 << 30
MAX_RENDERED_CHARS = 1 << 26
START_TIMEOUT_S = 60.0  # of the child, on a machine that is busy
_GRACE_S = 5.0  # after which a child whose parent is gone ends itself
_LENGTH_BYTES = 8
_READ_BYTES = 1 << 20
_ENVIRONMENT = ("HOME", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "PATH", "TZ")


class _Setup(msgspec.Struct, array_like=True):
    """Of a child: its model's templates, and how long a job may take."""

    sources: dict[str, str]
    variables: dict[str, Any]
    controls: ControlTexts
    timeout_s: float


class _Job(msgspec.Struct, array_like=True):
    chat: Conversation
    add_generation_prompt: bool


class _Done(msgspec.Struct, array_like=True):
    """pieces: of the prompt; or the field that is refused, and why"""

    pieces: list[PromptPiece] = []
    field: str = ""
    message: str = ""


class TemplateTimeoutError(Exception):
    """A template took longer than it may."""


class TemplateProcess:
    """Renders one chat at a time; for one thread at a time.

    timeout_s: of a chat
    """

    def __init__(self, templates: ChatTemplates, timeout_s: float) -> None:
        setup = _Setup(*templates.parts, timeout_s)
        self._setup = msgspec.msgpack.encode(setup)
        self._timeout_s = timeout_s
        self._child: subprocess.Popen[bytes] | None = None
        self._ready = False  # it has answered

    def start(self) -> None:
        """Start the child without waiting for it; otherwise the first chat does."""
        if self._child is None or self._child.poll() is not None:
            self.close()
            self._child = subprocess.Popen(
                [sys.executable, "-c", f"from {__name__} import main; main()"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                # The same modules, however this process has found them, and no secrets.
                env={
                    **{name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
                    "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
                },
            )
            assert self._child.stdin is not None
            os.set_blocking(self._child.stdin.fileno(), False)

    def render(self, chat: Conversation, add_generation_prompt: bool = True) -> list[PromptPiece]:
        """See ChatTemplates.render; raises TemplateTimeoutError as well."""
        job = msgspec.msgpack.encode(_Job(chat, add_generation_prompt))
        try:
            self.start()
            assert self._child is not None
            if not self._ready:
                self._exchange(self._setup, START_TIMEOUT_S)
                self._ready = True
            done = msgspec.msgpack.decode(self._exchange(job, self._timeout_s), type=_Done)
        except TimeoutError:
            self.close()
            raise TemplateTimeoutError() from None
        except (OSError, EOFError, msgspec.DecodeError):
            self.close()
            raise InvalidFieldError(
                "messages", f"cannot be rendered: {chat.template_label} ended its process"
            ) from None
        if done.field:
            raise InvalidFieldError(done.field, done.message)
        return done.pieces

    def close(self) -> None:
        """End the child. Idempotent."""
        child, self._child, self._ready = self._child, None, False
        if child is not None:
            child.kill()
            child.wait()
            for pipe in (child.stdin, child.stdout):
                if pipe is not None:
                    with contextlib.suppress(BrokenPipeError):
                        pipe.close()

    def _exchange(self, frame: bytes, timeout_s: float) -> bytes:
        """The child's answer. Raises TimeoutError, OSError, EOFError."""
        assert self._child is not None and self._child.stdin is not None
        assert self._child.stdout is not None
        source, target = self._child.stdout.fileno(), self._child.stdin.fileno()
        deadline = time.monotonic() + timeout_s
        waiting = select.poll()  # not select(): an ingress has more than 1,024 descriptors
        waiting.register(source, select.POLLIN)
        waiting.register(target, select.POLLOUT)
        unsent, received = memoryview(_framed(frame)), bytearray()
        while len(received) < _LENGTH_BYTES or len(received) < _LENGTH_BYTES + _length(received):
            left_s = deadline - time.monotonic()
            if left_s <= 0 or not (ready := waiting.poll(left_s * 1000)):
                raise TimeoutError
            if any(descriptor == source for descriptor, _ in ready):
                block = os.read(source, _READ_BYTES)
                if not block:
                    raise EOFError
                received += block
            else:
                unsent = unsent[os.write(target, unsent) :]
                if not unsent:
                    waiting.unregister(target)
        return bytes(received[_LENGTH_BYTES:])


def main() -> None:
    """The child: render until the parent closes its end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is for the parent
    source, target = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr
    first = _read(source)
    if first is None:
        return
    setup = msgspec.msgpack.decode(first, type=_Setup)
    templates = ChatTemplates(setup.sources, setup.variables, setup.controls)
    # Import all that rendering needs before memory is limited.
    with contextlib.suppress(InvalidFieldError):
        templates.render(Conversation([{"role": "user", "content": ""}]), True)
    _limit_memory()
    _write(target, b"")
    while (frame := _read(source)) is not None:
        signal.setitimer(signal.ITIMER_REAL, setup.timeout_s + _GRACE_S)
        done = _render(templates, frame)
        _write(target, msgspec.msgpack.encode(done))
        signal.setitimer(signal.ITIMER_REAL, 0)
        del frame, done


def _render(templates: ChatTemplates, frame: bytes) -> _Done:
    from transformers.utils.chat_template_utils import _compile_jinja_template

    given = False
    try:
        job = msgspec.msgpack.decode(frame, type=_Job)
        given = bool(job.chat.template)
        pieces = templates.render(job.chat, job.add_generation_prompt)
    except InvalidFieldError as error:
        return _Done(field=error.field, message=error.message)
    except MemoryError:
        return _Done(field="messages", message="need more memory than a chat template may have")
    finally:
        # It keeps compiled templates, and requests may bring any number of them.
        if given:
            _compile_jinja_template.cache_clear()
    chars = sum(len(piece.text) for piece in pieces)
    if chars > MAX_RENDERED_CHARS:
        return _Done(
            field="messages",
            message=f"are rendered to {chars:,} characters by the chat template; at most "
            f"{MAX_RENDERED_CHARS:,} are allowed",
        )
    return _Done(pieces)


def _limit_memory() -> None:
    with open("/proc/self/statm", encoding="ascii") as file:
        pages = int(file.read().split()[0])
    limit = pages * resource.getpagesize() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _length(frame: bytes | bytearray) -> int:
    return int.from_bytes(frame[:_LENGTH_BYTES], "little")


def _framed(frame: bytes) -> bytes:
    return len(frame).to_bytes(_LENGTH_BYTES, "little") + frame


def _write(target: BinaryIO, frame: bytes) -> None:
    target.write(_framed(frame))
    target.flush()


def _read(source: BinaryIO) -> bytes | None:
    """A frame; None at the end."""
    head = source.read(_LENGTH_BYTES)
    if len(head) < _LENGTH_BYTES:
        return None
    return source.read(_length(head))
