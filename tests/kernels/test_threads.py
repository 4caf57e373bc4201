"""Parts of a loop's work on several threads."""

from __future__ import annotations

import threading
from concurrent.futures import Future, wait

import pytest
import torch

from kvmesh.kernels import threads
from kvmesh.kernels.threads import in_parts, in_ranges

PATIENCE_S = 60.0


@pytest.mark.parametrize(("count", "max_parts"), [(1, 4), (7, 3), (8, 100), (5, 0)])
def test_parts_make_up_the_whole(count: int, max_parts: int) -> None:
    done: list[tuple[int, int]] = []
    in_parts(count, max_parts, lambda first, end: done.append((first, end)))
    assert [x for part in sorted(done) for x in range(*part)] == list(range(count))
    assert len(done) <= max(1, min(torch.get_num_threads(), max_parts))


def test_an_error_waits_for_the_other_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their loops still use the caller's memory."""
    started, released, ended = threading.Event(), threading.Event(), threading.Event()

    def work(first: int, end: int) -> None:
        if first == 0:
            assert started.wait(PATIENCE_S)
            raise ValueError("the first part")
        started.set()
        assert released.wait(PATIENCE_S)
        ended.set()

    def waiting(futures: list[Future[object]]) -> None:
        released.set()  # not before it is waited for
        wait(futures)

    monkeypatch.setattr(threads, "wait", waiting)
    with pytest.raises(ValueError, match="the first part"):
        in_ranges([(0, 1), (1, 2)], work)
    assert ended.is_set()


def test_an_error_of_any_part_is_raised() -> None:
    def work(first: int, end: int) -> None:
        if first == 1:
            raise ValueError("the second part")

    with pytest.raises(ValueError, match="the second part"):
        in_ranges([(0, 1), (1, 2)], work)
