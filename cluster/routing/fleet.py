"""All groups that the router knows, and what it has learned of them and of requests."""

from __future__ import annotations

import math
from collections.abc import Iterable

from kvmesh.cluster.routing.config import RouterConfig
from kvmesh.cluster.routing.demand import DemandModel, EngineKind, RequestDemand
from kvmesh.cluster.routing.fairness import Tenants
from kvmesh.cluster.routing.group import Group, name_order
from kvmesh.cluster.routing.ledger import Account
from kvmesh.cluster.routing.output_lengths import OutputLengths
from kvmesh.cluster.routing.pace import Backlog
from kvmesh.cluster.routing.prefix_index import PrefixIndex
from kvmesh.cluster.routing.request import Past, PlaceRequest
from kvmesh.workers.loads import EngineInfo


class Fleet:
    """What changes here decides nothing, and needs no decision.

    groups: by name, in its order; those that are down stay known
    expected: groups that are to be up
    missing: of those expected at the start, the ones that were not up so far
    kinds: of the groups' engines
    tenants: and what they use
    index: of the prefixes that groups hold
    lengths: of outputs
    """

    def __init__(self, config: RouterConfig, expected_groups: Iterable[str]) -> None:
        tuning = config.tuning
        self.tenants = Tenants(config.tenants, config.tenant_default)
        self.index = PrefixIndex(tuning.index_limit)
        self.lengths = OutputLengths(min_samples=tuning.min_samples)
        self.groups: dict[str, Group] = {}
        self.expected = frozenset(expected_groups)
        self.missing = set(self.expected)
        self.kinds: tuple[EngineKind, ...] = ()
        self._tuning = tuning
        self._model = DemandModel(self.lengths, self.index, tuning)

    def demand(self, request: PlaceRequest) -> RequestDemand:
        """The request in terms of pages, at this moment's knowledge."""
        return self._model.demand(request, self.kinds)

    def quota_left(self, request: PlaceRequest) -> float:
        """Bytes that the request may lease now.

        One that lost its group continues past its tenant's quota, as if it had grown there.
        """
        return math.inf if request.past is Past.RAN else self.tenants.quota_left(request.tenant)

    def account(self, name: str) -> Account | None:
        """A group's page of the ledger; None while it is not up."""
        group = self.groups.get(name)
        return None if group is None else group.account

    def up(self, name: str, info: EngineInfo, *, draining: bool) -> None:
        """A group that was not up is there, and has no leases so far."""
        self.missing.discard(name)
        pace = self._tuning.pace
        account = Account(name, info, self._tuning.block_pages)
        backlog = Backlog(pace)
        self._enter(Group(name, info, 0, account, backlog, pace.decode_step_s, draining))
        kinds = {EngineKind.of(group.info): 0 for group in self.groups.values()}
        self.kinds = tuple(kinds)
        for group in self.groups.values():
            group.kind = self.kinds.index(EngineKind.of(group.info))

    def down(self, name: str) -> None:
        """A group is lost, and has no leases any more."""
        if (group := self.groups.get(name)) is not None:
            group.account = None
            self.index.clear(name)

    def drain(self, name: str) -> None:
        """A group, if it is known, takes nothing new and finishes what it has; its leases stay."""
        if (group := self.groups.get(name)) is not None:
            group.draining = True

    def reopen(self, name: str) -> None:
        """A draining group takes requests after all."""
        self.groups[name].draining = False

    def retire(self, name: str, as_name: str) -> None:
        """A draining group leaves its name to another, and ends its leases under `as_name`."""
        group = self.groups.pop(name)
        assert group.draining and group.account is not None
        group.name = as_name
        group.account.rename(as_name)
        self._enter(group)
        self.index.clear(name)  # it gets no more prompts, so nothing is to be found there

    def forget(self, name: str) -> None:
        """A group that is down will not return."""
        group = self.groups.pop(name)
        assert group.account is None

    def pages_changed(self, name: str, held: Iterable[bytes], dropped: Iterable[bytes]) -> None:
        """A group's prefix cache gained and lost pages with these hashes."""
        if self.account(name) is not None:
            self.index.add(name, held)
            self.index.remove(name, dropped)

    def _enter(self, group: Group) -> None:
        """Others hold this dict, so it is put in order in its place."""
        entered = {**self.groups, group.name: group}
        self.groups.clear()
        self.groups.update((name, entered[name]) for name in sorted(entered, key=name_order))
