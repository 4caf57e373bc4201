"""Sends requests at their times, or as many at a time, and notes when replies arrive.

With arrival times the loop is open: a request is sent when it is due, however many are running,
and its latency counts from then. A server that stalls delays neither the requests that follow nor
the clock by which they are judged (no coordinated omission).
"""

from __future__ import annotations

import asyncio
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from kvmesh.cluster.bench.prompts import PromptMaker
from kvmesh.cluster.bench.targets import BenchTarget, OutputChunk, ReplyFailed
from kvmesh.cluster.bench.workload import BenchRequest


@dataclass(slots=True)
class ReplyRecord:
    """What became of a request. Times in seconds since the run's start.

    due_s: when it was to be sent, from which latencies count; sent_s: when it was
    chunk_s: when each chunk with output arrived
    ended_s: None while it runs, or if the run was stopped before
    prompt_tokens, output_tokens: as the server counts them; without its counts, what was asked for
        and the chunks
    error: why there is no complete reply
    """

    request: BenchRequest
    due_s: float
    sent_s: float
    chunk_s: array[float] = field(default_factory=lambda: array("d"))
    ended_s: float | None = None
    prompt_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    error: ReplyFailed | None = None

    @property
    def complete(self) -> bool:
        return self.ended_s is not None and self.error is None


Observe = Callable[[Sequence[ReplyRecord]], None]


class LoadRun:
    """One run against one server.

    concurrency: how many requests run at a time; None: each is sent at its arrival_s
    clock: in seconds, as precise as the event loop's
    records: of all requests sent so far, in the order of sending
    """

    def __init__(
        self,
        target: BenchTarget,
        prompts: PromptMaker,
        concurrency: int | None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.records: list[ReplyRecord] = []
        self.stopped = False
        self.ended_s = 0.0
        self._target = target
        self._prompts = prompts
        self._concurrency = concurrency
        self._clock = clock
        self._start = 0.0
        self._stop = asyncio.Event()

    def stop(self) -> None:
        """Send no more, and leave what runs. Safe to call from a signal handler of the loop."""
        self.stopped = True
        self._stop.set()

    async def run(self, requests: Sequence[BenchRequest]) -> None:
        """Until every request has ended, or `stop`. Raises what is a bug of a target."""
        self._start = self._clock()
        sending = asyncio.create_task(
            self._send_when_due(requests)
            if self._concurrency is None
            else self._send_when_free(requests, self._concurrency)
        )
        stopping = asyncio.create_task(self._stop.wait())
        await asyncio.wait({sending, stopping}, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        sending.cancel()
        self.ended_s = self._now()
        await asyncio.gather(stopping, return_exceptions=True)
        try:
            await sending
        except asyncio.CancelledError:
            if not self.stopped:
                raise

    def _now(self) -> float:
        return self._clock() - self._start

    async def _send_when_due(self, requests: Sequence[BenchRequest]) -> None:
        async with asyncio.TaskGroup() as running:
            for request in requests:
                due_s = request.arrival_s or 0.0
                prompt = self._prompts.make(request)  # before it is due
                if (wait_s := due_s - self._now()) > 0:
                    await asyncio.sleep(wait_s)
                running.create_task(self._one(request, prompt, due_s))
                # One that is late already must not keep others from being read.
                await asyncio.sleep(0)

    async def _send_when_free(self, requests: Sequence[BenchRequest], places: int) -> None:
        waiting = iter(requests)
        async with asyncio.TaskGroup() as running:
            for _ in range(min(places, len(requests))):
                running.create_task(self._one_after_another(waiting))

    async def _one_after_another(self, waiting: Iterator[BenchRequest]) -> None:
        for request in waiting:
            await self._one(request, self._prompts.make(request), None)

    async def _one(
        self, request: BenchRequest, prompt: str | list[int], due_s: float | None
    ) -> None:
        sent_s = self._now()
        record = ReplyRecord(request, sent_s if due_s is None else due_s, sent_s)
        self.records.append(record)
        counted = False
        try:
            async with aclosing(self._target.reply(prompt, request.output_tokens)) as events:
                async for event in events:
                    if isinstance(event, OutputChunk):
                        record.chunk_s.append(self._now())
                        record.output_tokens += 0 if counted else event.tokens
                    else:
                        counted = True
                        record.prompt_tokens = event.prompt
                        record.output_tokens = event.output
                        record.cached_tokens = event.cached
            if not record.chunk_s:
                raise ReplyFailed("no output", "the reply has no output")
        except ReplyFailed as error:
            record.error = error
        if not counted:
            record.prompt_tokens = request.prompt_tokens
        record.ended_s = self._now()
