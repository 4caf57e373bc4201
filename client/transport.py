"""The boundary between the SDK's logic and the outside: calls, time, sleep.

A transport makes one attempt of one call and raises RpcFailure if it fails.
Retries, resumes, errors and types are the caller's job. The clock and sleep are
part of it, so that a fake transport can skip back-offs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from google.protobuf.message import Message

from kvmesh.client.checks import Metadata
from kvmesh.protos import admin, pb

Request = TypeVar("Request", bound=Message)
Reply = TypeVar("Reply", bound=Message)


class RpcFailure(Exception):
    """One attempt failed. Never leaves the SDK.

    code: name of the gRPC status code
    details: the status's text
    trailers: metadata that came with the status
    """

    def __init__(
        self, code: str, details: str, trailers: tuple[tuple[str, str | bytes], ...] = ()
    ) -> None:
        super().__init__(code, details, trailers)
        self.code = code
        self.details = details
        self.trailers = trailers


@dataclass(frozen=True, slots=True)
class Method(Generic[Request, Reply]):
    """A method of a service and its message types."""

    name: str
    request_type: type[Request]
    reply_type: type[Reply]
    service: str = "kvmesh.v1.KVMesh"

    @property
    def path(self) -> str:
        return f"/{self.service}/{self.name}"


GENERATE = Method("Generate", pb.GenerateRequest, pb.GenerateResponse)
GENERATE_STREAM = Method("GenerateStream", pb.GenerateRequest, pb.GenerateStreamResponse)
TOKENIZE = Method("Tokenize", pb.TokenizeRequest, pb.TokenizeResponse)
DETOKENIZE = Method("Detokenize", pb.DetokenizeRequest, pb.DetokenizeResponse)
ABORT = Method("Abort", pb.AbortRequest, pb.AbortResponse)
ESTIMATE_BUDGET = Method("EstimateBudget", pb.EstimateBudgetRequest, pb.EstimateBudgetResponse)
EXPLAIN = Method("Explain", pb.ExplainRequest, pb.ExplainResponse)
GET_MODEL_INFO = Method("GetModelInfo", pb.GetModelInfoRequest, pb.GetModelInfoResponse)
GET_TENANT_LOADS = Method("GetTenantLoads", pb.GetTenantLoadsRequest, pb.GetTenantLoadsResponse)

ADMIN = "kvmesh.v1alpha.Admin"
GET_LOADS = Method("GetLoads", admin.GetLoadsRequest, admin.GetLoadsResponse, ADMIN)
LIST_GROUPS = Method("ListGroups", admin.ListGroupsRequest, admin.ListGroupsResponse, ADMIN)


class StreamCall(Protocol):
    """A streaming call in progress."""

    def read(self) -> pb.GenerateStreamResponse | None:
        """The next event, or None at the end of a stream whose status is OK."""

    def cancel(self) -> None:
        """End the call; does nothing if it has ended.

        May be called from any thread, and by garbage collection.
        """


class Transport(Protocol):
    """metadata: of the call, the caller's key among it"""

    def unary(
        self,
        method: Method[Request, Reply],
        request: Request,
        timeout_s: float | None,
        metadata: Metadata,
    ) -> Reply: ...

    def stream(
        self, request: pb.GenerateRequest, timeout_s: float | None, metadata: Metadata
    ) -> StreamCall: ...

    def now(self) -> float:
        """Seconds on a monotonic clock."""

    def sleep(self, seconds: float) -> None: ...

    def close(self) -> None: ...


class AsyncStreamCall(Protocol):
    """As StreamCall, also in what may call `cancel`."""

    async def read(self) -> pb.GenerateStreamResponse | None: ...

    def cancel(self) -> None: ...


class AsyncTransport(Protocol):
    async def unary(
        self,
        method: Method[Request, Reply],
        request: Request,
        timeout_s: float | None,
        metadata: Metadata,
    ) -> Reply: ...

    def stream(
        self, request: pb.GenerateRequest, timeout_s: float | None, metadata: Metadata
    ) -> AsyncStreamCall: ...

    def now(self) -> float: ...

    async def sleep(self, seconds: float) -> None: ...

    async def close(self) -> None: ...
