"""What the ledger charges is what dealt pages take: nothing is credited as shared that is not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import numpy as np
from hypothesis import given

from kvmesh.cluster.routing.ledger import Account
from kvmesh.cluster.routing.live import Lease
from kvmesh.cluster.routing.request import PlaceRequest
from kvmesh.workers.config import EngineConfig
from kvmesh.workers.engine import Engine
from kvmesh.workers.prefix_cache import PageDigests
from kvmesh.workers.request import EngineRequest
from kvmesh.workers.sampling_params import SamplingParams
from kvmesh.workers.sizes import BLOCK_PAGES
from tests.exercised import Exercised
from tests.scenarios import SEEDS, check, scenarios
from tests.workers.memory_executor import TP, MemoryExecutor, expected_output

PAGE = 16
CONTEXT = 20 * PAGE
# Each is what a short prompt continues with: so that a sequence that begins short comes to have
# what others begin with.
TEXTS = [[x, *expected_output([x], CONTEXT, ignore_eos=True)] for x in (2, 3)]

SEEN = Exercised(
    "dealt ledger",
    {"leases": 170, "leases that share": 15, "short beginnings": 50, "prefix hits": 70},
)


@dataclass(frozen=True)
class Ask:
    """A request for the first tokens of a text, then steps."""

    text: int
    tokens: int
    more: int
    steps: int


class LedgerMachine:
    """An engine, and the ledger's account of it, which sees prompts alone."""

    def __init__(self, kvp: int, sink: int, recent: int) -> None:
        executor = MemoryExecutor(PAGE, sink, recent, 700 // kvp, CONTEXT, kvp=kvp)
        config = EngineConfig(
            model="memory",
            page_size=PAGE,
            max_num_seqs=5,
            max_num_batched_tokens=12,
            max_hot_share=0.8,
            tp=TP,
            kvp=kvp,
        )
        self.engine = Engine(config, executor)
        self.account = Account("group", self.engine.info, BLOCK_PAGES)
        self.leases: dict[str, Lease] = {}
        self.asked = 0

    def call(self, call: Ask) -> None:
        prompt = TEXTS[call.text][: call.tokens]
        more = min(call.more, CONTEXT - len(prompt))
        geometry, info = self.engine.geometry, self.engine.info
        need = geometry.peak_need(len(prompt) + more)
        pages = geometry.sealed_range(len(prompt)).stop // BLOCK_PAGES * BLOCK_PAGES
        digests = PageDigests(PAGE, "").upto(np.array(prompt, np.int32), pages)
        blocks = tuple(digests[BLOCK_PAGES - 1 :: BLOCK_PAGES])
        shared = self.account.blocks.shared_pages(blocks)
        room = self.account.sequences < info.max_num_seqs
        if more and room and self.account.holds(need, 0, shared):
            self.asked += 1
            name = f"r{self.asked}"
            place = PlaceRequest(name, len(prompt), more)
            self.leases[name] = self.account.grant((0, self.asked), need, need, place, 0.0, blocks)
            params = SamplingParams(temperature=0.0, max_tokens=more, ignore_eos=True)
            self.engine.add(EngineRequest(name, np.array(prompt, np.int32), params))
            SEEN.add("leases")
            SEEN.add("leases that share", shared > 0)
            SEEN.add("short beginnings", len(prompt) < PAGE)
        self.run(call.steps)

    def run(self, steps: int) -> None:
        for _ in range(steps):
            if not self.engine.has_work:
                break
            for delta in self.engine.step():
                if delta.finish_reason is not None:
                    assert delta.usage is not None
                    SEEN.add("prefix hits", delta.usage.cached_tokens > 0)
                    self.account.release(self.leases.pop(delta.request_id))
            used = [part.used for part in self.engine.scheduler.cache.sealed.parts]
            assert max(used) <= self.account.used.sealed, "a rank holds more than is charged"
        assert not self.engine.scheduler.preemptions_total, "leases were granted that do not fit"


def random_asks(chance: Random) -> list[Ask]:
    """A sequence that begins short, and others of the same contents about when it fills a page."""
    length = chance.choice([1, 5, 9])
    first = Ask(0, length, chance.choice([PAGE, 2 * PAGE]), PAGE - length - chance.randrange(6))
    tokens = [5, PAGE + 5, 9 * PAGE, 17 * PAGE, 17 * PAGE + 3]
    others = [
        Ask(
            text=chance.choice([0, 0, 0, 1]),
            tokens=chance.choice(tokens),
            more=chance.choice([1, 5, PAGE]),
            steps=chance.choice([0, 2, 7, 20, 30]),
        )
        for _ in range(8)
    ]
    return [first, *others]


@SEEN.required
@scenarios(40)
@given(seed=SEEDS)
def test_no_rank_holds_more_than_the_ledger_charges(seed: int) -> None:
    chance = Random(seed)
    kvp, sink, recent = chance.choice([2, 3, 4]), chance.choice([0, 1]), chance.choice([0, 2])

    def run(calls: Sequence[Ask]) -> None:
        machine = LedgerMachine(kvp, sink, recent)
        for call in calls:
            machine.call(call)
        machine.run(5000)
        assert not machine.engine.has_work and not machine.leases

    check(run, random_asks(chance))
