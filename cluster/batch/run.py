"""A run: reads requests, has them answered, many at once, and writes each answer.

    input ── a window of lines ──► sorted by the beginnings of prompts ──► answers ──► output

Requests with the same beginning follow each other, so that it is computed once and then found in
the prefix cache. Answers are written as they come.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

import msgspec

from kvmesh.cluster.batch.errors import BatchRunError
from kvmesh.cluster.batch.input_file import STDIN, InputLine, read_lines
from kvmesh.cluster.batch.line_request import LineError, LineRequest, read_request
from kvmesh.cluster.batch.output_file import LineResponse, OutputFile, OutputLine

# Lines that are in memory, and sorted together.
WINDOW_BYTES: Final = 64 << 20


class Answers(Protocol):
    async def answer(self, request: LineRequest) -> LineResponse:
        """The response, which may report an error of the request. Raises BatchRunError."""


@dataclass(slots=True)
class RunCounts:
    """How far a run is.

    lines: of the input, None if it is not known yet
    before: answered by earlier runs
    answered: by this one; failed: of both, those whose answer is an error
    tokens: of output, in this run
    """

    lines: int | None = None
    before: int = 0
    answered: int = 0
    failed: int = 0
    tokens: int = 0

    @property
    def done(self) -> int:
        return self.before + self.answered


class BatchRun:
    """Call `survey` first; then `run`, once.

    source: a path, or STDIN
    report: called after every answer
    Raises BatchRunError, after which another run of the same files continues.
    """

    def __init__(
        self, source: str, output: OutputFile, report: Callable[[RunCounts], None] = lambda _: None
    ) -> None:
        self._source = source
        self._output = output
        self._report = report
        self._lines = self._unanswered()
        self._custom_ids = set(output.answered.custom_ids)
        self._window: deque[LineRequest] = deque()
        self._reading = asyncio.Lock()
        self.counts = RunCounts(before=len(output.answered.ids), failed=output.answered.failed)

    def survey(self) -> None:
        """Count the lines, and see whether the answers are to them. Does nothing for STDIN."""
        if self._source != STDIN:
            found = sum(1 for _ in self._checked())
            self.counts.lines = found

    async def run(self, answers: Answers, at_once: int) -> None:
        """Answer what is not answered. at_once: requests"""
        self._report(self.counts)
        workers = [asyncio.create_task(self._work(answers)) for _ in range(at_once)]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
        self.counts.lines = self.counts.done

    # Within

    async def _work(self, answers: Answers) -> None:
        while (request := await self._next()) is not None:
            response = await answers.answer(request)
            self._write(OutputLine(request.id, request.custom_id, response))

    async def _next(self) -> LineRequest | None:
        async with self._reading:
            while not self._window:
                taken = await asyncio.to_thread(self._take_window)
                if not taken:
                    return None
                self._fill(taken)
            return self._window.popleft()

    def _take_window(self) -> list[InputLine]:
        taken, size = [], 0
        for line in self._lines:
            taken.append(line)
            size += len(line.data)
            if size >= WINDOW_BYTES:
                break
        return taken

    def _fill(self, lines: list[InputLine]) -> None:
        """Sort the requests of these lines, and answer those lines that are none."""
        requests = []
        for line in lines:
            try:
                request = read_request(line)
                if request.custom_id in self._custom_ids:
                    raise LineError(
                        "duplicate_custom_id",
                        "custom_id: a line before has the same",
                        request.custom_id,
                    )
            except LineError as error:
                cause = {"code": error.code, "message": error.message}
                self._write(OutputLine(line.id, error.custom_id, None, cause))
            else:
                self._custom_ids.add(request.custom_id)
                requests.append(request)
        requests.sort(key=lambda request: (request.url, request.beginning))
        self._window.extend(requests)

    def _write(self, line: OutputLine) -> None:
        self._output.write(line)
        self.counts.answered += 1
        self.counts.failed += line.failed
        if line.response is not None and not line.failed:
            self.counts.tokens += line.response.summary().tokens
        self._report(self.counts)

    def _unanswered(self) -> Iterator[InputLine]:
        return (line for line in self._checked() if line.number not in self._output.answered.ids)

    def _checked(self) -> Iterator[InputLine]:
        """All lines. Raises BatchRunError if the output has answers to other ones."""
        ids, found = self._output.answered.ids, 0
        for line in read_lines(self._source):
            known = ids.get(line.number)
            if known is not None and known != line.id:
                raise self._foreign(line.number)
            found += known is not None
            yield line
        if found < len(ids):
            raise self._foreign(max(ids))

    def _foreign(self, number: int) -> BatchRunError:
        return BatchRunError(
            f"{self._output.target} belongs to another input: it answers line {number}, which is "
            f"not in {self._source} as it was; give another --output"
        )


def check_model(output: OutputFile, models: Sequence[str]) -> None:
    """Raises BatchRunError if the file has answers of another model than any of these."""
    before = output.answered.model
    if before and before not in models:
        raise BatchRunError(
            f"{output.target} has answers of {before}, and these would be of "
            f"{' or '.join(models)}; give another --output"
        )


def error_body(message: str) -> Any:
    """A body like that of an error of OpenAI's API."""
    return msgspec.Raw(msgspec.json.encode({"error": {"message": message}}))
