"""The load: streams through the whole path, every token checked, from a separate process.

Each client is a closed loop: when its stream ends, it starts the next. Counts and CPU times are
those of a window, which opens some time after every client has received its first token.
"""

from __future__ import annotations

import asyncio
import itertools
import multiprocessing
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Any

import grpc

from benchmarks.control_plane.health import HealthProbe
from benchmarks.control_plane.tokens import FIRST_ID, NUM_IDS, Checker, chain
from kvmesh.protos import pb

PROMPT_TOKENS = 32
CALL_TIMEOUT_S = 300.0
METHOD = "/kvmesh.v1.KVMesh/GenerateStream"


@dataclass(frozen=True, slots=True)
class Load:
    """One phase.

    tokens: output tokens per request
    step_ms: duration of the engine's steps; 0: as fast as possible
    settle_s: between the last client's first token and the window
    health: probe the health service as well, from another process
    """

    streams: int
    tokens: int
    step_ms: int = 0
    seconds: float = 10.0
    settle_s: float = 1.0
    health: bool = False


@dataclass(frozen=True, slots=True)
class Outcome:
    """What arrived within the window; None if there was nothing to measure.

    first_token_s: median, of requests sent within the window
    health_s, health_max_s: median and longest duration of a check
    client_cpu_s: of the load's own process
    checked_requests: in the whole phase; all their tokens were the ones sampled
    """

    seconds: float
    tokens: int
    messages: int
    requests: int
    first_token_s: float | None
    client_cpu_s: float
    health_s: float | None = None
    health_max_s: float | None = None
    checked_requests: int = 0


@dataclass(slots=True)
class _Counts:
    tokens: int = 0
    messages: int = 0
    requests: int = 0


class LoadGenerator:
    """Runs phases against one cluster; all methods belong to one event loop."""

    def __init__(self, target: str, api_key: str | None) -> None:
        self._target = target
        self._channel = grpc.aio.insecure_channel(target)
        self._metadata = () if api_key is None else (("authorization", f"Bearer {api_key}"),)
        self._seeds = itertools.count()

    async def run(
        self, load: Load, opened: Callable[[], None], closed: Callable[[], None]
    ) -> Outcome:
        """opened, closed: called when the window opens and closes

        Raises an ExceptionGroup with the failures of requests.
        """
        self._counts = _Counts()
        self._firsts: list[float] = []
        self._waiting = load.streams
        self._all_running = asyncio.Event()
        self._opened_s = float("inf")
        self._ending = False
        async with asyncio.TaskGroup() as group:
            for index in range(load.streams):
                group.create_task(self._client(load, index))
            await self._all_running.wait()
            await asyncio.sleep(load.settle_s)
            probe = await HealthProbe.start(self._target) if load.health else None
            outcome = await self._window(load, opened, closed)
            self._ending = True
            checks: list[float] = []
            if probe is not None:
                checks = await probe.end(self._opened_s, self._opened_s + outcome.seconds)
        return replace(
            outcome,
            health_s=statistics.median(checks) if checks else None,
            health_max_s=max(checks, default=None),
            checked_requests=self._counts.requests,
        )

    async def _window(
        self,
        load: Load,
        opened: Callable[[], None],
        closed: Callable[[], None],
    ) -> Outcome:
        before = replace(self._counts)
        self._firsts.clear()
        opened()
        self._opened_s, cpu_s = time.perf_counter(), time.process_time()
        await asyncio.sleep(load.seconds)
        closed()
        closed_s = time.perf_counter()
        return Outcome(
            seconds=closed_s - self._opened_s,
            tokens=self._counts.tokens - before.tokens,
            messages=self._counts.messages - before.messages,
            requests=self._counts.requests - before.requests,
            first_token_s=statistics.median(self._firsts) if self._firsts else None,
            client_cpu_s=time.process_time() - cpu_s,
        )

    async def _client(self, load: Load, index: int) -> None:
        # The first requests differ in length, so that clients do not stay in lockstep.
        tokens = max(1, load.tokens * (index + 1) // load.streams)
        first = True
        while not self._ending:
            await self._request(load.step_ms, tokens, first)
            tokens, first = load.tokens, False

    async def _request(self, step_ms: int, tokens: int, first: bool) -> None:
        prompt = make_prompt(next(self._seeds), step_ms)
        request = pb.GenerateRequest(
            prompt=pb.Prompt(token_ids=pb.TokenIds(ids=prompt)),
            sampling_params=pb.SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True),
        )
        checker = Checker(prompt[-1], tokens)
        call: Any = self._channel.unary_stream(METHOD)
        sent_s = time.perf_counter()
        async for data in call(
            request.SerializeToString(), metadata=self._metadata, timeout=CALL_TIMEOUT_S
        ):
            self._counts.messages += 1
            event = pb.GenerateStreamResponse.FromString(data)
            new = event.delta.token_ids
            if not new:
                continue
            if not checker.seen:
                self._note_first(sent_s, first)
            checker.take(list(new))
            self._counts.tokens += len(new)
        checker.end()
        self._counts.requests += 1

    def _note_first(self, sent_s: float, first: bool) -> None:
        if sent_s >= self._opened_s:
            self._firsts.append(time.perf_counter() - sent_s)
        if first:
            self._waiting -= 1
            if not self._waiting:
                self._all_running.set()


def make_prompt(seed: int, step_ms: int) -> list[int]:
    """[PROMPT_TOKENS]: the steps' duration in ms, then a chain that the output continues."""
    return [step_ms, *chain(FIRST_ID + seed % NUM_IDS, PROMPT_TOKENS - 1)]


class LoadProcess:
    """A LoadGenerator in a child process; `run` calls back when its window opens and closes."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def connect(self, target: str, api_key: str | None) -> None:
        self._pipe.send((target, api_key))

    def run(self, load: Load, opened: Callable[[], None], closed: Callable[[], None]) -> Outcome:
        self._pipe.send(load)
        for expected, callback in (("opened", opened), ("closed", closed)):
            said = self._pipe.recv()
            if said != expected:
                raise RuntimeError(f"the load failed: {said}")
            callback()
        outcome = self._pipe.recv()
        if not isinstance(outcome, Outcome):
            raise RuntimeError(f"the load failed: {outcome}")
        return outcome

    def stop(self) -> None:
        self._process.terminate()
        self._process.join()


def _serve(pipe: Connection) -> None:
    asyncio.run(_serve_loads(pipe))


async def _serve_loads(pipe: Connection) -> None:
    generator = LoadGenerator(*pipe.recv())
    while True:
        load: Load = pipe.recv()
        try:
            pipe.send(
                await generator.run(load, lambda: pipe.send("opened"), lambda: pipe.send("closed"))
            )
        except ExceptionGroup as group:
            pipe.send("; ".join(sorted({str(error) for error in group.exceptions})[:3]))
