"""Many calls at once, their results in order, and how they end, without a model."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from concurrent.futures import Future

import pytest

from kvmesh import InvalidRequestError, KVMeshError
from kvmesh.cluster.offline.batch import in_order
from kvmesh.cluster.offline.loop_thread import LoopThread


class Calls:
    """made: the future of every call, in order; one that is given a negative number has failed"""

    def __init__(self) -> None:
        self.made: list[Future[int]] = []

    def submit(self, number: int) -> Future[int]:
        self.made.append(Future())
        if number < 0:
            self.made[-1].set_exception(InvalidRequestError.of("number", "is negative"))
        return self.made[-1]

    def wait(self, future: Future[int]) -> int:
        """Let it be done now, if it is not."""
        if not future.done():
            future.set_result(10 * self.made.index(future))
        return future.result()

    def over(self, numbers: Iterator[int], **rest: bool | int) -> Iterator[int | KVMeshError]:
        return in_order(numbers, self.submit, self.wait, at_once=100, **rest)  # type: ignore[arg-type]


def test_no_more_are_taken_ahead_than_wanted() -> None:
    calls = Calls()
    results = calls.over(itertools.count(), ahead=3)
    for number in range(5):
        assert next(results) == 10 * number
        assert len(calls.made) == number + 3


def test_an_error_says_where_it_was_and_ends_what_runs() -> None:
    calls = Calls()
    results = calls.over(iter([0, -1, 2, 3]), ahead=4)
    assert next(results) == 0
    with pytest.raises(InvalidRequestError) as caught:
        next(results)
    assert caught.value.__notes__ == ["it is number 1 in the batch"]
    assert [future.cancelled() for future in calls.made] == [False, False, True, True]


def test_errors_that_are_kept_have_their_places() -> None:
    first, error, *others = Calls().over(iter([0, -1, 2, 3]), keep_errors=True)
    assert isinstance(error, InvalidRequestError)
    assert [first, *others] == [0, 20, 30]


def test_an_interrupted_wait_ends_its_call() -> None:
    class Interrupted(Future[int]):
        def result(self, timeout: float | None = None) -> int:
            raise KeyboardInterrupt  # as Ctrl-C does in the thread that waits

    future = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        LoopThread.wait(None, future)  # type: ignore[arg-type]
    assert future.cancelled()
