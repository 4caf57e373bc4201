"""The file of answers: a line for each, written once, whatever ends the run.

    {"id": "batch_req_LINE_DIGEST", "custom_id": …, "response": {…} or null, "error": null or {…}}

The id says which line of the input is answered, and by a digest what that line was. So the file
alone shows what is left to do, and whether it belongs to an input.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import msgspec

from kvmesh.cluster.batch.errors import BatchRunError
from kvmesh.cluster.batch.input_file import STDIN

_ID: Final = re.compile(r"batch_req_([1-9][0-9]*)_[0-9a-f]{16}")
_READ_BYTES: Final = 1 << 20


class _UsageSummary(msgspec.Struct):
    completion_tokens: int = 0
    output_tokens: int = 0  # as /v1/responses has it


class ReplySummary(msgspec.Struct):
    """Of a reply, what a run counts."""

    model: str = ""
    usage: _UsageSummary | None = None

    @property
    def tokens(self) -> int:
        return 0 if self.usage is None else self.usage.completion_tokens + self.usage.output_tokens


class LineResponse(msgspec.Struct):
    """What a server answers, over HTTP. body: JSON in one line"""

    status_code: int
    request_id: str
    body: msgspec.Raw

    def summary(self) -> ReplySummary:
        """What is counted of a reply that is no error; nothing of what is in another form."""
        try:
            return msgspec.json.decode(self.body, type=ReplySummary)
        except (msgspec.DecodeError, UnicodeDecodeError):
            return ReplySummary()


class OutputLine(msgspec.Struct):
    """error: why there is no response, as {"code", "message"}"""

    id: str
    custom_id: str | None
    response: LineResponse | None = None
    error: Any = None

    @property
    def failed(self) -> bool:
        return self.response is None or self.response.status_code != 200


@dataclass(slots=True)
class Answered:
    """What a file has already.

    ids: of answers, by the number of the line
    custom_ids: of the lines that had a request. One that was refused leaves its to others
    model: that gave an answer; "" if none did
    """

    ids: dict[int, str] = field(default_factory=dict)
    custom_ids: set[str] = field(default_factory=set)
    failed: int = 0
    model: str = ""


class OutputFile:
    """target: a path, or `-` for stdout. Files continue with what they have; anything else, such as
    a pipe, is only written.

    Raises BatchRunError for a file that is no output of a run, or that another run writes.
    """

    def __init__(self, target: str) -> None:
        self.target = target
        self.answered = Answered()
        try:
            self._file = os.dup(1) if target == STDIN else _opened(Path(target))
        except OSError as error:
            raise self._failure(error) from error
        self._regular = stat.S_ISREG(os.fstat(self._file).st_mode) and target != STDIN
        if self._regular:
            try:
                self._lock()
                self._read()
            except BaseException:
                os.close(self._file)
                raise

    def write(self, line: OutputLine) -> None:
        """Add an answer, whole or not at all. Raises BatchRunError."""
        data = memoryview(msgspec.json.encode(line) + b"\n")
        written = 0
        try:
            while written < len(data):
                written += os.write(self._file, data[written:])
        except BrokenPipeError:
            raise
        except OSError as error:
            if self._regular and written:
                with contextlib.suppress(OSError):
                    os.ftruncate(self._file, os.fstat(self._file).st_size - written)
            raise self._failure(error) from error

    def close(self) -> None:
        """Raises BatchRunError if what was written may not be on the disk."""
        try:
            if self._regular:
                os.fsync(self._file)
        except OSError as error:
            raise self._failure(error) from error
        finally:
            os.close(self._file)

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BatchRunError(f"another run is writing {self.target}") from None

    def _read(self) -> None:
        """Note what is answered, and cut off a last line that was not written to its end."""
        with os.fdopen(os.dup(self._file), "rb", buffering=_READ_BYTES) as file:
            whole = 0
            for number, data in enumerate(file, 1):
                if not data.endswith(b"\n"):
                    break
                self._note(number, data)
                whole += len(data)
        os.ftruncate(self._file, whole)

    def _note(self, number: int, data: bytes) -> None:
        answered = self.answered
        try:
            line = msgspec.json.decode(data, type=OutputLine)
        except (msgspec.DecodeError, UnicodeDecodeError):
            line = OutputLine("", None)
        match = _ID.fullmatch(line.id)
        if match is None:
            raise BatchRunError(
                f"{self.target} is not the output of a run (line {number}); give another --output"
            )
        answered.ids[int(match[1])] = line.id
        answered.failed += line.failed
        if line.custom_id is not None and line.response is not None:
            answered.custom_ids.add(line.custom_id)
        if not answered.model and line.response is not None and not line.failed:
            answered.model = line.response.summary().model

    def _failure(self, error: OSError) -> BatchRunError:
        return BatchRunError(f"cannot write {self.target}: {error.strerror}")


def _opened(path: Path) -> int:
    access = os.O_WRONLY if path.exists() and not path.is_file() else os.O_RDWR
    return os.open(path, access | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
