"""What an engine reports to the router: its facts, its leases, cached blocks, and loads."""

from __future__ import annotations

from collections import deque
from dataclasses import replace

from kvmesh.workers.cached_blocks import CachedBlocks
from kvmesh.workers.engine import Engine
from kvmesh.workers.engine_thread import EngineNews
from kvmesh.workers.lease_book import LeaseBook
from kvmesh.workers.loads import EngineLoads, StepTime

MAX_STEPS = 1 << 14  # that nobody has taken


class EngineAccount:
    """Belongs to the leader's event loop.

    loads: the latest report, at most a step old, exact when idle
    loads_current: whether no sequence has started or ended since
    """

    def __init__(self, engine: Engine) -> None:
        self.info = engine.info
        self.book = LeaseBook(engine.geometry, engine.info.capacity)
        self.blocks = CachedBlocks()
        self.loads = EngineLoads()
        self.loads_current = False
        self._steps: deque[StepTime] = deque(maxlen=MAX_STEPS)

    def note(self, report: EngineNews) -> None:
        """A report of the engine, made after all that the book has heard of."""
        self.loads = replace(report.loads, leases=self.book.leases)
        self.loads_current = True
        self.blocks.note(report.pages)
        self._steps.extend(report.steps)

    def take_steps(self) -> list[StepTime]:
        """The steps since the last call, or the latest of them."""
        taken = list(self._steps)
        self._steps.clear()
        return taken
