"""The channel between a leader and its ranks: one ZeroMQ pair per rank, typed messages.

Plans go to every rank; only the rank that samples answers a step, any rank may
answer with Failed. Messages are msgpack of msgspec structs, so a peer cannot
make the other side run code. Sockets are Unix sockets in a directory of mode
0700: the ranks of a group share a host (their placement is STRICT_PACK).
"""

from __future__ import annotations

import math
import shutil
import tempfile
import time
from collections import deque
from pathlib import Path
from typing import TypeVar

import msgspec
import zmq

from kvmesh.workers.errors import (
    ConfigError,
    EngineError,
    RankRaisedError,
    UnsupportedModelError,
    WorkerDiedError,
)
from kvmesh.workers.executor import Allocation, MakeMasks, RankDescription
from kvmesh.workers.plan import StepPlan, StepResult, TokenMasks
from kvmesh.workers.step_limit import DEFAULT_STEP_TIMEOUT_S, StepLimit

_POLL_S = 0.05
DEFAULT_START_TIMEOUT_S = 900.0


class Probe(msgspec.Struct, tag="probe", frozen=True):
    """Measure what formats do to the model; rank 0 answers."""

    kv_formats: list[str]


class Divergences(msgspec.Struct, tag="divergences", frozen=True):
    """kl_nats: of each requested format, see Executor.divergences."""

    kl_nats: list[float]


class Allocated(msgspec.Struct, tag="allocated", frozen=True):
    """A rank has allocated its pool."""


class Flush(msgspec.Struct, tag="flush", frozen=True):
    """No step follows for now: answer all of them, also where they are not computed yet."""


class Close(msgspec.Struct, tag="close", frozen=True):
    """Ends the rank."""


class Failed(msgspec.Struct, tag="failed", frozen=True):
    """A rank has failed. kind: the error's class; field: the setting at fault, if any."""

    kind: str
    message: str
    field: str = ""

    def error(self) -> EngineError:
        configuration = {"ConfigError": ConfigError, "UnsupportedModelError": UnsupportedModelError}
        if self.kind in configuration:
            return configuration[self.kind](self.field, self.message)
        # A rank that has lost another one reports that; the other's death is the cause.
        died = WorkerDiedError if self.kind == "WorkerDiedError" else RankRaisedError
        return died(f"{self.kind}: {self.message}")


ToRank = StepPlan | TokenMasks | Flush | Allocation | Probe | Close
FromRank = RankDescription | Divergences | Allocated | StepResult | Failed
_Answer = TypeVar("_Answer", RankDescription, Divergences, Allocated, StepResult)


class RankEnd:
    """A rank's end of its pair."""

    def __init__(self, endpoint: str) -> None:
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PAIR)
        self._socket.setsockopt(zmq.LINGER, 1000)
        self._socket.connect(endpoint)
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(ToRank)

    def receive(self, timeout_s: float) -> ToRank | None:
        """The next message, or None after `timeout_s` without one."""
        if not self._socket.poll(int(timeout_s * 1000)):
            return None
        message: ToRank = self._decoder.decode(self._socket.recv())
        return message

    def send(self, message: FromRank) -> None:
        self._socket.send(self._encoder.encode(message))

    def close(self) -> None:
        self._socket.close()


