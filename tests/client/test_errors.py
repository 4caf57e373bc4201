"""The error tree: what each failed call raises, and that nothing else is raised."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import Message
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, QuotaFailure, RetryInfo
from google.rpc.status_pb2 import Status
from grpc_status import rpc_status

import kvmesh
from kvmesh import Client, KVMeshError, RetryPolicy
from kvmesh.client import errors
from kvmesh.client.failures import error_of
from kvmesh.client.status import MAX_ERROR_BYTES, TRAILER, decode, encode
from kvmesh.client.transport import RpcFailure
from kvmesh.protos import pb, pb_grpc
from tests.client.servicer import ScriptedServicer, aborting, failing, serving

CASES = [
    (pb.ERROR_REASON_INVALID_FIELD, grpc.StatusCode.INVALID_ARGUMENT, errors.InvalidRequestError),
    (pb.ERROR_REASON_MISSING_KEY, grpc.StatusCode.UNAUTHENTICATED, errors.AuthenticationError),
    (pb.ERROR_REASON_WRONG_KEY, grpc.StatusCode.UNAUTHENTICATED, errors.AuthenticationError),
    (pb.ERROR_REASON_NOT_ALLOWED, grpc.StatusCode.PERMISSION_DENIED, errors.PermissionDeniedError),
    (pb.ERROR_REASON_UNKNOWN_MODEL, grpc.StatusCode.NOT_FOUND, errors.ModelNotFoundError),
    (
        pb.ERROR_REASON_DUPLICATE_REQUEST_ID,
        grpc.StatusCode.ALREADY_EXISTS,
        errors.DuplicateRequestError,
    ),
    (pb.ERROR_REASON_NEVER_FITS, grpc.StatusCode.FAILED_PRECONDITION, errors.NeverFitsError),
    (pb.ERROR_REASON_KV_FORMAT, grpc.StatusCode.FAILED_PRECONDITION, errors.KVFormatError),
    (pb.ERROR_REASON_UNSUPPORTED, grpc.StatusCode.INVALID_ARGUMENT, errors.InvalidRequestError),
    (pb.ERROR_REASON_RESUME_MISMATCH, grpc.StatusCode.FAILED_PRECONDITION, errors.ResumeError),
    (pb.ERROR_REASON_OVER_CAPACITY, grpc.StatusCode.RESOURCE_EXHAUSTED, errors.OverCapacityError),
    (pb.ERROR_REASON_QUEUE_FULL, grpc.StatusCode.RESOURCE_EXHAUSTED, errors.OverCapacityError),
    (pb.ERROR_REASON_QUOTA, grpc.StatusCode.FAILED_PRECONDITION, errors.NeverFitsError),
    (
        pb.ERROR_REASON_DEADLINE_EXCEEDED,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        errors.DeadlineExceededError,
    ),
    (
        pb.ERROR_REASON_DEADLINE_UNREACHABLE,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        errors.DeadlineExceededError,
    ),
    (pb.ERROR_REASON_ENGINE_LOST, grpc.StatusCode.UNAVAILABLE, errors.UnavailableError),
    (pb.ERROR_REASON_DRAINING, grpc.StatusCode.UNAVAILABLE, errors.UnavailableError),
    (pb.ERROR_REASON_NOT_READY, grpc.StatusCode.UNAVAILABLE, errors.UnavailableError),
    (pb.ERROR_REASON_INTERNAL, grpc.StatusCode.INTERNAL, errors.ServerError),
    (pb.ERROR_REASON_REQUEST_FAULT, grpc.StatusCode.INTERNAL, errors.ServerError),
]


def full_error(reason: pb.ErrorReason.ValueType, code: grpc.StatusCode) -> pb.Error:
    return pb.Error(
        code=code.value[0],
        reason=reason,
        message="größer als erlaubt: 97 % 漢",
        field_violations=[pb.FieldViolation(field="sampling_params.top_p", description="is NaN")],
        retry_after_s=2.5,
        needed_bytes=2**40,
        available_bytes=2**30,
        groups=[pb.GroupVerdict(group="g0", needed_bytes=5, available_bytes=3, reason="full")],
        request_id="abc",
    )


def assert_carries_everything(error: KVMeshError) -> None:
    assert str(error) == "größer als erlaubt: 97 % 漢"
    assert error.field == "sampling_params.top_p"
    assert error.violations == (errors.FieldViolation("sampling_params.top_p", "is NaN"),)
    assert error.retry_after_s == 2.5
    assert (error.needed_bytes, error.available_bytes) == (2**40, 2**30)
    assert error.groups == (errors.GroupVerdict("g0", 5, 3, "full"),)
    assert error.request_id == "abc"


@pytest.mark.parametrize(("reason", "code", "expected"), CASES)
@pytest.mark.parametrize("streaming", [False, True])
def test_every_error_arrives_complete_and_typed(
    reason: pb.ErrorReason.ValueType,
    code: grpc.StatusCode,
    expected: type[KVMeshError],
    streaming: bool,
) -> None:
    servicer = ScriptedServicer(failing(full_error(reason, code)))
    with (
        serving(servicer) as target,
        Client(target, retry=kvmesh.NO_RETRY) as client,
        pytest.raises(KVMeshError) as caught,
    ):
        if streaming:
            list(client.generate_stream("hi"))
        else:
            client.generate("hi")
    error = caught.value
    assert type(error) is expected
    assert error.code == code.name
    assert error.reason == pb.ErrorReason.Name(reason).removeprefix("ERROR_REASON_")
    assert_carries_everything(error)
    assert_carries_everything(pickle.loads(pickle.dumps(error)))


@pytest.mark.parametrize("code", [code for code in grpc.StatusCode if code.value[0]])
def test_every_bare_status_becomes_an_error_of_the_tree(code: grpc.StatusCode) -> None:
    with (
        serving(ScriptedServicer(aborting(code, "says a proxy"))) as target,
        Client(target, retry=kvmesh.NO_RETRY) as client,
        pytest.raises(KVMeshError, match="says a proxy") as caught,
    ):
        client.generate("hi")
    assert caught.value.code == code.name
    assert caught.value.__cause__ is None


def test_the_status_has_googles_details_as_well() -> None:
    detail = full_error(pb.ERROR_REASON_QUOTA, grpc.StatusCode.FAILED_PRECONDITION)
    with serving(ScriptedServicer(failing(detail))) as target:
        with grpc.insecure_channel(target) as channel, pytest.raises(grpc.RpcError) as caught:
            pb_grpc.KVMeshStub(channel).Generate(pb.GenerateRequest())
        call: Any = caught.value
        # Raises ValueError unless code and message are those of the call.
        status = rpc_status.from_call(call)
    unpacked = (message for detail in status.details for message in _unpacked(detail))
    found: dict[type[Message], Any] = {type(message): message for message in unpacked}
    assert found[pb.Error] == detail
    assert found[ErrorInfo].reason == "QUOTA"
    assert found[ErrorInfo].metadata["needed_bytes"] == str(2**40)
    assert found[RetryInfo].retry_delay.ToMilliseconds() == 2500
    assert found[QuotaFailure].violations
    assert found[BadRequest].field_violations[0].field == "sampling_params.top_p"


@pytest.mark.parametrize(
    ("error", "kinds"),
    [
        (pb.Error(), {ErrorInfo}),
        # Generic clients try again after a RetryInfo, so what has no time has none.
        (pb.Error(reason=pb.ERROR_REASON_NEVER_FITS, needed_bytes=5), {ErrorInfo}),
        (pb.Error(retry_after_s=0.0), {ErrorInfo, RetryInfo}),
        (pb.Error(retry_after_s=1.5), {ErrorInfo, RetryInfo}),
        (pb.Error(retry_after_s=-1.0), {ErrorInfo}),
        (pb.Error(retry_after_s=float("nan")), {ErrorInfo}),
        (pb.Error(retry_after_s=float("inf")), {ErrorInfo}),
        (pb.Error(reason=pb.ERROR_REASON_QUOTA), {ErrorInfo, QuotaFailure}),
        (pb.Error(field_violations=[pb.FieldViolation(field="n")]), {ErrorInfo, BadRequest}),
    ],
)
def test_googles_details_say_no_more_than_the_error(
    error: pb.Error, kinds: set[type[Message]]
) -> None:
    _, trailer = encode(error)
    details = Status.FromString(trailer).details
    found = {type(message): message for x in details for message in _unpacked(x)}
    assert found.keys() == {pb.Error, *kinds}
    if retry := found.get(RetryInfo):
        assert retry.retry_delay.ToMilliseconds() == 1000 * error.retry_after_s  # type: ignore[attr-defined]
    metadata = found[ErrorInfo].metadata  # type: ignore[attr-defined]
    assert metadata == ({"needed_bytes": "5"} if error.needed_bytes else {})


def _unpacked(packed: AnyMessage) -> Iterator[Message]:
    for kind in (pb.Error, ErrorInfo, RetryInfo, QuotaFailure, BadRequest):
        message = kind()
        if packed.Unpack(message):
            yield message


def test_a_reason_from_a_newer_server_is_its_number() -> None:
    detail = pb.Error(code=9, reason=99, message="new")  # type: ignore[arg-type]
    with (
        serving(ScriptedServicer(failing(detail))) as target,
        Client(target, retry=kvmesh.NO_RETRY) as client,
        pytest.raises(errors.ServerError) as caught,
    ):
        client.generate("hi")
    assert (caught.value.reason, caught.value.code) == ("99", "FAILED_PRECONDITION")


def test_an_unreachable_server_is_unavailable() -> None:
    with (
        Client("localhost:1", retry=RetryPolicy(max_connect_s=0.2)) as client,
        pytest.raises(errors.UnavailableError) as caught,
    ):
        client.generate("hi")
    assert isinstance(caught.value, ConnectionError)


def test_a_request_beyond_the_servers_limit_names_the_prompt() -> None:
    with (
        serving(ScriptedServicer(), max_receive_bytes=1000) as target,
        Client(target) as client,
        pytest.raises(errors.InvalidRequestError) as caught,
    ):
        client.generate("x" * 2000)
    assert caught.value.field == "prompt"


def test_encoded_errors_stay_within_header_limits() -> None:
    error = full_error(pb.ERROR_REASON_OVER_CAPACITY, grpc.StatusCode.RESOURCE_EXHAUSTED)
    error.message = "é" * 100_000
    for number in range(500):
        error.groups.add(group=f"group-{number}", reason="漢" * 1000)
        error.field_violations.add(field="f" * 1000, description="d" * 100_000)
    sentence, trailer = encode(error)
    decoded = decode(trailer)
    assert len(sentence.encode()) < 1024
    assert len(trailer) < 4096
    assert decoded is not None
    assert decoded.ByteSize() <= MAX_ERROR_BYTES
    assert decoded.retry_after_s == 2.5
    assert decoded.field_violations[0].field == "sampling_params.top_p"
    assert sentence == decoded.message
    assert len(error.groups) == 501, "the caller's Error is not modified"


@pytest.mark.parametrize("trailer", [b"\xff\xff\xff", b"", Status(code=5).SerializeToString()])
def test_a_trailer_without_an_error_has_none(trailer: bytes) -> None:
    assert decode(trailer) is None


def test_the_tree_matches_the_drawing() -> None:
    public = {
        value
        for value in vars(kvmesh).values()
        if isinstance(value, type) and issubclass(value, KVMeshError)
    }
    drawn = errors.__doc__ or ""
    for cls in public:
        assert cls.__name__ in drawn
        assert isinstance(pickle.loads(pickle.dumps(cls("sentence"))), cls)
    assert issubclass(errors.DeadlineExceededError, TimeoutError)


@pytest.mark.parametrize(
    ("details", "message"),
    [
        (
            "failed to connect to all addresses; last error: UNKNOWN: ipv6:%5B::1%5D:1: "
            "Failed to connect to remote host: Connection refused",
            "connection refused",
        ),
        (
            "failed to connect to all addresses; last error: UNKNOWN: ipv4:127.0.0.1:1: "
            "Failed to connect to remote host: connect: Connection refused (111)",
            "connection refused",
        ),
        (
            "errors resolving no.such.host:9000: [field:hostname lookup error:address lookup "
            "failed for no.such.host:9000: Domain name not found]",
            "there is no host no.such.host",
        ),
        (
            "failed to connect to all addresses; last error: INTERNAL: ipv4:127.0.0.1:80: Failed "
            "parsing HTTP/2 (Expected SETTINGS frame as the first frame, got frame type 80)",
            "what answers there does not speak gRPC",
        ),
        ("Received http2 header with status: 404", "something else answers there, with HTTP"),
        (
            "failed to connect to all addresses; last error: FAILED_PRECONDITION: unix:/nope: "
            "connect failed: addr: unix:/nope error: No such file or directory",
            "no connection: no such file or directory",
        ),
        ("words of a later gRPC", "words of a later gRPC"),
    ],
)
def test_why_there_is_no_connection_is_said_in_plain_words(details: str, message: str) -> None:
    error = error_of(RpcFailure("UNAVAILABLE", details))
    assert isinstance(error, errors.UnavailableError)
    assert str(error).startswith(message)
    assert "last error" not in str(error)


def test_a_proxy_without_the_route_is_no_model_that_is_not_found() -> None:
    error = error_of(RpcFailure("NOT_FOUND", "no route"))
    assert type(error) is errors.ServerError and error.code == "NOT_FOUND"


def answered(error: pb.Error) -> RpcFailure:
    """A failed attempt, as a server ends it."""
    sentence, trailer = encode(error)
    code = next(code.name for code in grpc.StatusCode if code.value[0] == error.code)
    return RpcFailure(code, sentence, (("x-proxy", "text"), (TRAILER, "text"), (TRAILER, trailer)))


@pytest.mark.parametrize(
    ("code", "sentence", "expected"),
    [
        ("UNAVAILABLE", "the handshake of rank 1 failed", errors.UnavailableError),
        ("INTERNAL", "rank 1 ended with Socket closed", errors.ServerError),
        ("UNKNOWN", "rank 1 ended with Broken pipe", errors.ServerError),
        ("NOT_FOUND", "there is no model m", errors.ModelNotFoundError),
        ("RESOURCE_EXHAUSTED", "no room for 9 bytes", errors.OverCapacityError),
    ],
)
def test_what_our_server_says_is_kept_and_what_it_leaves_out_is_empty(
    code: str, sentence: str, expected: type[KVMeshError]
) -> None:
    detail = pb.Error(code=grpc.StatusCode[code].value[0], message=sentence)
    error = error_of(answered(detail))
    assert (type(error), error.message, error.code) == (expected, sentence, code)
    assert (error.reason, error.request_id, error.violations, error.groups) == (None, "", (), ())
    assert (error.retry_after_s, error.needed_bytes, error.available_bytes) == (None, None, None)
    detail.retry_after_s = detail.needed_bytes = detail.available_bytes = 0
    error = error_of(answered(detail))
    assert (error.retry_after_s, error.needed_bytes, error.available_bytes) == (0, 0, 0)


@pytest.mark.parametrize("code", ["INTERNAL", "UNKNOWN"])
def test_a_connection_that_breaks_makes_the_server_unavailable(code: str) -> None:
    details = "Received RST_STREAM with error code 2"
    error = error_of(RpcFailure(code, details))
    assert (type(error), error.code) == (errors.UnavailableError, code)
    assert error.message == f"the connection was lost ({details})"
    error = error_of(RpcFailure(code, "KeyError in a proxy"))
    assert (type(error), error.message) == (errors.ServerError, "KeyError in a proxy")


def test_a_status_without_words_has_a_message() -> None:
    assert error_of(RpcFailure("ABORTED", "")).message == "the call failed with ABORTED"


def test_only_an_exhausted_server_has_found_a_request_too_large() -> None:
    details = "Received message larger than max (2000 vs. 1000)"
    error = error_of(RpcFailure("RESOURCE_EXHAUSTED", details))
    assert type(error) is errors.InvalidRequestError
    assert error.message == "prompt: larger than the server accepts; shorten it"
    assert error.violations == (
        errors.FieldViolation("prompt", "larger than the server accepts; shorten it"),
    )
    assert type(error_of(RpcFailure("ABORTED", details))) is errors.ServerError
