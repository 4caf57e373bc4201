"""Transports without a server, for testing code that uses the SDK.

    fake = FakeTransport(["Paris", "Rome"])
    client = Client(transport=fake)
    assert client.generate("The capital of France is").text == "Paris"
    fake.server.fail(OverCapacityError("full", retry_after_s=1.0))
    assert client.generate("The capital of Italy is").text == "Rome"  # after a retry
    assert fake.server.slept_s >= 1.0

Answers pass through the same messages, retries and parsers as real ones.
"""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import re
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, cast

import grpc

from kvmesh.client.errors import (
    AuthenticationError,
    ClosedError,
    DeadlineExceededError,
    DuplicateRequestError,
    InvalidRequestError,
    KVFormatError,
    KVMeshError,
    ModelNotFoundError,
    NeverFitsError,
    OverCapacityError,
    PermissionDeniedError,
    RequestCancelledError,
    ResumeError,
    UnavailableError,
)
from kvmesh.client.status import TRAILER, encode
from kvmesh.client.transport import Method, Reply, Request, RpcFailure
from kvmesh.client.types import Prefilling, Queued
from kvmesh.protos import admin, pb

_CODES: tuple[tuple[type[KVMeshError], str, pb.ErrorReason.ValueType], ...] = (
    (InvalidRequestError, "INVALID_ARGUMENT", pb.ERROR_REASON_INVALID_FIELD),
    (AuthenticationError, "UNAUTHENTICATED", pb.ERROR_REASON_WRONG_KEY),
    (PermissionDeniedError, "PERMISSION_DENIED", pb.ERROR_REASON_NOT_ALLOWED),
    (ModelNotFoundError, "NOT_FOUND", pb.ERROR_REASON_UNKNOWN_MODEL),
    (DuplicateRequestError, "ALREADY_EXISTS", pb.ERROR_REASON_DUPLICATE_REQUEST_ID),
    (KVFormatError, "FAILED_PRECONDITION", pb.ERROR_REASON_KV_FORMAT),
    (NeverFitsError, "FAILED_PRECONDITION", pb.ERROR_REASON_NEVER_FITS),
    (ResumeError, "FAILED_PRECONDITION", pb.ERROR_REASON_RESUME_MISMATCH),
    (OverCapacityError, "RESOURCE_EXHAUSTED", pb.ERROR_REASON_OVER_CAPACITY),
    (DeadlineExceededError, "DEADLINE_EXCEEDED", pb.ERROR_REASON_DEADLINE_EXCEEDED),
    (UnavailableError, "UNAVAILABLE", pb.ERROR_REASON_UNSPECIFIED),
    (RequestCancelledError, "CANCELLED", pb.ERROR_REASON_UNSPECIFIED),
    (KVMeshError, "INTERNAL", pb.ERROR_REASON_INTERNAL),
)


