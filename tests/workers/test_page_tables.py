"""Pages of sequences: found, sealed and named, once each."""

from __future__ import annotations

import numpy as np
import pytest

from kvmesh.workers.deal import PageDeal
from kvmesh.workers.page_tables import PageTables
from kvmesh.workers.prefix_cache import Digest, PrefixCache
from kvmesh.workers.request import EngineRequest
from kvmesh.workers.sampling_params import SamplingParams
from kvmesh.workers.sequence import Sequence
from kvmesh.workers.sizes import BLOCK_PAGES, PageGeometry
from kvmesh.workers.step_draft import StepDraft

PAGE = 16


class Desk:
    """Page tables, and a step that is being planned."""

    def __init__(self, *, kvp: int = 1, recent: int = 0) -> None:
        self.geometry = PageGeometry(PAGE, 0, recent, 4, 1, ranks=kvp, kvp=kvp)
        self.cache = PrefixCache(self.geometry, 8, 8, enabled=True)
        self.tables = PageTables(self.geometry, self.cache)
        self.draft = StepDraft(1000, [8] * kvp)
        self.rows = 0

    def sequence(self, prompt: int) -> Sequence:
        """Of that many tokens, 0, 1, 2…"""
        params = SamplingParams(max_tokens=100)
        request = EngineRequest("r", np.arange(prompt, dtype=np.int32), params)
        seq = Sequence(request, self.geometry, 10_000)
        seq.row, self.rows = self.rows, self.rows + 1
        return seq

    def start(self, seq: Sequence, max_pages: int) -> int:
        """How many pages it begins with."""
        hit = self.tables.reuse(seq, max_pages)
        seq.num_computed = hit.num_pages * PAGE
        self.tables.start(seq)
        return hit.num_pages

    def compute(self, seq: Sequence, end: int) -> None:
        """Its tokens before `end`, of which the last may be pending."""
        self.tables.write(seq, range(seq.num_computed // PAGE, -(-end // PAGE)), self.draft)
        self.tables.seal(seq, seq.sealed_missing(end), self.draft)
        seq.num_computed = end
        self.tables.publish(seq)


def test_a_page_that_is_not_full_yet_is_found_once_it_is() -> None:
    desk = Desk()
    first = desk.sequence(PAGE + 3)
    assert desk.start(first, 0) == 0
    desk.compute(first, PAGE + 3)
    for token in range(PAGE + 3, 2 * PAGE):
        first.append(token)
    desk.compute(first, 2 * PAGE)
    second = desk.sequence(2 * PAGE + 1)
    assert desk.start(second, 2) == 2
    assert second.sealed == first.sealed


def test_a_page_that_a_pending_token_fills_is_sealed_for_itself_and_named_later() -> None:
    desk = Desk()
    first = desk.sequence(2 * PAGE - 1)
    desk.start(first, 0)
    desk.compute(first, 2 * PAGE)
    assert desk.start(desk.sequence(2 * PAGE + 1), 2) == 1
    first.append(2 * PAGE - 1)
    first.num_computed += 1
    desk.tables.publish(first)
    assert desk.start(desk.sequence(2 * PAGE + 1), 2) == 2


def test_every_page_is_named_once(monkeypatch: pytest.MonkeyPatch) -> None:
    desk = Desk(recent=2)
    named: list[Digest] = []
    name = desk.cache.hot.name

    def noted(page: int, digest: Digest) -> None:
        named.append(digest)
        name(page, digest)

    monkeypatch.setattr(desk.cache.hot, "name", noted)
    seq = desk.sequence(5 * PAGE)
    desk.start(seq, 0)
    for end in (PAGE, 3 * PAGE + 1, 5 * PAGE):
        desk.compute(seq, end)
    assert named == seq.digests(5)


def test_an_isolated_sequence_begins_with_no_page_of_others() -> None:
    desk = Desk()
    first, second = desk.sequence(PAGE), desk.sequence(PAGE + 1)
    desk.start(first, 0)
    desk.compute(first, PAGE)
    second.shares_pages = False
    assert desk.start(second, 1) == 0


def test_pages_are_dealt_by_the_first_tokens() -> None:
    desk = Desk(kvp=3)
    seq = desk.sequence(PAGE)
    desk.start(seq, 0)
    assert seq.deal == PageDeal.of(3, seq.tokens) != PageDeal.of(3, seq.tokens[:1])


@pytest.mark.parametrize(
    ("tokens", "near"),
    [
        (PAGE - 1, 0),
        (PAGE, 1),
        (8 * PAGE, 1),
        (8 * PAGE + PAGE // 2, 1),
        (9 * PAGE, 2),
        (9 * PAGE - 1, 1),
        (8 * BLOCK_PAGES * PAGE, BLOCK_PAGES),
        (9 * BLOCK_PAGES * PAGE, BLOCK_PAGES),
    ],
)
def test_the_last_eighth_of_a_prompts_pages_is_its_end_up_to_a_block(
    tokens: int, near: int
) -> None:
    desk = Desk()
    seq = desk.sequence(tokens)
    pages = tokens // PAGE
    found = [page for page in range(pages + 2) if desk.tables.ends_near(seq, page)]
    assert found == [*range(pages - near, pages)]
