"""The lines of a file of requests."""

from __future__ import annotations

import contextlib
import hashlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

from kvmesh.cluster.batch.errors import BatchRunError

STDIN: Final = "-"
DIGEST_BYTES: Final = 8


@dataclass(frozen=True, slots=True)
class InputLine:
    """number: in its file, from 1"""

    number: int
    data: bytes

    @property
    def id(self) -> str:
        """Of its answer: which line it answers, and what that said."""
        digest = hashlib.blake2b(self.data, digest_size=DIGEST_BYTES).hexdigest()
        return f"batch_req_{self.number}_{digest}"


def read_lines(source: str) -> Iterator[InputLine]:
    """All lines that are not blank. source: a path, or STDIN. Raises BatchRunError."""
    with contextlib.ExitStack() as opened:
        file: BinaryIO = sys.stdin.buffer
        try:
            if source != STDIN:
                file = opened.enter_context(Path(source).open("rb"))
            for number, data in enumerate(file, 1):
                if number == 1:
                    data = data.removeprefix(b"\xef\xbb\xbf")
                if data := data.strip():
                    yield InputLine(number, data)
        except OSError as error:
            raise BatchRunError(f"cannot read {source}: {error.strerror}") from error
