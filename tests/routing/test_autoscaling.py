"""How many groups the autoscaler wants, given what runs and waits, and the time."""

from __future__ import annotations

import pytest

from kvmesh.cluster.routing.autoscaling import (
    Autoscaler,
    AutoscalingPolicy,
    FleetLoad,
    fleet_load,
)
from kvmesh.cluster.routing.errors import (
    DeadlineUnreachableError,
    ExceedsEveryGroupError,
    NoRoomError,
    QueueFullError,
    QuotaExceededError,
    QuotaUsedUpError,
)
from kvmesh.cluster.routing.fairness import TenantPolicy
from kvmesh.cluster.routing.outcome import Enqueued
from tests.routing.groups import ask, end, granted, make_info, router_with

NAMES = ("a", "b", "c", "d", "e")
POLICY = AutoscalingPolicy(1, wait_s=5.0, up_after_s=5.0, down_after_s=100.0)


class Scaled:
    """An autoscaler whose groups are up as soon as they are wanted, unless they `stall`."""

    def __init__(self, policy: AutoscalingPolicy = POLICY, wanted: tuple[str, ...] = ()) -> None:
        self.scaler = Autoscaler(policy, NAMES, wanted, 0.0)
        self.now = 0.0
        self.up = set(self.scaler.wanted)
        self.stall = False

    def run(self, seconds: float, *, held: float = 0.0, **load: float) -> str:
        """A load for that long, decided on every second; the groups wanted then.

        held: by all groups that are up together
        """
        for _ in range(int(seconds)):
            self.now += 1.0
            shares = {name: held / len(self.up) for name in self.up}
            wanted = self.scaler.decide(FleetLoad(held=shares, **load), self.now)  # type: ignore[arg-type]
            if not self.stall:
                self.up = set(wanted)
        return "".join(sorted(self.scaler.wanted))


def test_nothing_to_do_wants_no_more_than_the_first() -> None:
    assert Scaled().run(1000) == "a"
    assert Scaled(AutoscalingPolicy(3)).run(1000) == "abc"


def test_a_group_is_added_when_requests_wait_for_long_enough() -> None:
    scaled = Scaled()
    assert scaled.run(5, wait_s=6.0) == "a"
    assert scaled.run(1, wait_s=4.0) == "a"
    assert scaled.run(5, wait_s=6.0) == "a", "it counts from the start again"
    assert scaled.run(1, wait_s=6.0) == "ab"


def test_a_group_is_added_before_requests_wait() -> None:
    assert Scaled().run(100, held=0.75) == "a"
    assert Scaled().run(6, held=0.85) == "ab"


def test_as_many_as_what_waits_needs_but_twice_as_many_at_most() -> None:
    scaled = Scaled()
    assert scaled.run(6, held=1.0, wait_s=60.0, waiting_held=2.3) == "ab"
    assert scaled.run(6, held=2.0, wait_s=60.0, waiting_held=1.2) == "abcd"
    # Prompts that take long to compute.
    scaled = Scaled(wanted=("b", "c"))
    assert scaled.run(6, wait_s=6.0, waiting_s=220.0) == "abcde"


def test_while_some_start_no_more_are_added_than_what_waits_needs() -> None:
    scaled = Scaled()
    scaled.stall = True
    assert scaled.run(200, held=1.0, wait_s=60.0, waiting_held=0.5) == "ab"
    assert scaled.run(200, held=1.0, wait_s=60.0, waiting_held=1.2) == "abc"
    scaled.stall = False
    assert scaled.run(6, held=1.0, wait_s=60.0, waiting_held=1.2) == "abc", "now they are there"
    assert scaled.run(6, held=1.0, wait_s=60.0, waiting_held=1.2) == "abcd", "and not enough"


@pytest.mark.parametrize(
    ("error", "wanted"),
    [
        (NoRoomError("", 1.0, 100, 10), "ab"),
        (QueueFullError("", 1.0, 100, 10), "ab"),
        (DeadlineUnreachableError(5.0, 9.0), "ab"),
        # Its client asked for less than the operator does.
        (DeadlineUnreachableError(4.9, 9.0), "a"),
        # It waited, so the load has shown it.
        (DeadlineUnreachableError(50.0, None), "a"),
        # More groups would not help these.
        (QuotaUsedUpError("", 1.0), "a"),
        (QuotaExceededError(100, 10), "a"),
        (ExceedsEveryGroupError({}, {}, {}), "a"),
    ],
)
def test_a_refusal_for_lack_of_room_adds_a_group_at_once(error: Exception, wanted: str) -> None:
    scaled = Scaled()
    scaled.scaler.note_refused(error)  # type: ignore[arg-type]
    assert scaled.run(1) == wanted
    assert scaled.run(1) == wanted, "it counts once"


def test_groups_are_removed_one_by_one_after_a_long_time() -> None:
    scaled = Scaled(wanted=("b", "c"))
    assert scaled.run(100, held=0.5) == "abc"
    assert scaled.run(1, held=0.5) == "ab"
    assert scaled.run(100, held=0.5) == "ab"
    assert scaled.run(1, held=0.5) == "a"
    assert scaled.run(1000) == "a"


def test_a_moment_of_load_starts_the_time_again() -> None:
    scaled = Scaled(wanted=("b",))
    assert scaled.run(99, held=0.1) == "ab"
    assert scaled.run(1, held=0.7) == "ab"
    assert scaled.run(99, held=0.1) == "ab"
    assert scaled.run(2, held=0.1) == "a"


