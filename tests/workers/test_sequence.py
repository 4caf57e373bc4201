"""What a sequence knows of its tokens and pages, without an engine."""

from __future__ import annotations

import numpy as np
import pytest

from kvmesh.workers.deal import DEAL_TOKENS, PageDeal
from kvmesh.workers.plan import PENDING
from kvmesh.workers.request import EngineRequest, SequenceUsage
from kvmesh.workers.sampling_params import SamplingParams
from kvmesh.workers.sequence import HeldPages, Sequence
from kvmesh.workers.sequence_usage import usage_of
from kvmesh.workers.sizes import PageGeometry, PageNeed

PAGE = 16


def sequence(prompt: int, kvp: int = 1, sink: int = 0, recent: int = 0) -> Sequence:
    """Of that many tokens, 0, 1, 2…"""
    request = EngineRequest("r", np.arange(prompt, dtype=np.int32), SamplingParams(max_tokens=9))
    geometry = PageGeometry(PAGE, sink, recent, 4, 1, ranks=kvp, kvp=kvp)
    return Sequence(request, geometry, 1000)


def test_a_sequence_that_has_not_started_has_cost_nothing() -> None:
    seq = sequence(20)
    expected = SequenceUsage(
        prompt_tokens=20,
        completion_tokens=0,
        cached_tokens=0,
        sealed_pages=0,
        hot_pages=0,
        kv_bytes=0,
        reserved_bytes=0,
        queue_s=3.0,
        time_to_first_token_s=None,
        total_s=3.0,
        preemptions=0,
        pinned_tokens=0,
    )
    assert usage_of(seq, 3.0) == expected


@pytest.mark.parametrize(
    ("kvp", "tokens", "findable"),
    [(1, 1, True), (2, DEAL_TOKENS - 1, False), (2, DEAL_TOKENS, True)],
)
def test_others_find_its_pages_once_its_first_tokens_have_dealt_them(
    kvp: int, tokens: int, findable: bool
) -> None:
    seq = sequence(tokens, kvp)
    seq.take_deal(PageDeal.of(kvp, seq.tokens))
    assert seq.is_findable is findable
    seq.shares_pages = False
    assert not seq.is_findable


@pytest.mark.parametrize(
    ("kvp", "pages_of_ranks", "fullest"),
    [(1, [5], PageNeed(5, 3)), (2, [2, 3], PageNeed(3, 2)), (3, [1, 3, 1], PageNeed(3, 1))],
)
def test_its_pages_are_counted_by_the_rank_that_holds_them(
    kvp: int, pages_of_ranks: list[int], fullest: PageNeed
) -> None:
    """The name of a page says on which rank it is, whatever its place in the sequence."""
    seq = sequence(5 * PAGE, kvp)
    seq.take_deal(PageDeal(kvp))
    names = [
        page * kvp + rank for rank, count in enumerate(pages_of_ranks) for page in range(count)
    ]
    seq.hot = dict(enumerate(names))
    seq.sealed = {0: 0, 1: 1, 2: 2}
    assert seq.hot_by_rank() == pages_of_ranks
    held = HeldPages(PageNeed(5, 3), fullest)
    assert seq.held_pages() == held
    seq.note_held(held)
    seq.note_held(HeldPages(PageNeed(6, 2), PageNeed(1, 1)))
    assert seq.peak == HeldPages(PageNeed(6, 3), fullest)


def test_pages_are_missing_in_sealed_form_from_the_first_that_it_does_not_hold() -> None:
    seq = sequence(6 * PAGE, sink=1, recent=2)
    assert seq.sealed_missing(6 * PAGE) == range(1, 4)
    seq.sealed = {1: 7, 2: 9}
    assert seq.sealed_missing(6 * PAGE) == range(3, 4)
    assert not seq.sealed_missing(5 * PAGE)
    assert not seq.sealed_missing(4 * PAGE), "a hit may hold more than is due"


def test_a_plan_has_its_tokens_or_that_one_is_pending() -> None:
    seq = sequence(3)
    assert np.frombuffer(seq.tokens_of(1, 3), np.int32).tolist() == [1, 2]
    seq.pending = 1
    assert seq.tokens_of(3, 4) == PENDING
    seq.append(8)
    assert np.frombuffer(seq.tokens_of(3, 4), np.int32).tolist() == [8]
    assert seq.tokens_of(4, 5) == PENDING
