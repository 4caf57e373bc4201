"""What the parts of the control plane ask of each other, whatever carries it.

In production a Serve handle is behind these protocols (cluster/handles.py); in
tests the very objects are.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from kvmesh.cluster.routing.aio import RouterStatus
from kvmesh.cluster.routing.request import Estimate, Growth, Placement, PlaceRequest
from kvmesh.cluster.routing.verdict import Verdicts
from kvmesh.workers.request import (
    EngineInfo,
    EngineLoads,
    EngineRequest,
    LeaseTerms,
    PageChanges,
    SequenceDelta,
)


@dataclass(frozen=True, slots=True)
class StreamOpened:
    """The first message of an output stream: which incarnation of the engine speaks."""

    epoch: str


@dataclass(frozen=True, slots=True)
class LatencySummary:
    """Of a recent window, in seconds."""

    count: int = 0
    mean_s: float = 0.0
    p50_s: float = 0.0
    p90_s: float = 0.0
    p99_s: float = 0.0


@dataclass(frozen=True, slots=True)
class EngineLatencies:
    """time_to_first_token counts from submission to the engine."""

    time_to_first_token: LatencySummary = LatencySummary()
    time_per_output_token: LatencySummary = LatencySummary()
    queue_time: LatencySummary = LatencySummary()


@dataclass(frozen=True, slots=True)
class EngineReport:
    """All that an engine says of itself."""

    info: EngineInfo
    loads: EngineLoads
    latencies: EngineLatencies = EngineLatencies()
    draining: bool = False


@dataclass(frozen=True, slots=True)
class ClusterStatus:
    """The router's view of everything.

    reports: the latest of each group that ever reported
    healthy: groups that are up
    live_requests: that wait or hold a lease
    draining: nothing new is taken
    """

    router: RouterStatus
    reports: Mapping[str, EngineReport]
    healthy: frozenset[str]
    live_requests: int = 0
    draining: bool = False
    granted_total: int = 0
    released_total: int = 0
    expired_total: int = 0
    refused_total: Mapping[str, int] = field(default_factory=dict)
    audits_total: int = 0
    audit_faults_total: int = 0


@dataclass(frozen=True, slots=True)
class Explained:
    """One decision about a request.

    age_s: how long ago; group: where it was placed, or empty; verdicts: of every group
    """

    age_s: float
    outcome: str
    group: str
    verdicts: Verdicts


class EngineClient(Protocol):
    """One group's engine. Anything may raise EngineLostError."""

    async def submit(self, request: EngineRequest, epoch: str) -> None:
        """Queue a sequence; raises CapacityError, InvalidRequestError.

        EngineLostError if the engine is no longer the incarnation `epoch`.
        """

    async def abort(self, request_ids: Sequence[str]) -> int:
        """End sequences; how many were live. The others are refused if they come later."""

    def outputs(self, client_id: str) -> AsyncGenerator[StreamOpened | list[SequenceDelta], None]:
        """All output of a client's sequences; closing it aborts them."""

    async def extend(self, request_ids: Sequence[str], lease: LeaseTerms) -> None:
        """The lease of these sequences has grown; `lease` is each one's part."""

    async def report(self, pages_after: int = 0) -> tuple[EngineReport, PageChanges]:
        """How it is, and what its prefix cache gained and lost after a version of it."""


class RouterClient(Protocol):
    """The router. Request ids are prefixed with their tenant by the caller."""

    async def place(
        self, request: PlaceRequest, *, ticket: str, supersede: bool = False
    ) -> Placement:
        """Wait for a lease; raises the tree of routing/errors.py.

        ticket: of this very call, to withdraw it by
        supersede: an older incarnation of the request is ended first
        """

    async def begun(self, lease_id: str) -> None:
        """The lease's first token is out."""

    async def grow(self, lease_id: str, request: PlaceRequest, output_tokens: int) -> Growth | None:
        """Extend a lease before a sequence of it goes on to `output_tokens`.

        request: as it was placed. None if the pages are not free yet, or the lease is gone.
        """

    async def release(self, lease_id: str, output_tokens: int | None = None) -> None:
        """End a lease; again is harmless.

        output_tokens: of one sequence, if it ended of its own accord: to learn from
        """

    async def abort(self, request_id: str) -> bool:
        """End a request wherever it is; whether there was one."""

    async def withdraw(self, request_id: str, ticket: str) -> None:
        """End what a call of `place` has led to, whose caller is gone."""

    async def estimate(self, request: PlaceRequest) -> Estimate:
        """What would become of it."""

    async def explain(self, request_id: str) -> tuple[Explained, ...]:
        """What was decided of it, oldest first; nothing if it is not known, or no longer."""

    async def suspect(self, group: str, epoch: str) -> None:
        """Tell that this incarnation of the group's engine does not answer."""

    async def status(self, *, fresh: bool = False) -> ClusterStatus:
        """fresh: ask every engine first."""


class TextStream(Protocol):
    """Text of tokens that come one by one."""

    def push(self, ids: Sequence[int]) -> str:
        """The text that has become certain."""

    def flush(self) -> str:
        """What is left at the end."""


class TextCodec(Protocol):
    """The model's tokenizer."""

    def encode(self, text: str) -> npt.NDArray[np.int32]:
        """Token ids of a prompt, with what the model puts before it."""

    def encode_chat(self, turns: Iterable[tuple[str, str]]) -> npt.NDArray[np.int32]:
        """Token ids of a conversation, ready for the assistant; ValueError if it cannot be."""

    def decode_token(self, token_id: int) -> str:
        """One token's own text."""

    def stream(self) -> TextStream:
        """A new incremental decoder."""

    @property
    def has_chat_template(self) -> bool: ...

    @property
    def eos_token_ids(self) -> tuple[int, ...]: ...
