"""The arithmetic of pages, compared with a count page by page."""

from __future__ import annotations

import pytest

from kvmesh.workers.sizes import PageGeometry, PageNeed

PAGE = 4
GEOMETRIES = [
    PageGeometry(PAGE, sink, recent, hot_page_bytes=10, sealed_page_bytes=3, ranks=2)
    for sink in range(3)
    for recent in range(3)
]


def counted(geometry: PageGeometry, tokens: int) -> PageNeed:
    """As sizes.py defines it: a page is hot in the sink and from P - recent, otherwise sealed."""
    query_page = tokens // PAGE
    written = range(-(-tokens // PAGE))
    first_recent = query_page - geometry.recent_pages
    hot = [page for page in written if page < geometry.sink_pages or page >= first_recent]
    return PageNeed(len(hot), len(written) - len(hot))


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_pages_of_every_length(geometry: PageGeometry) -> None:
    peak = PageNeed(0, 0)
    for tokens in range(1, 12 * PAGE):
        need = geometry.need(tokens)
        assert need == counted(geometry, tokens)
        assert need.hot <= geometry.hot_per_sequence()
        assert len(geometry.sealed_range(tokens)) == need.sealed
        assert geometry.sealed_range(tokens).start == geometry.sink_pages
        peak = PageNeed(max(peak.hot, need.hot), max(peak.sealed, need.sealed))
        assert geometry.peak_need(tokens) == peak


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_the_tokens_within_some_pages_need_no_more_and_the_next_does(
    geometry: PageGeometry,
) -> None:
    for pages in range(6):
        tokens = geometry.tokens_within(pages)
        assert geometry.need(tokens).sealed == pages
        assert geometry.need(tokens + 1).sealed == pages + 1


def test_bytes_are_of_both_kinds_on_all_ranks() -> None:
    assert GEOMETRIES[0].bytes_of(PageNeed(5, 7)) == 2 * (50 + 21)


def test_needs_are_compared_in_both_kinds() -> None:
    room = PageNeed(3, 5)
    assert PageNeed(3, 5).fits(room)
    assert not PageNeed(4, 5).fits(room)
    assert not PageNeed(3, 6).fits(room)
    assert PageNeed(1, 2) + PageNeed(3, 5) == PageNeed(4, 7)
    assert PageNeed(1, 2) - PageNeed(3, 5) == PageNeed(-2, -3)


DEALT = [
    PageGeometry(PAGE, sink, recent, hot_page_bytes=10, sealed_page_bytes=3, kvp=kvp)
    for sink in range(3)
    for recent in range(3)
    for kvp in (2, 3, 8)
]


@pytest.mark.parametrize("geometry", DEALT)
def test_no_rank_has_more_pages_than_the_fullest(geometry: PageGeometry) -> None:
    for tokens in range(1, 30 * PAGE):
        query_page, written = tokens // PAGE, range(-(-tokens // PAGE))
        first_recent = query_page - geometry.recent_pages
        hot, sealed = [0] * geometry.kvp, [0] * geometry.kvp
        for page in written:
            is_hot = page < geometry.sink_pages or page >= first_recent
            (hot if is_hot else sealed)[page % geometry.kvp] += 1
        need, peak = geometry.need(tokens), geometry.peak_need(tokens)
        assert max(hot) <= need.hot <= peak.hot <= geometry.hot_per_sequence()
        assert max(sealed) == need.sealed == peak.sealed
        spread_over_all = PageNeed(need.hot * geometry.kvp, need.sealed * geometry.kvp)
        assert PageNeed(sum(hot), sum(sealed)).fits(spread_over_all)


@pytest.mark.parametrize("geometry", DEALT)
def test_tokens_within_dealt_pages_need_no_more_and_the_next_does(geometry: PageGeometry) -> None:
    for pages in range(6):
        tokens = geometry.tokens_within(pages)
        assert geometry.need(tokens).sealed == pages
        assert geometry.need(tokens + 1).sealed == pages + 1
