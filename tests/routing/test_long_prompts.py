"""Prompts that would keep a group from all other requests for long."""

from __future__ import annotations

from kvmesh.cluster.routing.chooser import SAMPLE_EVERY
from kvmesh.cluster.routing.outcome import Enqueued
from kvmesh.cluster.routing.request import Past
from kvmesh.cluster.routing.router import Router
from kvmesh.cluster.routing.verdict import Reason
from tests.routing.groups import SLOW, ask, emit, end, granted, make_info, place, router_with

LONG_TOKENS = 80_000  # 80 s at a millisecond each


def fleet(groups: int) -> Router:
    infos = {f"g{index}": make_info(sealed=10_000) for index in range(groups)}
    return router_with(pace=SLOW, groups=infos, ahead_s=1.0, max_busy_share=0.5)


def keep_busy(router: Router) -> None:
    """Four groups compute all the time, as arrivals see it."""
    for index in range(4):
        place(router, f"h{index}", 900, 10, 0.0)
    for number in range(60 * SAMPLE_EVERY):
        router.place(ask(f"x{number}", 10_000_000, 10), 0.0)  # never fits


def test_one_long_prompt_may_start_at_any_time() -> None:
    place(fleet(1), "a", LONG_TOKENS, 10, 0.0)


def test_idle_groups_take_as_many_long_prompts_as_there_are() -> None:
    router = fleet(3)
    assert len({place(router, name, LONG_TOKENS, 10, 0.0).group for name in "abc"}) == 3


def test_where_groups_are_needed_long_prompts_go_one_after_another() -> None:
    router = fleet(4)
    keep_busy(router)
    first = place(router, "a", LONG_TOKENS, 10, 5.0)
    (second,) = router.place(ask("b", LONG_TOKENS, 10), 6.0)
    assert isinstance(second, Enqueued)
    assert {verdict.reason for verdict in second.verdicts} == {Reason.LONG}
    # It is promised no group, so those after it continue.
    place(router, "short", 100, 10, 7.0)
    # A request that has lost its group is not held back.
    lost = place(router, "lost", LONG_TOKENS, 10, 8.0, past=Past.RAN)
    assert end(router, lost, 9.0) == []
    assert granted(emit(router, first, 85.0)).request_id == "b"