class FakeServer:
    """The server behind both fake transports: answers, injected failures, and a record.

    answers: one text per generation, in order; the last one repeats; each word of a
        text is one token
    requests: all requests received, in order, including failed ones
    slept_s: total back-off time; the fake clock passes it instantly
    open_streams: streams in progress
    """

    def __init__(self, answers: Sequence[str] = ("Hello.",)) -> None:
        if not answers:
            raise ValueError("answers must not be empty; give at least one text")
        self._answers = deque(answers)
        self._failures: deque[tuple[KVMeshError, int]] = deque()
        self._waits: list[Queued | Prefilling] = []
        self.requests: list[Any] = []
        self.slept_s = 0.0
        self.open_streams = 0

    def fail(self, error: KVMeshError, *, times: int = 1, after_tokens: int = 0) -> None:
        """Make the next `times` calls fail; streams fail after `after_tokens` tokens."""
        self._failures.extend([(error, after_tokens)] * times)

    def wait(self, *events: Queued | Prefilling) -> None:
        """Make the next stream that does not fail send these before its output."""
        self._waits.extend(events)

    def unary(self, request: Any) -> Any:
        self.requests.append(copy.deepcopy(request))
        if self._failures:
            raise _failure_of(self._failures.popleft()[0])
        match request:
            case pb.GenerateRequest():
                return self._generate(request)
            case pb.TokenizeRequest():
                return pb.TokenizeResponse(
                    token_ids=range(_prompt_tokens(request.prompt)), max_model_len=8192
                )
            case pb.AbortRequest():
                return pb.AbortResponse(aborted=self.open_streams > 0)
            case pb.EstimateBudgetRequest():
                tokens = request.prompt_tokens or _prompt_tokens(request.prompt)
                return pb.EstimateBudgetResponse(
                    prompt_tokens=tokens,
                    max_tokens=request.max_tokens or 256,
                    feasible_now=True,
                    feasible_ever=True,
                    projected_wait_s=0.0,
                    group="fake",
                )
            case pb.ExplainRequest():
                return pb.ExplainResponse(request_id=request.request_id)
            case pb.GetModelInfoRequest():
                return pb.GetModelInfoResponse(model="fake", max_model_len=8192, vocab_size=50000)
            case pb.GetTenantLoadsRequest():
                return pb.GetTenantLoadsResponse(tenant="fake", running=self.open_streams)
            case admin.ListGroupsRequest():
                return admin.ListGroupsResponse()
            case _:
                return admin.GetLoadsResponse()

    def events(self, request: pb.GenerateRequest) -> Iterator[pb.GenerateStreamResponse]:
        self.requests.append(copy.deepcopy(request))
        failure, after_tokens = self._failures.popleft() if self._failures else (None, 0)
        if failure is not None and after_tokens == 0:
            raise _failure_of(failure)
        waits, self._waits = self._waits, []
        yield from (_wait_event(event) for event in waits if isinstance(event, Queued))
        words = self._words()
        seed = request.sampling_params.seed
        yield pb.GenerateStreamResponse(
            started=pb.Started(
                request_id=request.request_id, model="fake", group="fake", kv_format="exact",
                seed=seed, prompt_tokens=_prompt_tokens(request.prompt),
            )
        )  # fmt: skip
        yield from (_wait_event(event) for event in waits if isinstance(event, Prefilling))
        received = len(request.resume.choices[0].token_ids) if request.resume.choices else 0
        for position in range(received, len(words)):
            if failure is not None and position - received == after_tokens:
                raise _failure_of(failure)
            yield pb.GenerateStreamResponse(
                delta=pb.Delta(text=words[position], token_ids=[position], token_offset=position)
            )
        if failure is not None:
            raise _failure_of(failure)
        self._next_answer()
        yield pb.GenerateStreamResponse(
            choice_finished=pb.ChoiceFinished(finish_reason=pb.FINISH_REASON_STOP)
        )
        yield pb.GenerateStreamResponse(usage=_usage(request, len(words)))

    def sleep(self, seconds: float) -> None:
        self.slept_s += seconds

    def _generate(self, request: pb.GenerateRequest) -> pb.GenerateResponse:
        words = self._words()
        self._next_answer()
        return pb.GenerateResponse(
            request_id=request.request_id,
            model="fake",
            seed=request.sampling_params.seed,
            choices=[
                pb.Choice(
                    index=index,
                    text="".join(words),
                    token_ids=range(len(words)),
                    finish_reason=pb.FINISH_REASON_STOP,
                )
                for index in range(_choices(request))
            ],
            usage=_usage(request, len(words)),
        )

    def _words(self) -> list[str]:
        return re.findall(r"\s*\S+|\s+$", self._answers[0])

    def _next_answer(self) -> None:
        if len(self._answers) > 1:
            self._answers.popleft()


class FakeTransport:
    """For Client(transport=...)."""

    def __init__(self, answers: Sequence[str] = ("Hello.",)) -> None:
        self.server = FakeServer(answers)
        self._closed = False

    def unary(
        self, method: Method[Request, Reply], request: Request, timeout_s: float | None
    ) -> Reply:
        self._check_open()
        return cast(Reply, self.server.unary(request))

    def stream(self, request: pb.GenerateRequest, timeout_s: float | None) -> FakeStreamCall:
        self._check_open()
        return FakeStreamCall(self.server, request)

    def now(self) -> float:
        return self.server.slept_s

    def sleep(self, seconds: float) -> None:
        self.server.sleep(seconds)

    def close(self) -> None:
        self._closed = True

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("the client has been closed")


