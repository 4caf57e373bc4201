"""The table that maps errors to the wire; unknown errors reveal nothing."""

from __future__ import annotations

import inspect
import pickle
import re
from pathlib import Path

import grpc
import msgspec
import pytest

from kvmesh.client.status import decode, encode
from kvmesh.cluster import errors as cluster
from kvmesh.cluster.errors import Failure
from kvmesh.cluster.ingress.error_table import (
    count_by_reason,
    http_status,
    is_expected,
    reason_label,
    status_code,
    to_wire,
)
from kvmesh.cluster.routing import errors as routing
from kvmesh.workers.errors import InvalidFieldError, PoolCapacityError, WorkerDiedError

S = grpc.StatusCode
SECRETS = "rank 1 (pid 4242) at 10.1.2.3:6379 died, see /var/tmp/engine.log"

# error, code, reason, status over HTTP
TABLE: list[tuple[Exception, grpc.StatusCode, str, int]] = [
    (
        InvalidFieldError("prompt.text", "must not be empty"),
        S.INVALID_ARGUMENT,
        "invalid_field",
        400,
    ),
    (
        cluster.OversizedRequestError("request", "is large"),
        S.INVALID_ARGUMENT,
        "invalid_field",
        413,
    ),
    (cluster.UnknownPathError("GET", "/v2"), S.UNIMPLEMENTED, "unsupported", 404),
    (cluster.UnauthenticatedError(missing=True), S.UNAUTHENTICATED, "missing_key", 401),
    (cluster.UnauthenticatedError(missing=False), S.UNAUTHENTICATED, "wrong_key", 401),
    (cluster.NotAllowedError(), S.PERMISSION_DENIED, "not_allowed", 403),
    (cluster.UnsupportedFieldError("adapter", "is new"), S.INVALID_ARGUMENT, "unsupported", 400),
    (routing.NoAllowedFormatError({"g0": "int4"}), S.FAILED_PRECONDITION, "kv_format", 400),
    (cluster.UnknownModelError("a", "b"), S.NOT_FOUND, "unknown_model", 404),
    (cluster.ResumeMismatchError("other"), S.FAILED_PRECONDITION, "resume_mismatch", 400),
    (cluster.ContextExceededError(9, 8, 700, 600), S.FAILED_PRECONDITION, "never_fits", 400),
    (cluster.RequestDeadlineError(), S.DEADLINE_EXCEEDED, "deadline_exceeded", 504),
    (cluster.EngineLostError(), S.UNAVAILABLE, "engine_lost", 503),
    (cluster.RequestFaultError("no token"), S.INTERNAL, "request_fault", 500),
    (cluster.IngressBusyError("busy"), S.RESOURCE_EXHAUSTED, "queue_full", 429),
    (cluster.DrainingError(), S.UNAVAILABLE, "draining", 503),
    (cluster.NotReadyError(), S.UNAVAILABLE, "not_ready", 503),
    (routing.RequestIdInUseError("r"), S.ALREADY_EXISTS, "duplicate_request_id", 409),
    (
        routing.ExceedsEveryGroupError({"g0": 900}, {"g0": 500}, {"g0": "pages"}),
        S.FAILED_PRECONDITION,
        "never_fits",
        400,
    ),
    (routing.DeadlineUnreachableError(1.0, 3.0), S.DEADLINE_EXCEEDED, "deadline_unreachable", 504),
    (routing.DeadlineUnreachableError(1.0, None), S.DEADLINE_EXCEEDED, "deadline_unreachable", 504),
    (routing.NoRoomError("full", 2.5, 90, 50), S.RESOURCE_EXHAUSTED, "over_capacity", 429),
    (routing.QuotaUsedUpError("used up", 2.5), S.RESOURCE_EXHAUSTED, "over_capacity", 429),
    (routing.QueueFullError("full", 2.5, 90, 50), S.RESOURCE_EXHAUSTED, "queue_full", 429),
    (routing.QuotaExceededError(90, 50), S.FAILED_PRECONDITION, "quota", 400),
    (routing.NoGroupError("no group is up", 2.5), S.UNAVAILABLE, "not_ready", 503),
    (PoolCapacityError("full", 90, 50, retryable=True), S.RESOURCE_EXHAUSTED, "over_capacity", 429),
    (
        PoolCapacityError("too long", 90, 50, retryable=False),
        S.FAILED_PRECONDITION,
        "never_fits",
        400,
    ),
    (WorkerDiedError(SECRETS), S.UNAVAILABLE, "engine_lost", 503),
]
# Never reaches a client as an error: its choices finish with ABORT.
INTERNAL_ERRORS = {routing.RequestAbortedError, routing.LedgerError}


def internals_in(text: str) -> list[str]:
    """Parts of a text that no client should see."""
    return re.findall(
        r"/\w+/\S*|\bpid\b|\b\d{1,3}(?:\.\d{1,3}){3}\b|Traceback|File \"|\.py\b|0x[0-9a-f]+", text
    )


@pytest.mark.parametrize(("error", "code", "reason", "status"), TABLE)
def test_every_error_of_the_table(
    error: Exception, code: grpc.StatusCode, reason: str, status: int
) -> None:
    wire = to_wire(error, "request-1")
    assert is_expected(error)
    assert status_code(wire) is code
    assert reason_label(wire) == reason
    assert http_status(error) == status
    assert wire.request_id == "request-1"
    assert wire.message
    assert not internals_in(wire.message)


