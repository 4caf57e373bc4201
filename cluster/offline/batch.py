"""Many calls of one LLM: a bounded number at once, results in order."""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

from kvmesh.client.errors import ClosedError, KVMeshError

T = TypeVar("T")
W = TypeVar("W")


class BatchError(KVMeshError):
    """Some of a batch have failed, after all of it was tried.

    results: of all, in order; of those that failed, the error. Other attributes are those of the
        first error
    """

    results: Sequence[Any] = ()

    @classmethod
    def of(cls, results: Sequence[Any]) -> BatchError:
        """results: one or more of them errors"""
        failed = [index for index, found in enumerate(results) if isinstance(found, KVMeshError)]
        first: KVMeshError = results[failed[0]]
        number = f"{len(failed):,} of {len(results):,}"
        error = cls(f"{number} in the batch failed; the first is number {failed[0]}: {first}")
        vars(error).update({**vars(first), "message": error.message, "results": results})
        return error


def in_order(
    items: Iterable[W],
    submit: Callable[[W], Future[T]],
    wait: Callable[[Future[T]], T],
    *,
    at_once: int,
    ahead: int | None = None,
    keep_errors: bool = False,
) -> Iterator[T | KVMeshError]:
    """The results of all items, in their order, whichever is done first.

    items: taken in this thread, as others are done
    at_once: submitted and not done
    ahead: items that are taken before a result is given, those that are done included; None: any
        number
    keep_errors: give errors in their places; else the first one ends it, and all that runs
    """
    turns = threading.Semaphore(at_once)
    pending: deque[Future[T]] = deque()
    numbers = itertools.count()

    def give() -> T | KVMeshError:
        number = next(numbers)
        try:
            return wait(pending.popleft())
        except ClosedError:
            raise
        except KVMeshError as error:
            if not keep_errors:
                error.add_note(f"it is number {number} in the batch")
                raise
            return error

    try:
        left = iter(items)
        while True:
            turns.acquire()
            try:
                future = submit(next(left))
            except StopIteration:
                break
            future.add_done_callback(lambda _: turns.release())
            pending.append(future)
            while pending and (pending[0].done() or len(pending) == ahead):
                yield give()
        while pending:
            yield give()
    finally:
        for future in pending:
            future.cancel()