def test_a_refusal_while_a_group_starts_puts_off_a_removal() -> None:
    scaled = Scaled(wanted=("b",))
    assert scaled.run(90, held=0.1) == "ab"
    scaled.stall, scaled.up = True, {"a"}
    scaled.scaler.note_refused(QueueFullError("", 1.0, 100, 10))
    assert scaled.run(1, held=0.1) == "ab", "the one that is down may be enough"
    scaled.stall, scaled.up = False, {"a", "b"}
    assert scaled.run(100, held=0.1) == "ab"
    assert scaled.run(1, held=0.1) == "a"


def test_the_group_that_holds_least_is_removed_but_never_one_of_the_first() -> None:
    scaler = Autoscaler(AutoscalingPolicy(1, down_after_s=0.0), NAMES, ("b", "c"), 0.0)
    assert scaler.decide(FleetLoad({"a": 0.0, "b": 0.1, "c": 0.2}), 1.0) == {"a", "c"}
    # Groups that compute prompts count too, on average.
    scaler = Autoscaler(AutoscalingPolicy(1, down_after_s=0.0), NAMES, ("b",), 0.0)
    for second in range(1, 200):
        busy = FleetLoad(dict.fromkeys("ab", 0.0), computing=2)
        wanted = scaler.decide(busy, float(second))
    assert {"a", "b"} <= wanted


def test_no_group_flaps_at_any_steady_load() -> None:
    for tenths in range(50):
        scaled = Scaled(AutoscalingPolicy(1, down_after_s=20.0))
        scaled.run(400, held=tenths / 10)
        settled = scaled.scaler.wanted
        for _ in range(400):
            scaled.run(1, held=tenths / 10)
            assert scaled.scaler.wanted == settled


def test_the_load_of_a_router() -> None:
    router = router_with(groups={"g0": make_info(max_sequences=4), "g1": make_info(epoch="e1")})
    assert fleet_load(router, 0.0) == FleetLoad({"g0": 0.0, "g1": 0.0})
    for number in range(3):
        granted(router.place(ask(f"r{number}"), 0.0))
    load = fleet_load(router, 0.0)
    assert sorted(load.held) == ["g0", "g1"]
    assert sum(load.held.values()) > 0.0 and load.computing > 0 and load.wait_s == 0.0
    # A group that drains takes nothing, so it does not count.
    router.fleet.drain("g0")
    assert {*fleet_load(router, 0.0).held} == {"g1"}
    router.group_down("g1", 0.0)
    assert {*fleet_load(router, 0.0).held} == set()


def test_what_waits_is_part_of_the_load() -> None:
    router = router_with(groups={"g0": make_info(max_sequences=1)})
    granted(router.place(ask("runs"), 0.0))
    assert isinstance(router.place(ask("waits"), 1.0)[0], Enqueued)
    load = fleet_load(router, 11.0)
    assert load.held == {"g0": 1.0}
    assert load.waiting_held == 1.0
    assert load.wait_s == 10.0, "as long as it has waited, however fast leases ended before"
    assert load.waiting_s > 0.0
    assert isinstance(router.place(ask("comes later"), 9.0)[0], Enqueued)
    both = fleet_load(router, 11.0)
    assert both.wait_s == 10.0, "as long as the first of them has waited"
    assert both.waiting_held == 2.0
    assert both.waiting_s == pytest.approx(2 * load.waiting_s)


def test_a_request_that_comes_now_waits_for_all_before_it() -> None:
    router = router_with(groups={"g0": make_info(max_sequences=1)})
    for number in range(4):
        router.place(ask(f"r{number}"), 0.0)
    router.leases.mean_s = 20.0
    assert fleet_load(router, 11.0).wait_s == 60.0, "three leases, one at a time"


def test_what_waits_for_its_tenants_quota_starts_no_group() -> None:
    tenants = {"x": TenantPolicy(quota_bytes=2 * (4 * 1000 + 17 * 300))}
    router = router_with(groups={"a": make_info()}, tenants=tenants)
    runs = [granted(router.place(ask(f"runs{n}", tenant="x"), 0.0)) for n in range(2)]
    before = fleet_load(router, 0.0)
    for number in range(40):
        assert isinstance(router.place(ask(f"x{number}", tenant="x"), 0.0)[0], Enqueued)
    load = fleet_load(router, 100.0)
    assert (load.waiting_held, load.waiting_s, load.wait_s) == (0.0, 0.0, 0.0)
    assert load.held == before.held
    scaler = Autoscaler(POLICY, NAMES, (), 0.0)
    for second in range(1, 100):
        assert scaler.decide(load, float(second)) == {"a"}
    # What lacks room counts, up to the quota.
    router.fleet.drain("a")
    end(router, runs[0], 100.0)
    assert fleet_load(router, 100.0).wait_s == 100.0
    only_one = fleet_load(router, 100.0).waiting_s
    end(router, runs[1], 100.0)
    assert fleet_load(router, 100.0).waiting_s == pytest.approx(2 * only_one)
    assert isinstance(router.place(ask("y"), 100.0)[0], Enqueued)
    assert fleet_load(router, 100.0).waiting_s == pytest.approx(3 * only_one)


def test_wrong_settings_are_named() -> None:
    for wrong, name in (
        ({"min_groups": 0}, "min_groups"),
        ({"min_groups": 1, "wait_s": 0.0}, "wait_s"),
        ({"min_groups": 1, "wait_s": float("nan")}, "wait_s"),
        ({"min_groups": 1, "down_after_s": -1.0}, "down_after_s"),
    ):
        with pytest.raises(ValueError, match=name):
            AutoscalingPolicy(**wrong)
    with pytest.raises(ValueError, match="at most the number of groups, 5"):
        Autoscaler(AutoscalingPolicy(6), NAMES, (), 0.0)