@pytest.mark.parametrize("module", [cluster, routing])
def test_every_class_of_the_trees_has_a_row(module: object) -> None:
    root = cluster.ClusterError if module is cluster else routing.RoutingError
    classes = {
        value
        for value in vars(module).values()
        if inspect.isclass(value) and issubclass(value, root) and value is not root
    }
    assert classes - INTERNAL_ERRORS == {type(e) for e, *_ in TABLE if isinstance(e, root)}


@pytest.mark.parametrize("error", [*(error for error, *_ in TABLE), routing.RequestAbortedError()])
def test_errors_can_be_sent_to_another_process(error: Exception) -> None:
    carried = msgspec.msgpack.encode(Failure.of(error))  # type: ignore[arg-type]
    for again in (
        pickle.loads(pickle.dumps(error)),
        msgspec.msgpack.decode(carried, type=Failure).error,
    ):
        assert type(again) is type(error)
        assert str(again) == str(error)
        assert to_wire(again) == to_wire(error)


def _raised(error: Exception) -> Exception:
    """With a traceback and a cause, as in production."""
    with pytest.raises(type(error)) as caught:
        try:
            Path("/nonexistent/secret.yaml").read_text()
        except OSError as cause:
            raise error from cause
    return caught.value


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(SECRETS),
        FileNotFoundError(2, "No such file or directory", "/home/someone/model.gguf"),
        KeyError("g0"),
        AssertionError(),
        routing.LedgerError("lease 1-2 of 10.0.0.7 is not there"),
        ConnectionRefusedError("127.0.0.1:6379"),
        ValueError('Traceback (most recent call last): File "/srv/app.py", line 3'),
    ],
)
def test_an_unknown_error_is_internal_and_reveals_nothing(error: Exception) -> None:
    error = _raised(error)
    wire = to_wire(error, "request-1")
    assert not is_expected(error)
    assert status_code(wire) is S.INTERNAL
    assert reason_label(wire) == "internal"
    assert wire.request_id == "request-1"
    message, trailer = encode(wire)
    for text in (wire.message, message, str(decode(trailer))):
        assert not internals_in(text)
        assert "secret" not in text
        assert not str(error) or str(error) not in text


def test_a_dead_worker_is_a_lost_engine_to_clients() -> None:
    wire = to_wire(WorkerDiedError(SECRETS))
    assert wire == to_wire(cluster.EngineLostError())
    assert wire.retry_after_s > 0


def test_refusals_are_counted_by_reason() -> None:
    counts = {
        "QueueFullError": 2,
        "NoRoomError": 1,
        "QuotaUsedUpError": 4,
        "RequestAbortedError": 3,
    }
    assert count_by_reason(counts) == {
        "ERROR_REASON_QUEUE_FULL": 2,
        "ERROR_REASON_OVER_CAPACITY": 5,
        "ERROR_REASON_INTERNAL": 3,
    }


def test_a_wrong_field_is_named() -> None:
    wire = to_wire(InvalidFieldError("sampling_params.n", "must be 1"))
    (violation,) = wire.field_violations
    assert (violation.field, violation.description) == ("sampling_params.n", "must be 1")
    assert "sampling_params.n" in wire.message


def test_over_capacity_has_the_bytes_and_when_to_retry() -> None:
    wire = to_wire(routing.QueueFullError("12 requests are waiting", 2.5, 90, 50))
    assert (wire.retry_after_s, wire.needed_bytes, wire.available_bytes) == (2.5, 90, 50)
    assert wire.message.endswith("needs 90 B of KV cache, 50 B are free; retry in 2.5 s")
    wire = to_wire(PoolCapacityError("full", 90, 50, retryable=True))
    assert wire.retry_after_s > 0
    assert (wire.needed_bytes, wire.available_bytes) == (90, 50)


def test_figures_that_are_not_known_are_left_out() -> None:
    for error in (routing.NoRoomError("no room", 2.5), routing.NoGroupError("no room", 2.5)):
        wire = to_wire(error)
        assert wire.message == "no room; retry in 2.5 s"
        assert not wire.HasField("needed_bytes") and not wire.HasField("available_bytes")


def test_never_fits_has_the_bytes_of_the_closest_group() -> None:
    error = routing.ExceedsEveryGroupError(
        {"g0": 900, "g1": 450}, {"g0": 500, "g1": 400}, {"g0": "pages", "g1": "pages"}
    )
    wire = to_wire(error)
    assert (wire.needed_bytes, wire.available_bytes) == (450, 400)
    assert {group.group: group.reason for group in wire.groups} == {"g0": "pages", "g1": "pages"}
    assert not wire.HasField("retry_after_s")
    wire = to_wire(cluster.ContextExceededError(9, 8, 700, 600))
    assert (wire.needed_bytes, wire.available_bytes) == (700, 600)


def test_what_exceeds_its_quota_by_itself_has_the_quota_and_no_time_to_retry() -> None:
    wire = to_wire(routing.QuotaExceededError(90, 50))
    assert (wire.needed_bytes, wire.available_bytes) == (90, 50)
    assert not wire.HasField("retry_after_s")
    assert "quota_bytes is 50" in wire.message


@pytest.mark.parametrize(("error", "code", "reason"), [row[:3] for row in TABLE])
def test_the_trailer_carries_the_error(
    error: Exception, code: grpc.StatusCode, reason: str
) -> None:
    wire = to_wire(error, "request-1")
    sentence, trailer = encode(wire)
    assert decode(trailer) == wire
    assert sentence == wire.message


def test_an_error_about_a_huge_field_stays_small_enough_for_a_header() -> None:
    wire = to_wire(cluster.UnknownModelError("\U0001f642" * 100_000, "m"), "r" * 100_000)
    sentence, trailer = encode(wire)
    assert len(sentence.encode()) < 2048
    assert len(trailer) < 4096
