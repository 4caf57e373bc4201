"""When a call is retried and how long it waits, on a fake clock."""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
from collections.abc import Callable, Iterable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmesh import (
    NO_RETRY,
    AsyncClient,
    AsyncFakeTransport,
    AuthenticationError,
    Client,
    DeadlineExceededError,
    DuplicateRequestError,
    FakeTransport,
    InvalidRequestError,
    KVMeshError,
    NeverFitsError,
    OverCapacityError,
    RequestCancelledError,
    RetryPolicy,
    ServerError,
    Tokens,
    UnavailableError,
)
from kvmesh.client.failures import Contact, RetryState, error_of
from kvmesh.client.flows import GRACE_S, Now, Open, Read, Sleep, stream
from kvmesh.client.stream_state import StreamState
from kvmesh.client.transport import RpcFailure
from kvmesh.protos import pb
from tests.client.servicer import ScriptedServicer, answering, far_away, reserved_port, serving
from tests.exercised import Exercised

# Without jitter, each wait is as long as the server asks for.
NO_JITTER = RetryPolicy(initial_backoff_s=0.0)


def clients() -> tuple[FakeTransport, Client]:
    fake = FakeTransport(["yes"])
    return fake, Client(transport=fake)


@pytest.mark.parametrize(
    "error",
    [OverCapacityError("full"), UnavailableError("gone"), RequestCancelledError("unexpected")],
    ids=lambda error: type(error).__name__,
)
def test_temporary_errors_are_retried(error: KVMeshError) -> None:
    fake, client = clients()
    fake.server.fail(error, times=3)
    assert client.generate("hi").text == "yes"
    ids = {request.request_id for request in fake.server.requests}
    assert len(fake.server.requests) == 4
    assert len(ids) == 1, "every attempt sends the same request"


