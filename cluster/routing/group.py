"""A group as the router knows it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from kvmesh.cluster.routing.ledger import Account
from kvmesh.cluster.routing.outcome import GroupStatus
from kvmesh.cluster.routing.pace import Backlog
from kvmesh.cluster.routing.timeline import Timeline
from kvmesh.workers.loads import EngineInfo
from kvmesh.workers.sizes import PageNeed

NO_PAGES = PageNeed(0, 0)


def name_order(name: str) -> list[tuple[int, str]]:
    """Sorts names of groups with their numbers in order: engine-2 before engine-10."""
    parts = re.split(r"(\d+)", name)
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]


@dataclass(slots=True, eq=False)
class Group:
    """One group: its engine, its page of the ledger, and what is expected of it.

    info: of its engine; of the last one while the group is down
    kind: index of the engine's kind among the fleet's
    account: of the ledger; None while the group is down
    decode_step_s: time between two tokens of a sequence, a moving average
    """

    name: str
    info: EngineInfo
    kind: int
    account: Account | None
    backlog: Backlog
    decode_step_s: float
    draining: bool = False
    timeline: Timeline = field(default_factory=Timeline)

    def learn_step(self, seconds: float, weight: float) -> None:
        """A sequence took `seconds` for each token of its output."""
        self.decode_step_s += weight * (seconds - self.decode_step_s)

    def status(self) -> GroupStatus:
        account, info = self.account, self.info
        used = account.used if account else NO_PAGES
        sequences = account.sequences if account else 0
        return GroupStatus(
            group=self.name,
            up=account is not None,
            kv_format=info.kv_format,
            leases=account.num_leases if account else 0,
            sequences=sequences,
            max_sequences=info.max_num_seqs,
            capacity=info.capacity,
            used=used,
            capacity_bytes=info.capacity_bytes,
            used_bytes=info.geometry.bytes_of(used, sequences),
        )
