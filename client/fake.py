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
import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, cast

import grpc

from kvmesh.client.checks import Metadata, check_seconds
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
from kvmesh.client.fake_output import (
    DEFAULT_MAX_TOKENS,
    FakeAnswer,
    FakeOutput,
    fake_output,
    fake_prompt_logprobs,
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

    It obeys max_tokens, min_tokens, stop, stop_token_ids, include_stop_str_in_output, ignore_eos,
    logprobs, prompt_logprobs and n, and reports the seed. It does not sample: all choices of a
    request are the same.

    answers: one per generation, in order; the last one repeats; each word of a text is one token
    requests: all requests received, in order, including failed ones
    metadata: that of each request
    slept_s: total back-off time; the fake clock passes it instantly
    open_streams: streams in progress
    """

    def __init__(self, answers: Sequence[str | FakeAnswer] = ("Hello.",)) -> None:
        if not answers:
            raise ValueError("answers must not be empty; give at least one text")
        self._answers = deque(answers)
        self._failures: deque[tuple[KVMeshError, int]] = deque()
        self._outage: tuple[KVMeshError, float] | None = None
        self._waits: list[Queued | Prefilling] = []
        self._seeds = itertools.count(1)
        self.requests: list[Any] = []
        self.metadata: list[dict[str, str | bytes]] = []
        self.slept_s = 0.0
        self.open_streams = 0

    def fail(self, error: KVMeshError, *, times: int = 1, after_tokens: int = 0) -> None:
        """Make the next `times` calls fail; streams fail after `after_tokens` tokens."""
        self._failures.extend([(error, after_tokens)] * times)

    def fail_for(self, error: KVMeshError, seconds: float) -> None:
        """Make all calls fail until this much time has passed on the fake clock."""
        check_seconds("seconds", seconds)
        self._outage = (error, self.slept_s + seconds)

    def wait(self, *events: Queued | Prefilling) -> None:
        """Make the next stream that does not fail send these before its output."""
        self._waits.extend(events)

    def unary(self, request: Any, metadata: Metadata = ()) -> Any:
        self._receive(request, metadata)
        if self._failures:
            raise _failure_of(self._failures.popleft()[0])
        match request:
            case pb.GenerateRequest():
                return self._generate(request)
            case pb.TokenizeRequest():
                return pb.TokenizeResponse(
                    token_ids=range(_prompt_tokens(request.prompt)), max_model_len=8192
                )
            case pb.DetokenizeRequest():
                pieces = [f" {token}" for token in request.token_ids]
                return pb.DetokenizeResponse(
                    text="".join(pieces), token_bytes=[piece.encode() for piece in pieces]
                )
            case pb.AbortRequest():
                return pb.AbortResponse(aborted=self.open_streams > 0)
            case pb.EstimateBudgetRequest():
                tokens = request.prompt_tokens or _prompt_tokens(request.prompt)
                return pb.EstimateBudgetResponse(
                    prompt_tokens=tokens,
                    max_tokens=(
                        request.max_tokens if request.HasField("max_tokens") else DEFAULT_MAX_TOKENS
                    ),
                    feasible_now=True,
                    feasible_ever=True,
                    projected_wait_s=0.0,
                    group="fake",
                )
            case pb.ExplainRequest():
                return self._explain(request)
            case pb.GetModelInfoRequest():
                return pb.GetModelInfoResponse(
                    model="fake",
                    max_model_len=8192,
                    vocab_size=50000,
                    default_sampling_params=pb.SamplingDefaults(
                        temperature=0.7, top_k=20, max_tokens=DEFAULT_MAX_TOKENS
                    ),
                )
            case pb.GetTenantLoadsRequest():
                return pb.GetTenantLoadsResponse(tenant="fake", running=self.open_streams)
            case admin.ListGroupsRequest():
                return admin.ListGroupsResponse()
            case _:
                return admin.GetLoadsResponse()

    def events(
        self, request: pb.GenerateRequest, metadata: Metadata = ()
    ) -> Iterator[pb.GenerateStreamResponse]:
        self._receive(request, metadata)
        failure, after_tokens = self._failures.popleft() if self._failures else (None, 0)
        if failure is not None and after_tokens == 0:
            raise _failure_of(failure)
        waits, self._waits = self._waits, []
        yield from (_wait_event(event) for event in waits if isinstance(event, Queued))
        output = fake_output(self._answers[0], request)
        yield pb.GenerateStreamResponse(
            started=pb.Started(
                request_id=request.request_id, model=request.model or "fake",
                model_revision="fake", group="fake", kv_format="exact", seed=self._seed(request),
                prompt_tokens=_prompt_tokens(request.prompt),
            )
        )  # fmt: skip
        yield from (_wait_event(event) for event in waits if isinstance(event, Prefilling))
        scores = fake_prompt_logprobs(_prompt_tokens(request.prompt), request.sampling_params)
        if scores is not None and not request.resume.prompt_logprobs_received:
            yield pb.GenerateStreamResponse(prompt_logprobs=scores)
        for sent, event in enumerate(_output_events(request, output)):
            if failure is not None and sent == after_tokens:
                raise _failure_of(failure)
            yield event
        if failure is not None:
            raise _failure_of(failure)
        self._next_answer()
        yield pb.GenerateStreamResponse(usage=_usage(request, output))

    def sleep(self, seconds: float) -> None:
        self.slept_s += seconds

    def _receive(self, request: Any, metadata: Metadata) -> None:
        self.requests.append(copy.deepcopy(request))
        self.metadata.append(dict(metadata))
        if self._outage is not None and self.slept_s < self._outage[1]:
            raise _failure_of(self._outage[0])

    def _generate(self, request: pb.GenerateRequest) -> pb.GenerateResponse:
        output = fake_output(self._answers[0], request)
        self._next_answer()
        reply = pb.GenerateResponse(
            request_id=request.request_id,
            model=request.model or "fake",
            seed=self._seed(request),
            choices=[output.choice] * _num_choices(request),
            usage=_usage(request, output),
            prompt_logprobs=fake_prompt_logprobs(
                _prompt_tokens(request.prompt), request.sampling_params
            ),
        )
        for index, choice in enumerate(reply.choices):
            choice.index = index
        return reply

    def _explain(self, request: pb.ExplainRequest) -> pb.ExplainResponse:
        """A decision for each time that the request was received."""
        placed = pb.PlacementDecision(outcome="placed", group="fake")
        received = [x for x in self.requests if isinstance(x, pb.GenerateRequest)]
        ids = [x.request_id for x in received]
        return pb.ExplainResponse(
            request_id=request.request_id, decisions=[placed] * ids.count(request.request_id)
        )

    def _seed(self, request: pb.GenerateRequest) -> int:
        params = request.sampling_params
        return params.seed if params.HasField("seed") else next(self._seeds)

    def _next_answer(self) -> None:
        if len(self._answers) > 1:
            self._answers.popleft()


class FakeTransport:
    """For Client(transport=...)."""

    def __init__(self, answers: Sequence[str | FakeAnswer] = ("Hello.",)) -> None:
        self.server = FakeServer(answers)
        self._closed = False

    def unary(
        self,
        method: Method[Request, Reply],
        request: Request,
        timeout_s: float | None,
        metadata: Metadata,
    ) -> Reply:
        self._check_open()
        return cast(Reply, self.server.unary(request, metadata))

    def stream(
        self, request: pb.GenerateRequest, timeout_s: float | None, metadata: Metadata
    ) -> FakeStreamCall:
        self._check_open()
        return FakeStreamCall(self.server, request, metadata)

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

    def __init__(self, answers: Sequence[str | FakeAnswer] = ("Hello.",)) -> None:
        self._blocking = FakeTransport(answers)
        self.server = self._blocking.server

    async def unary(
        self,
        method: Method[Request, Reply],
        request: Request,
        timeout_s: float | None,
        metadata: Metadata,
    ) -> Reply:
        await asyncio.sleep(0)
        return self._blocking.unary(method, request, timeout_s, metadata)

    def stream(
        self, request: pb.GenerateRequest, timeout_s: float | None, metadata: Metadata
    ) -> AsyncFakeStreamCall:
        return AsyncFakeStreamCall(self._blocking.stream(request, timeout_s, metadata))

    def now(self) -> float:
        return self._blocking.now()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(0)
        self._blocking.sleep(seconds)

    async def close(self) -> None:
        self._blocking.close()


class FakeStreamCall:
    def __init__(self, server: FakeServer, request: pb.GenerateRequest, metadata: Metadata) -> None:
        self._server = server
        self._events = server.events(request, metadata)
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


def _num_choices(request: pb.GenerateRequest) -> int:
    return max(1, request.sampling_params.n)


def _output_events(
    request: pb.GenerateRequest, output: FakeOutput
) -> Iterator[pb.GenerateStreamResponse]:
    """What the client has not received: the tokens of all choices in turn, then their ends."""
    resumed = {choice.index: choice for choice in request.resume.choices}
    live = [index for index in range(_num_choices(request)) if index not in resumed]
    live += [index for index, choice in resumed.items() if not choice.finished]
    for position, piece in enumerate(output.pieces):
        for index in sorted(live):
            if index not in resumed or len(resumed[index].token_ids) <= position:
                delta = pb.Delta(
                    index=index,
                    text=piece,
                    token_ids=[position],
                    token_offset=position,
                    logprobs=output.logprobs(position),
                )
                yield pb.GenerateStreamResponse(delta=delta)
    for index in sorted(live):
        count = len(output.pieces)
        for part in output.parts(index, resumed.get(index)):
            part.token_offset = count
            yield pb.GenerateStreamResponse(delta=part)
        finished = pb.ChoiceFinished(index=index, finish_reason=output.choice.finish_reason)
        match output.choice.WhichOneof("matched_stop"):
            case "matched_stop_string":
                finished.matched_stop_string = output.choice.matched_stop_string
            case "matched_stop_token_id":
                finished.matched_stop_token_id = output.choice.matched_stop_token_id
        yield pb.GenerateStreamResponse(choice_finished=finished)


def _usage(request: pb.GenerateRequest, output: FakeOutput) -> pb.Usage:
    return pb.Usage(
        prompt_tokens=_prompt_tokens(request.prompt),
        completion_tokens=len(output.pieces) * _num_choices(request),
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