class AsyncFakeTransport:
    """For AsyncClient(transport=...)."""

    def __init__(self, answers: Sequence[str] = ("Hello.",)) -> None:
        self._blocking = FakeTransport(answers)
        self.server = self._blocking.server

    async def unary(
        self, method: Method[Request, Reply], request: Request, timeout_s: float | None
    ) -> Reply:
        await asyncio.sleep(0)
        return self._blocking.unary(method, request, timeout_s)

    def stream(self, request: pb.GenerateRequest, timeout_s: float | None) -> AsyncFakeStreamCall:
        return AsyncFakeStreamCall(self._blocking.stream(request, timeout_s))

    def now(self) -> float:
        return self._blocking.now()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(0)
        self._blocking.sleep(seconds)

    async def close(self) -> None:
        self._blocking.close()


class FakeStreamCall:
    def __init__(self, server: FakeServer, request: pb.GenerateRequest) -> None:
        self._server = server
        self._events = server.events(request)
        self._open = True
        server.open_streams += 1

    def read(self) -> pb.GenerateStreamResponse | None:
        if not self._open:
            raise RpcFailure("CANCELLED", "the call has ended")
        try:
            return next(self._events)
        except StopIteration:
            self.cancel()
            return None
        except RpcFailure:
            self.cancel()
            raise

    def cancel(self) -> None:
        if self._open:
            self._open = False
            self._server.open_streams -= 1


class AsyncFakeStreamCall:
    def __init__(self, call: FakeStreamCall) -> None:
        self._call = call

    async def read(self) -> pb.GenerateStreamResponse | None:
        await asyncio.sleep(0)
        return self._call.read()

    def cancel(self) -> None:
        self._call.cancel()


def _wait_event(event: Queued | Prefilling) -> pb.GenerateStreamResponse:
    if isinstance(event, Queued):
        return pb.GenerateStreamResponse(queued=pb.Queued(**dataclasses.asdict(event)))
    return pb.GenerateStreamResponse(prefilling=pb.Prefilling(**dataclasses.asdict(event)))


def _prompt_tokens(prompt: pb.Prompt) -> int:
    if prompt.WhichOneof("kind") == "token_ids":
        return len(prompt.token_ids.ids)
    texts = [prompt.text, *(message.content for message in prompt.chat.messages)]
    return sum(len(text.split()) for text in texts)


def _choices(request: pb.GenerateRequest) -> int:
    return max(1, request.sampling_params.n)


def _usage(request: pb.GenerateRequest, completion_tokens: int) -> pb.Usage:
    return pb.Usage(
        prompt_tokens=_prompt_tokens(request.prompt),
        completion_tokens=completion_tokens * _choices(request),
        group="fake",
        kv_format="exact",
    )


def _failure_of(error: KVMeshError) -> RpcFailure:
    """The failed attempt that the SDK would report as `error`."""
    code, reason = next((code, reason) for cls, code, reason in _CODES if isinstance(error, cls))
    if error.reason is not None:
        reason = pb.ErrorReason.Value(f"ERROR_REASON_{error.reason}")
    detail = pb.Error(
        code=grpc.StatusCode[code].value[0],
        reason=reason,
        message=error.message,
        request_id=error.request_id,
        retry_after_s=error.retry_after_s,
        needed_bytes=error.needed_bytes,
        available_bytes=error.available_bytes,
    )
    for violation in error.violations:
        detail.field_violations.add(field=violation.field, description=violation.description)
    for verdict in error.groups:
        detail.groups.add(
            group=verdict.group,
            needed_bytes=verdict.needed_bytes,
            available_bytes=verdict.available_bytes,
            reason=verdict.reason,
        )
    message, trailer = encode(detail)
    return RpcFailure(code, message, ((TRAILER, trailer),))
