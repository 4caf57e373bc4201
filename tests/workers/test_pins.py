"""Which prompts stay cached, for how long, and within which bounds."""

from __future__ import annotations

from kvmesh.workers.pins import PinBounds, Pins
from kvmesh.workers.prefix_cache import PrefixCache
from kvmesh.workers.sizes import PageGeometry, PageNeed

BOUNDS = PinBounds(PageNeed(4, 12), PageNeed(3, 8))


def make_pins(bounds: PinBounds = BOUNDS) -> Pins:
    return Pins(PrefixCache(PageGeometry(16, 1, 1, 4, 1), 20, 20, True), bounds)


def prompt(text: str, pages: int) -> list[bytes]:
    """Digests of its pages: prompts of one text begin alike."""
    return [f"{text}{page}".encode() for page in range(pages)]


def hold(pins: Pins, owner: str, digests: list[bytes], until_s: float, exact: int = 1) -> bool:
    held = pins.hold(owner, digests, digests[-exact:], until_s)
    pins.check()
    return held


def test_a_pin_ends_at_its_time_which_every_request_sets() -> None:
    pins = make_pins()
    assert hold(pins, "a", prompt("x", 3), 10.0) and hold(pins, "a", prompt("y", 2), 20.0)
    assert pins.left_s(4.0) == 6.0
    assert hold(pins, "a", prompt("x", 3), 5.0), "earlier, too"
    pins.expire(5.0)
    pins.check()
    assert pins.pages == PageNeed(1, 2)
    pins.end("a", prompt("y", 2)[-1])
    pins.end("b", prompt("y", 2)[-1])
    assert pins.pages == PageNeed(0, 0) and pins.left_s(6.0) is None
    pins.check()


def test_a_longer_prompt_replaces_what_it_begins_with_unless_that_is_to_stay_longer() -> None:
    pins = make_pins()
    assert hold(pins, "a", prompt("x", 3), 100.0) and hold(pins, "a", prompt("x", 5), 10.0)
    assert pins.pages.sealed == 5, "pages in common count once"
    pins.expire(10.0)
    assert pins.pages.sealed == 3
    assert hold(pins, "a", prompt("x", 5), 200.0)
    pins.expire(150.0)
    assert pins.pages == PageNeed(1, 5), "the shorter one has ended with it"
    pins.check()


def test_bounds_hold_for_all_and_for_each_and_nothing_is_taken_from_others() -> None:
    pins = make_pins()
    assert hold(pins, "a", prompt("x", 8), 10.0)
    assert not hold(pins, "a", prompt("y", 1), 10.0), "an owner's pages"
    assert not hold(pins, "b", prompt("y", 5), 10.0), "the group's"
    assert hold(pins, "b", prompt("y", 4), 10.0)
    assert hold(pins, "a", prompt("x", 8), 30.0), "a pin that is there can always be renewed"
    pins.expire(10.0)
    assert not hold(pins, "b", prompt("z", 4), 40.0, exact=4), "an owner's exact pages"
    assert hold(pins, "b", prompt("z", 4), 40.0, exact=3)
    pins.expire(40.0)
    assert pins.pages == PageNeed(0, 0)
    assert not hold(make_pins(PinBounds.of(20, 20, 0.0, 1.0)), "a", prompt("x", 1), 1.0)


def test_a_longer_prompt_fits_where_the_shorter_one_did() -> None:
    """What ends with it does not count against it."""
    for others in ([], ["b"]):
        pins = make_pins()
        for other in others:
            assert hold(pins, other, prompt("y", 2), 10.0, exact=2)
        assert hold(pins, "a", prompt("x", 3), 10.0, exact=2)
        assert not hold(pins, "a", prompt("x", 5), 5.0, exact=2), "the shorter one stays"
        assert hold(pins, "a", prompt("x", 5), 10.0, exact=2)
        assert pins.pages == PageNeed(2 + 2 * len(others), 5 + 2 * len(others))


def test_owners_with_the_same_contents_hold_them_each() -> None:
    pins = make_pins()
    assert hold(pins, "a", prompt("x", 3), 10.0) and hold(pins, "b", prompt("x", 3), 20.0)
    pins.expire(10.0)
    pins.check()
    assert pins.pages.sealed == 3
