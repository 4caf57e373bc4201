"""Deadlines: in order of time, not of arrival, and of those that are left."""

from __future__ import annotations

from kvmesh.workers.deadlines import Deadlines


def test_deadlines_are_due_in_their_order_each_once() -> None:
    deadlines = Deadlines()
    for name, due_s in (("b", 3.0), ("a", 1.0), ("c", 3.0), ("late", 9.0)):
        deadlines.add(name, due_s)
    assert (deadlines.left_s(0.5), deadlines.take_due(0.5)) == (0.5, [])
    assert deadlines.take_due(3.0) == ["a", "b", "c"]
    assert (deadlines.left_s(3.0), deadlines.take_due(3.0)) == (6.0, [])
    assert deadlines._due_s == {"late": 9.0}, "nothing is kept of those that were due"


def test_removed_deadlines_are_never_due_and_not_waited_for() -> None:
    deadlines = Deadlines()
    deadlines.add("a", 1.0)
    deadlines.add("b", 4.0)
    deadlines.remove("a")
    deadlines.remove("without one")
    assert deadlines.left_s(0.0) == 4.0
    deadlines.remove("b")
    assert (deadlines.left_s(9.0), deadlines.take_due(9.0)) == (None, [])


def test_an_id_that_is_used_again_has_its_own_deadline() -> None:
    deadlines = Deadlines()
    for due_s in (5.0, 7.0):
        deadlines.add("r", due_s)
        deadlines.remove("r")
    deadlines.add("r", 6.0)
    assert deadlines.take_due(5.5) == []
    assert deadlines.take_due(8.0) == ["r"]


def test_a_deadline_takes_the_place_of_the_one_before() -> None:
    deadlines = Deadlines()
    deadlines.add("r", 5.0)
    deadlines.add("r", 7.0)
    assert (deadlines.left_s(4.0), deadlines.take_due(6.0)) == (3.0, [])
    assert deadlines.take_due(7.0) == ["r"]
    assert deadlines.take_due(9.0) == []


def test_nothing_is_kept_of_deadlines_that_were_removed() -> None:
    deadlines = Deadlines()
    deadlines.add("first", 1.0)
    for number in range(100):
        deadlines.add(str(number), 1e6 + number)
        deadlines.remove(str(number))
    assert len(deadlines._in_order) == len(deadlines._due_s) == 1
