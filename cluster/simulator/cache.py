"""A simulated pool of sealed pages: used by sequences, cached, or free."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from kvmesh.cluster.simulator.sequence import SimSequence
from kvmesh.cluster.simulator.trace import BLOCK_TOKENS


class SimPool:
    """used + cached + free = total, in pages.

    Prompt blocks of `block_pages` pages are shared by the sequences that hold them,
    and stay cached afterwards until their pages are needed, least recently used first.

    worst_case: place only sequences that fit at their maximum length
    """

    def __init__(self, total_pages: int, page_size: int, *, worst_case: bool = False) -> None:
        self.total_pages = total_pages
        self.page_size = page_size
        self.block_pages = BLOCK_TOKENS // page_size
        self._worst_case = worst_case
        self._reserved = 0
        self.used_pages = 0
        self.evicted: list[int] = []
        self._holders: dict[int, int] = {}
        self._cached: OrderedDict[int, None] = OrderedDict()

    @property
    def cached_pages(self) -> int:
        return len(self._cached) * self.block_pages

    @property
    def available_pages(self) -> int:
        """Pages that are free or can be evicted."""
        return self.total_pages - self.used_pages

    def match(self, blocks: Sequence[int]) -> int:
        """The number of leading blocks that are in the pool."""
        for count, block in enumerate(blocks):
            if block not in self._holders and block not in self._cached:
                return count
        return len(blocks)

    def hold(self, blocks: Sequence[int]) -> None:
        """Share blocks that are in the pool."""
        for block in blocks:
            if block in self._cached:
                del self._cached[block]
                self.used_pages += self.block_pages
            self._holders[block] = self._holders.get(block, 0) + 1

    def name(self, blocks: Sequence[int]) -> None:
        """Turn a sequence's own pages into shareable blocks; duplicates are freed."""
        for block in blocks:
            holders = self._holders.get(block, 0)
            if holders or block in self._cached:
                self.used_pages -= self.block_pages
                self.hold([block])
            else:
                self._holders[block] = 1

    def drop(self, blocks: Sequence[int]) -> None:
        """Release blocks, the last ones first, so that a prefix is evicted from its end."""
        for block in reversed(blocks):
            holders = self._holders[block] - 1
            if holders:
                self._holders[block] = holders
            else:
                del self._holders[block]
                self._cached[block] = None
                self.used_pages -= self.block_pages

    def take(self, pages: int) -> bool:
        """Take pages for a sequence, evicting cached ones if needed; False if there are too few."""
        if pages > self.available_pages:
            return False
        self.used_pages += pages
        while self.used_pages + self.cached_pages > self.total_pages:
            block, _ = self._cached.popitem(last=False)
            self.evicted.append(block)
        return True

    def give(self, pages: int) -> None:
        self.used_pages -= pages

    # Sequences

    def pages(self, tokens: int) -> int:
        """Full pages. Those in a format's exact windows are counted too: a slight overestimate."""
        return tokens // self.page_size

    def place(self, seq: SimSequence) -> bool:
        """Take the pages of all its tokens, cached blocks first; False if there are too few."""
        tokens = seq.request.prompt_tokens + seq.emitted
        usable = min(self._sealed_blocks(seq), (tokens - 1) // BLOCK_TOKENS)
        hits = seq.request.blocks[: self.match(seq.request.blocks[:usable])]
        worst = self._worst_pages(seq)
        if self._reserved + worst > self.total_pages:
            return False
        self.hold(hits)
        own = self.pages(tokens) - len(hits) * self.block_pages
        if not self.take(own):
            self.drop(hits)
            return False
        self._reserved += worst
        seq.own_pages, seq.held_blocks = own, hits
        seq.context = tokens
        seq.to_prefill = tokens - len(hits) * BLOCK_TOKENS
        if seq.preemptions:
            seq.recomputed_tokens += seq.to_prefill
        else:
            seq.cached_tokens = len(hits) * BLOCK_TOKENS
        return True

    def share_prompt(self, seq: SimSequence) -> None:
        """Its prompt is computed: turn the full blocks of it into shareable ones."""
        own = seq.request.blocks[len(seq.held_blocks) : self._sealed_blocks(seq)]
        self.name(own)
        seq.own_pages -= len(own) * self.block_pages
        seq.held_blocks += own

    def free(self, seq: SimSequence) -> None:
        self.give(seq.own_pages)
        self.drop(seq.held_blocks)
        seq.own_pages, seq.held_blocks = 0, ()
        self._reserved -= self._worst_pages(seq)

    def _sealed_blocks(self, seq: SimSequence) -> int:
        sealed = self.pages(seq.request.prompt_tokens)
        return min(len(seq.request.blocks), sealed // self.block_pages)

    def _worst_pages(self, seq: SimSequence) -> int:
        """What it reserves."""
        return self.pages(seq.request.prompt_tokens + seq.max_tokens) if self._worst_case else 0
