"""The journal of a prefix cache: a reader gets every change since its last request, once."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvmesh.workers.page_journal import PageJournal
from kvmesh.workers.request import PageChanges


def test_a_reader_gets_the_changes_since_its_last_request() -> None:
    journal = PageJournal()
    assert journal.since(0) == PageChanges(0)
    journal.note({b"a": True, b"b": True})
    first = journal.since(0)
    assert (first.held, first.dropped) == ((b"a", b"b"), ())
    assert journal.since(first.version) == PageChanges(first.version)
    journal.note({b"a": False})
    journal.note({b"c": True, b"b": False})
    journal.note({b"b": True})
    later = journal.since(first.version)
    assert (later.held, later.dropped) == ((b"c", b"b"), (b"a",))


def test_the_journal_is_bounded() -> None:
    journal = PageJournal(limit=3)
    for i in range(10):
        journal.note({b"%d" % i: True})
    assert journal.since(0).held == (b"7", b"8", b"9")


@given(st.lists(st.dictionaries(st.binary(max_size=1), st.booleans(), max_size=5), max_size=20))
def test_a_reader_knows_what_is_cached_at_any_rate(
    noted: list[dict[bytes, bool]],
) -> None:
    journal = PageJournal()
    truth: dict[bytes, bool] = {}
    known: set[bytes] = set()
    version = 0
    for step, changes in enumerate(noted):
        journal.note(changes)
        truth |= changes
        if step % 3 == 0:
            found = journal.since(version)
            version = found.version
            known = (known | set(found.held)) - set(found.dropped)
            assert known == {digest for digest, held in truth.items() if held}
