"""Groups that start and stop while a simulation runs, as the router's autoscaler decides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kvmesh.cluster.routing.autoscaling import Autoscaler, AutoscalingPolicy, fleet_load
from kvmesh.cluster.routing.outcome import Outcome
from kvmesh.cluster.routing.router import Router
from kvmesh.cluster.simulator.engine import SimEngine
from kvmesh.workers.loads import EngineInfo

DECIDE_S = 1.0


@dataclass(frozen=True, slots=True)
class Autoscaling:
    """start_s: from the decision to add a group until it takes requests"""

    policy: AutoscalingPolicy
    start_s: float = 60.0


class GroupClock:
    """How long groups hold their GPUs, from the decision to add them until they are empty."""

    def __init__(self) -> None:
        self._since: dict[str, float] = {}
        self._total_s = 0.0

    def start(self, group: str, now: float) -> None:
        self._since[group] = now

    def stop(self, group: str, now: float) -> None:
        self._total_s += now - self._since.pop(group)

    def total_s(self, now: float) -> float:
        return self._total_s + sum(now - since for since in self._since.values())


class SimScaler:
    """Starts and stops groups of one simulation.

    engines, infos: by name, of all groups
    autoscaler: None if all of them run all the time
    """

    def __init__(
        self,
        router: Router,
        engines: Mapping[str, SimEngine],
        infos: Mapping[str, EngineInfo],
        scaling: Autoscaling | None,
    ) -> None:
        self.clock = GroupClock()
        self.autoscaler: Autoscaler | None = None
        self._router = router
        self._engines = engines
        self._infos = infos
        self._starting: dict[str, float] = {}  # when they are up
        self._running: set[str] = set()
        self._stopping: set[str] = set()
        self._decide_at = 0.0
        first: Sequence[str] = tuple(engines)
        if scaling is not None:
            self.autoscaler = Autoscaler(scaling.policy, tuple(engines), (), 0.0)
            self._start_s = scaling.start_s
            first = [name for name in engines if name in self.autoscaler.wanted]
        for name in first:
            self.clock.start(name, 0.0)
            self._up(name, 0.0)

    def tick(self, now: float) -> list[Outcome]:
        if self.autoscaler is None:
            return []
        outcomes: list[Outcome] = []
        for name in [name for name, at in self._starting.items() if at <= now]:
            del self._starting[name]
            outcomes += self._up(name, now)
        for name in [name for name in self._stopping if not self._engines[name].in_flight]:
            self._stopping.discard(name)
            self._engines[name].forget_prefixes()
            self.clock.stop(name, now)
            outcomes += self._router.group_leaves(name, now)
        if now >= self._decide_at:
            self._decide_at = now + DECIDE_S
            self._follow(self.autoscaler.decide(fleet_load(self._router, now), now), now)
        return outcomes

    def _follow(self, wanted: frozenset[str], now: float) -> None:
        for name in sorted(wanted - self._running - self._stopping - self._starting.keys()):
            self.clock.start(name, now)
            self._starting[name] = now + self._start_s
        for name in sorted(self._running - wanted):
            self._running.discard(name)
            self._stopping.add(name)
            self._router.fleet.drain(name)
        for name in self._starting.keys() - wanted:
            del self._starting[name]
            self.clock.stop(name, now)

    def _up(self, name: str, now: float) -> list[Outcome]:
        self._running.add(name)
        return self._router.group_up(name, self._infos[name], (), now)