@pytest.mark.parametrize(
    "error",
    [
        InvalidRequestError.of("prompt", "is empty"),
        AuthenticationError("wrong key"),
        NeverFitsError("too long", needed_bytes=2, available_bytes=1),
        DeadlineExceededError("too late"),
        DuplicateRequestError("in use"),
        ServerError("broken"),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("streaming", [False, True])
def test_permanent_errors_are_not_retried(error: KVMeshError, streaming: bool) -> None:
    fake, client = clients()
    fake.server.fail(error)
    with pytest.raises(type(error), match=error.message):
        list(client.generate_stream("hi")) if streaming else client.generate("hi")
    assert len(fake.server.requests) == 1
    assert fake.server.slept_s == 0


def test_attempts_are_bounded() -> None:
    fake, client = clients()
    fake.server.fail(UnavailableError("lost", reason="ENGINE_LOST"), times=100)
    with pytest.raises(UnavailableError):
        client.tokenize("hi")
    assert len(fake.server.requests) == RetryPolicy().max_attempts


def test_an_outage_takes_nothing_of_the_attempts_that_refusals_have() -> None:
    """A server that was restarted is full of those that waited for it."""
    fake, client = known_server()
    most = RetryPolicy().max_attempts
    fake.server.fail(UnavailableError("gone"), times=2 * most)
    fake.server.fail(OverCapacityError("full"), times=most - 1)
    assert client.generate("hi").text == "a b c"
    fake.server.fail(UnavailableError("gone"), times=2)
    fake.server.fail(OverCapacityError("full"), times=most)
    with pytest.raises(OverCapacityError):
        client.generate("hi")


def test_no_retry_means_one_attempt() -> None:
    fake = FakeTransport()
    fake.server.fail(UnavailableError("gone"))
    with pytest.raises(UnavailableError):
        Client(transport=fake, retry=NO_RETRY).loads()
    assert len(fake.server.requests) == 1


def test_the_client_waits_for_retry_after() -> None:
    fake, client = clients()
    fake.server.fail(OverCapacityError("full", retry_after_s=12.0), times=2)
    client.generate("hi")
    assert 24.0 <= fake.server.slept_s <= 24.0 + 0.2 + 0.4


@pytest.mark.parametrize("retry_after_s", [0.0, 60.0])
def test_any_other_retry_after_is_waited_for(retry_after_s: float) -> None:
    fake, client = clients()
    fake.server.fail(OverCapacityError("full", retry_after_s=retry_after_s))
    assert client.generate("hi").text == "yes"
    assert retry_after_s <= fake.server.slept_s <= retry_after_s + 0.2


@pytest.mark.parametrize("retry_after_s", [60.5, 1e300, float("inf"), float("nan"), -1.0])
def test_a_retry_after_that_is_too_long_is_not_waited_for(retry_after_s: float) -> None:
    fake, client = clients()
    fake.server.fail(OverCapacityError("full", retry_after_s=retry_after_s))
    with pytest.raises(OverCapacityError):
        client.generate("hi")
    assert fake.server.slept_s == 0


def test_no_wait_extends_past_the_timeout() -> None:
    fake, client = clients()
    fake.server.fail(OverCapacityError("full", retry_after_s=12.0), times=5)
    with pytest.raises(OverCapacityError) as caught:
        client.generate("hi", timeout_s=20.0)
    assert caught.value.retry_after_s == 12.0
    assert 12.0 <= fake.server.slept_s < 20.0
    timeouts = [request.timeout_s for request in fake.server.requests]
    assert timeouts[0] == 20.0
    assert timeouts[1] == pytest.approx(20.0 - fake.server.slept_s)


def limits_of(fake: FakeTransport) -> list[float | None]:
    """The limits of attempts, as the transport will be given them."""
    limits: list[float | None] = []
    unary, stream = fake.unary, fake.stream

    def timed_unary(method: Any, request: Any, timeout_s: float | None, metadata: Any) -> Any:
        limits.append(timeout_s)
        return unary(method, request, timeout_s, metadata)

    def timed_stream(request: Any, timeout_s: float | None, metadata: Any) -> Any:
        limits.append(timeout_s)
        return stream(request, timeout_s, metadata)

    fake.unary, fake.stream = timed_unary, timed_stream  # type: ignore[method-assign]
    return limits


@pytest.mark.parametrize(
    ("call", "grace_s"),
    [
        (lambda client, timeout_s: client.generate("hi", timeout_s=timeout_s), GRACE_S),
        (lambda client, timeout_s: [*client.generate_stream("hi", timeout_s=timeout_s)], GRACE_S),
        (lambda client, timeout_s: client.tokenize("hi", timeout_s=timeout_s), 0.0),
    ],
    ids=["generate", "generate_stream", "tokenize"],
)
def test_an_attempt_may_take_what_is_left_and_a_grace_if_the_server_ends_it(
    call: Callable[[Client, float | None], object], grace_s: float
) -> None:
    fake = FakeTransport(["yes"])
    client = Client(transport=fake, retry=NO_JITTER)
    limits = limits_of(fake)
    fake.server.fail(OverCapacityError("full", retry_after_s=12.0))
    call(client, 20.0)
    call(client, None)
    assert limits == [20.0 + grace_s, 8.0 + grace_s, None]
    if grace_s:
        sent = [request.timeout_s for request in fake.server.requests]
        assert sent == [20.0, 8.0, 0.0], "the server ends it without a grace"


@pytest.mark.parametrize("streaming", [False, True])
def test_an_expired_timeout_makes_no_call(streaming: bool) -> None:
    """Here the wait takes longer than it was meant to, until the very end."""
    fake, client = clients()
    fake.sleep = lambda seconds: fake.server.sleep(20.0)  # type: ignore[method-assign]
    fake.server.fail(UnavailableError("gone"))
    with pytest.raises(DeadlineExceededError, match="timeout_s expired before the call"):
        if streaming:
            list(client.generate_stream("hi", timeout_s=20.0))
        else:
            client.generate("hi", timeout_s=20.0)
    assert len(fake.server.requests) == 1


def test_retries_until_the_lost_request_has_ended() -> None:
    fake, client = clients()
    fake.server.fail(UnavailableError("gone"))
    fake.server.fail(DuplicateRequestError("still there"), times=RetryPolicy().max_attempts + 1)
    assert client.generate("hi").text == "yes"


def test_the_client_timeout_applies_unless_the_call_has_its_own() -> None:
    fake = FakeTransport()
    client = Client(transport=fake, timeout_s=9.0)
    client.generate("a")
    client.generate("a", timeout_s=3.0)
    client.generate("a", timeout_s=None)
    sent = [
        request.timeout_s if request.HasField("timeout_s") else None
        for request in fake.server.requests
    ]
    assert sent == [9.0, 3.0, None]


async def test_the_async_client_retries_too() -> None:
    fake = AsyncFakeTransport(["a b c"])
    client = AsyncClient(transport=fake)
    fake.server.fail(OverCapacityError("full", retry_after_s=5.0))
    assert (await client.generate("hi")).text == "a b c"
    assert fake.server.slept_s >= 5.0
    fake.server.fail(UnavailableError("gone"), after_tokens=2)
    stream = client.generate_stream("hi")
    assert [delta.text async for delta in stream] == ["a", " b", " c", ""]
    assert stream.resumes == 1


GONE = UnavailableError("gone")
GONE_FOR_3_S = UnavailableError("gone", retry_after_s=3.0)


def known_server(**retry: float) -> tuple[FakeTransport, Client]:
    """A client whose server has answered before."""
    fake = FakeTransport(["a b c"])
    client = Client(transport=fake, retry=RetryPolicy(**retry))  # type: ignore[arg-type]
    client.loads()
    return fake, client


@pytest.mark.parametrize("streaming", [False, True])
def test_a_known_server_that_is_lost_is_waited_for(streaming: bool) -> None:
    fake, client = known_server(initial_backoff_s=0.0)
    # For longer than one that has never answered.
    fake.server.fail(GONE_FOR_3_S, times=20)
    if streaming:
        assert len(list(client.generate_stream("hi"))) == 4
    else:
        assert client.generate("hi").text == "a b c"
    assert fake.server.slept_s == 60.0


@pytest.mark.parametrize("known", ["by the first client", "by the other one"])
def test_clients_of_one_connection_know_its_server_together(known: str) -> None:
    fake = FakeTransport(["a b c"])
    client = Client(transport=fake, retry=RetryPolicy(initial_backoff_s=0.0))
    other = client.with_options(model="m")
    first, second = (client, other) if known == "by the first client" else (other, client)
    first.loads()
    fake.server.fail(GONE_FOR_3_S, times=20)
    assert second.generate("hi").text == "a b c"


def test_an_outage_without_a_timeout_has_a_limit() -> None:
    fake, client = known_server(max_outage_s=50.0)
    fake.server.fail(GONE, times=1000)
    with pytest.raises(UnavailableError):
        client.generate("hi")
    assert 50.0 <= fake.server.slept_s <= 60.0


@pytest.mark.parametrize("timeout_s", [5.0, 1000.0])
def test_an_outage_may_last_as_long_as_the_timeout(timeout_s: float) -> None:
    fake, client = known_server(max_outage_s=50.0)
    fake.server.fail(GONE, times=10_000)
    with pytest.raises(UnavailableError):
        client.generate("hi", timeout_s=timeout_s)
    assert timeout_s - 10.0 <= fake.server.slept_s < timeout_s


def test_an_outage_of_very_many_attempts() -> None:
    fake, client = known_server(initial_backoff_s=0.0)
    fake.server.fail(GONE, times=3000)
    assert client.generate("hi").text == "a b c"


def test_each_outage_of_a_stream_has_its_own_limit() -> None:
    fake, client = known_server(max_outage_s=20.0, initial_backoff_s=0.0)
    for tokens in (0, 1, 1):
        fake.server.fail(GONE_FOR_3_S, after_tokens=tokens)
        fake.server.fail(GONE_FOR_3_S, times=3)
    stream = client.generate_stream("hi")
    assert [delta.text for delta in stream] == ["a", " b", " c", ""]
    assert fake.server.slept_s == 36.0


QUEUED = pb.GenerateStreamResponse(queued=pb.Queued())
LOST = RpcFailure("UNAVAILABLE", "")


def waits_of(state: StreamState, attempts: Iterable[tuple[float, float]]) -> int:
    """How often a stream whose server only answers that it is queued waits to try again.

    attempts: after how many seconds each answers, and after how many more it is lost
    """
    policy = RetryPolicy(initial_backoff_s=0.0, max_backoff_s=0.0, max_outage_s=120.0)
    flow = stream(state, None, (), RetryState(policy, random.Random(0), Contact(True)))
    clock, left, waits = 1000.0, iter(attempts), 0
    answered = False
    step = next(flow)
    with contextlib.suppress(UnavailableError, StopIteration):
        while True:
            match step:
                case Now():
                    step = flow.send(clock)
                case Open():
                    silent_s, queued_s = next(left)
                    answered = False
                    step = flow.send(None)
                case Read():
                    clock += queued_s if answered else silent_s
                    step = flow.throw(LOST) if answered else flow.send(QUEUED)
                    answered = True
                case Sleep():
                    waits += 1
                    step = flow.send(None)
                case _:
                    step = flow.send(None)
    return waits


@pytest.mark.parametrize("continues", [False, True], ids=["its own", "another's"])
def test_the_time_that_a_stream_is_answered_is_no_outage(continues: bool) -> None:
    state = StreamState(pb.GenerateRequest(), continues=continues)
    assert waits_of(state, [(0.0, 500.0)] * 9) == 9


def test_a_stream_that_its_server_answers_and_loses_has_an_end() -> None:
    state = StreamState(pb.GenerateRequest())
    assert waits_of(state, [(30.0, 1.0)] * 99) == 4


async def test_the_async_client_waits_for_a_lost_server_too() -> None:
    fake = AsyncFakeTransport(["a b c"])
    client = AsyncClient(transport=fake, retry=NO_JITTER)
    fake.server.fail(GONE_FOR_3_S, after_tokens=2)
    fake.server.fail(GONE_FOR_3_S, times=12)
    stream = client.generate_stream("hi")
    assert [delta.text async for delta in stream] == ["a", " b", " c", ""]
    assert fake.server.slept_s == 39.0


@pytest.mark.parametrize(
    ("error", "attempts"),
    [
        (UnavailableError("the engines died", reason="ENGINE_LOST"), 4),
        (OverCapacityError("full"), 4),
        (UnavailableError("draining", reason="DRAINING"), 10),
        (UnavailableError("starting", reason="NOT_READY"), 10),
    ],
    ids=["lost engine", "full", "draining", "starting"],
)
def test_only_servers_that_return_are_waited_for(error: KVMeshError, attempts: int) -> None:
    """A request that its engines die of must not be sent again and again."""
    fake, client = known_server()
    fake.server.fail(error, times=9)
    if attempts == 10:
        client.generate("hi")
    else:
        with pytest.raises(type(error)):
            client.generate("hi")
    assert len(fake.server.requests) == 1 + attempts


def test_one_attempt_is_one_attempt_for_a_known_server_too() -> None:
    fake, client = known_server(max_attempts=1)
    fake.server.fail(GONE)
    with pytest.raises(UnavailableError):
        list(client.generate_stream("hi"))
    assert len(fake.server.requests) == 2


class WithoutLuck(random.Random):
    def uniform(self, a: float, b: float) -> float:
        assert a == 0
        return b


def test_back_off_doubles_up_to_its_maximum_and_starts_again_after_progress() -> None:
    policy = RetryPolicy(max_attempts=9, initial_backoff_s=0.5, max_backoff_s=3.0)
    state = RetryState(policy, WithoutLuck())
    failure = RpcFailure("RESOURCE_EXHAUSTED", "full")
    waits_s = [state.delay_s(failure, error_of(failure), 0.0) for _ in range(5)]
    assert waits_s == [0.5, 1.0, 2.0, 3.0, 3.0]
    state.progress()
    assert state.delay_s(failure, error_of(failure), 0.0) == 0.5


def test_back_off_is_added_to_what_the_server_asks_for() -> None:
    state = RetryState(RetryPolicy(initial_backoff_s=0.5), WithoutLuck())
    error = OverCapacityError("full", retry_after_s=12.0)
    assert state.delay_s(RpcFailure("RESOURCE_EXHAUSTED", "full"), error, 0.0) == 12.5


def test_waits_near_the_deadline_are_half_of_what_is_left() -> None:
    policy = RetryPolicy(max_attempts=99, initial_backoff_s=0.5, max_backoff_s=100.0)
    state = RetryState(policy, WithoutLuck(), deadline=20.0)
    failure = RpcFailure("RESOURCE_EXHAUSTED", "full")
    waits_s = [
        state.delay_s(failure, error_of(failure), now)
        for now in (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 18.0, 19.25, 19.5)
    ]
    assert waits_s == [0.5, 1.0, 2.0, 4.0, 8.0, 10.0, 1.0, 0.5, None]


@pytest.mark.parametrize(("known", "limit_s"), [(True, 50.0), (False, 40.0)])
def test_an_outage_is_waited_for_until_its_limit(known: bool, limit_s: float) -> None:
    policy = RetryPolicy(max_attempts=2, max_connect_s=40.0, max_outage_s=50.0)
    state = RetryState(policy, WithoutLuck(), Contact(known))
    failure = RpcFailure("UNAVAILABLE", "")
    since_s = (0.0, 10.0, 20.0, limit_s - 0.1, limit_s)
    waits_s = [state.delay_s(failure, error_of(failure), 1000.0 + s) for s in since_s]
    assert [wait_s is None for wait_s in waits_s] == [False] * 4 + [True]


BACKED_OFF = Exercised("back-off", {"waits": 500, "waits at the maximum": 50})


@BACKED_OFF.required
@given(
    failures=st.integers(1, 60),
    seed=st.integers(),
    policy=st.builds(
        RetryPolicy,
        max_attempts=st.just(100),
        initial_backoff_s=st.floats(0, 10),
        max_backoff_s=st.floats(0, 100),
    ),
)
def test_back_off_grows_and_is_bounded(failures: int, seed: int, policy: RetryPolicy) -> None:
    state = RetryState(policy, random.Random(seed))
    failure = RpcFailure("UNAVAILABLE", "")
    for attempt in range(failures):
        wait_s = state.delay_s(failure, error_of(failure), 0.0)
        bound_s = min(policy.max_backoff_s, policy.initial_backoff_s * 2**attempt)
        BACKED_OFF.add("waits")
        BACKED_OFF.add("waits at the maximum", bound_s == policy.max_backoff_s > 0)
        assert wait_s is not None
        assert 0 <= wait_s <= bound_s


# A server that restarts, for a client that it has never answered.

RESTART_S = 30.0


def restarting(seed: int, **options: Any) -> tuple[FakeTransport, Client]:
    fake = FakeTransport(["a b c"])
    fake.server.fail_for(GONE, RESTART_S)
    client = Client(transport=fake, **options)
    client._core._rng.seed(seed)
    return fake, client


@pytest.mark.parametrize("seed", range(50))
def test_a_restart_is_survived_by_default(seed: int) -> None:
    fake, client = restarting(seed)
    call = (lambda: client.generate("hi")) if seed % 2 else client.loads
    call()
    assert RESTART_S <= fake.server.slept_s <= RESTART_S + RetryPolicy().max_backoff_s
    assert len(fake.server.requests) < 40, "and without hammering the server"


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("timeout_s", [31.0, 33.0, 40.0])
def test_the_end_of_a_timeout_is_used(timeout_s: float, seed: int) -> None:
    """The last waits get shorter, so that a server that returns just in time is found."""
    fake, client = restarting(seed)
    assert client.generate("hi", timeout_s=timeout_s).text == "a b c"
    assert RESTART_S <= fake.server.slept_s < timeout_s


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("timeout_s", [0.1, 5.0, 29.0])
def test_a_restart_is_not_waited_for_beyond_the_timeout(timeout_s: float, seed: int) -> None:
    fake, client = restarting(seed)
    with pytest.raises(UnavailableError):
        client.generate("hi", timeout_s=timeout_s)
    assert timeout_s / 2 - 0.2 <= fake.server.slept_s < timeout_s


@pytest.mark.parametrize("timeout_s", [None, 1000.0])
def test_a_server_that_has_never_answered_is_not_waited_for_long(timeout_s: float | None) -> None:
    """Its address may be wrong."""
    fake = FakeTransport()
    fake.server.fail_for(GONE, 10_000.0)
    with pytest.raises(UnavailableError):
        Client(transport=fake).generate("hi", timeout_s=timeout_s)
    limit_s = RetryPolicy().max_connect_s
    assert limit_s - 1.0 <= fake.server.slept_s <= limit_s + 1.0


def test_a_server_that_has_sent_a_part_of_a_stream_has_answered() -> None:
    fake = FakeTransport(["a b"])
    fake.server.fail(GONE_FOR_3_S, after_tokens=1)
    fake.server.fail(GONE_FOR_3_S, times=20)
    stream = Client(transport=fake, retry=NO_JITTER).generate_stream("hi")
    assert [delta.text for delta in stream] == ["a", " b", ""]
    assert fake.server.slept_s == 63.0 > RetryPolicy().max_connect_s


def test_a_server_that_says_that_it_is_not_ready_has_answered() -> None:
    fake = FakeTransport()
    fake.server.fail_for(UnavailableError("loading the model", reason="NOT_READY"), 100.0)
    assert Client(transport=fake).generate("hi").text == "Hello."


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_server_that_starts_late_is_found(asynchronous: bool) -> None:
    """On the real clock: the connection is refused until the server listens."""
    with reserved_port() as port, contextlib.ExitStack() as late_server:
        target = f"127.0.0.1:{port}"
        late = threading.Timer(0.1, lambda: late_server.enter_context(serving(SERVICER, target)))
        late.start()
        if asynchronous:
            tokens = asyncio.run(tokenize(target, RetryPolicy()))
        else:
            with Client(target) as client:
                tokens = client.tokenize("hi")
        late.join()
    assert tokens.token_ids == (1, 2)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_server_that_is_far_away_needs_no_retry(asynchronous: bool) -> None:
    """Each of the first replies takes a while, as over an ocean, or from a busy machine."""
    with serving(SERVICER) as near, far_away(near, 0.15) as target:
        if asynchronous:
            tokens = asyncio.run(tokenize(target, NO_RETRY))
        else:
            with Client(target, retry=NO_RETRY) as client:
                tokens = client.tokenize("hi")
    assert tokens.token_ids == (1, 2)


SERVICER = ScriptedServicer(answering(pb.TokenizeResponse(token_ids=[1, 2])))


async def tokenize(target: str, retry: RetryPolicy) -> Tokens:
    async with AsyncClient(target, retry=retry) as client:
        return await client.tokenize("hi")