class ChannelExecutor:
    """The leader's end: an Executor over ranks that were started with `endpoints`.

    A rank computes one step while the leader reads the result of the one before and decides the
    next one. Ranks on CPUs answer a step when they have computed it; on GPUs, where that would
    make them wait, when they have launched the next one, or on Flush.

    Start each rank with `worker_main(config, rank, endpoints[rank], rendezvous)`, in any
    process of this host, and call `fail` when one has died: the call that waits for it
    then raises within 50 ms. One thread calls the Executor's methods. Ranks that do not
    answer within a limit count as hung: the call raises WorkerDiedError.

    step_timeout_s: the lowest limit of a step, see step_limit.py
    start_timeout_s: for loading the model, for the probe and for allocating the pool
    """

    max_in_flight = 2

    def __init__(
        self,
        num_ranks: int,
        *,
        step_timeout_s: float = DEFAULT_STEP_TIMEOUT_S,
        start_timeout_s: float = DEFAULT_START_TIMEOUT_S,
    ) -> None:
        self._step_limit = StepLimit(step_timeout_s)
        self._start_timeout_s = start_timeout_s
        self._directory = Path(tempfile.mkdtemp(prefix="kvmesh-"))  # mode 0700
        self.rendezvous = self._directory / "ranks"
        self.endpoints = [f"ipc://{self._directory}/rank{rank}" for rank in range(num_ranks)]
        self._sockets: list[zmq.Socket[bytes]] = []
        for endpoint in self.endpoints:
            socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PAIR)
            socket.setsockopt(zmq.LINGER, 0)
            socket.bind(endpoint)
            self._sockets.append(socket)
        self._inbox: list[deque[RankDescription | Divergences | Allocated | StepResult]] = [
            deque() for _ in self._sockets
        ]
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(FromRank)
        self._failure: EngineError | None = None
        self._closed = False
        self._descriptions: list[RankDescription] = []
        self._in_flight: deque[tuple[StepPlan, float]] = deque()  # with the times of submission
        self._result_s = 0.0  # when the latest result came

    @property
    def num_ranks(self) -> int:
        return len(self.endpoints)

    def fail(self, error: EngineError) -> None:
        """Record that a rank has died; thread-safe. Only the first error is kept."""
        if self._failure is None and not self._closed:
            self._failure = error

    def describe(self) -> list[RankDescription]:
        if not self._descriptions:  # each rank sends its own once
            ranks = range(self.num_ranks)
            self._descriptions = [self._started(rank, RankDescription) for rank in ranks]
        return self._descriptions

    @property
    def _runs_ahead(self) -> bool:
        """Whether ranks launch steps on GPUs."""
        return any(rank.device == "cuda" for rank in self._descriptions)

    def divergences(self, kv_formats: list[str]) -> list[float]:
        self._send(Probe(kv_formats))
        return self._started(0, Divergences).kl_nats

    def allocate(self, allocation: Allocation) -> None:
        self._send(allocation)
        for rank in range(self.num_ranks):
            self._started(rank, Allocated)

    def submit(self, plan: StepPlan) -> None:
        self._in_flight.append((plan, time.monotonic()))
        self._send(plan)

    def result(self, masks: MakeMasks | None = None) -> StepResult:
        plan, submitted_s = self._in_flight.popleft()
        limit_s = self._step_limit.of(plan)
        if masks is not None:
            self._send(masks(), ranks=1)  # only rank 0 samples
        if not self._in_flight and self._runs_ahead:
            self._send(Flush(), ranks=1)
        result = self._expect(
            0,
            StepResult,
            limit_s,
            f"the group hangs: no answer to a step of {plan.num_tokens} tokens within "
            f"{limit_s:.3g} s. If it is only slow, raise engine.step_timeout_s",
        )
        now = time.monotonic()
        self._step_limit.learn(plan, now - max(submitted_s, self._result_s))
        self._result_s = now
        return result

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        message = self._encoder.encode(Close())
        for socket in self._sockets:
            try:
                socket.send(message, zmq.DONTWAIT)
            except zmq.Again:
                pass  # that rank never connected, or has died
            socket.close(linger=1000)
        shutil.rmtree(self._directory, ignore_errors=True)

    def _send(self, message: ToRank, ranks: int | None = None) -> None:
        """To all ranks, or the first few."""
        data = self._encoder.encode(message)
        for socket in self._sockets[:ranks]:
            while not socket.poll(int(_POLL_S * 1000), zmq.POLLOUT):
                self._raise_failure()
            socket.send(data)

    def _started(self, rank: int, kind: type[_Answer]) -> _Answer:
        limit_s = self._start_timeout_s
        hangs = f"rank {rank} hangs: it has not loaded within {limit_s:g} s (timeouts.start_s)"
        return self._expect(rank, kind, limit_s, hangs)

    def _expect(self, rank: int, kind: type[_Answer], limit_s: float, hangs: str) -> _Answer:
        """The next answer of `rank`; raises as soon as any rank has failed.

        hangs: the error if there is none within `limit_s`. Polls are counted, not the clock:
            when the whole machine was suspended, the ranks still get their time.
        """
        polls_left = math.ceil(limit_s / _POLL_S)
        while not self._inbox[rank]:
            self._raise_failure()
            if not polls_left:
                raise WorkerDiedError(hangs)
            polls_left -= 1
            self._collect(wait_for=rank)
        answer = self._inbox[rank].popleft()
        if not isinstance(answer, kind):
            raise WorkerDiedError(
                f"rank {rank} must answer with {kind.__name__}, got {type(answer).__name__}"
            )
        return answer

    def _collect(self, wait_for: int | None = None) -> None:
        """Read the messages that have arrived, waiting up to 50 ms for rank `wait_for`.

        Raises the error of a rank that has failed, the first cause if several have.
        """
        failures: list[EngineError] = []
        for rank, socket in enumerate(self._sockets):
            wait_ms = int(_POLL_S * 1000) if rank == wait_for else 0
            while socket.poll(wait_ms):
                wait_ms = 0
                answer = self._decoder.decode(socket.recv())
                if isinstance(answer, Failed):
                    failures.append(answer.error())
                else:
                    self._inbox[rank].append(answer)
        if failures:
            raise next((x for x in failures if type(x) is not WorkerDiedError), failures[0])

    def _raise_failure(self) -> None:
        if self._failure is not None:
            # A rank that fails sends the reason before it ends, which may be unread.
            self._collect()
            raise self._failure
