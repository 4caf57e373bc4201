"""What those who wait hear of where they stand."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from kvmesh.cluster.messages import Waiting
from kvmesh.cluster.routing.outcome import Enqueued
from kvmesh.cluster.waiting_callers import NOTICED_SHARE, WaitingCaller


class Heard:
    def __init__(self) -> None:
        self.news: list[Waiting] = []

    def send(self, message: Any) -> None:
        self.news.append(message)


def test_small_steps_are_noticed_when_they_add_up() -> None:
    """Of a long queue each step is a small share."""
    peer = Heard()
    caller = WaitingCaller(peer, 1, since=0.0)
    for position in range(1000, -1, -1):
        caller.inform(Enqueued("r", position, None), 0.0)
    positions = [news.position for news in peer.news]
    assert positions[0] == 1000 and positions[-1] == 0
    for before, after in pairwise(positions):
        assert before - after == int(NOTICED_SHARE * before) + 1
    assert len(positions) < 200


def test_a_start_that_slips_slowly_is_noticed() -> None:
    peer = Heard()
    caller = WaitingCaller(peer, 1, since=0.0)
    for late in range(200):
        caller.inform(Enqueued("r", 5, 100.0 + 0.5 * late), 0.0)
    starts = [news.start_s for news in peer.news]
    assert starts[0] == 100.0
    assert len(starts) > 10
    for before, after in pairwise(starts):
        assert before is not None and after is not None
        assert NOTICED_SHARE * before < after - before <= NOTICED_SHARE * before + 0.5
