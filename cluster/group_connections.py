"""The engines that are connected to the router, by the names of their groups."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Mapping, ValuesView
from dataclasses import dataclass, replace

from kvmesh.cluster.divergence import divergence_of
from kvmesh.cluster.leaving import name_while_leaving, to_close
from kvmesh.cluster.link import Address, Link
from kvmesh.cluster.messages import AccountNews, Hello, Replaced, Report
from kvmesh.cluster.report_book import ReportBook
from kvmesh.cluster.reports import EngineReport
from kvmesh.cluster.routing.audit import audit
from kvmesh.cluster.routing.outcome import Outcome
from kvmesh.cluster.routing.router import Router
from kvmesh.cluster.telemetry.logs import about
from kvmesh.workers.loads import EngineInfo, EngineLoads

logger = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class ConnectedGroup:
    """A group whose engine is connected.

    info: with all that is known of its KV format's divergence
    group, started_ns, node, draining: of the engine, see Hello; `name` is another while it leaves
    closed: it takes nothing new
    """

    name: str
    group: str
    connection: Link
    info: EngineInfo
    address: Address
    started_ns: int
    node: str
    draining: bool
    closed: bool = False


class GroupConnections:
    """Which group is at the other end of a connection, which are expected, and which leave.

    configured: names of all groups
    expected: of those that are to be up
    settle: sends on what the router decides
    clock: seconds, monotonic
    divergence_nats: of KV formats on the model, as the operator has measured it
    leaving_nodes: of the Ray cluster, see `nodes_leave`
    """

    def __init__(
        self,
        router: Router,
        reports: ReportBook,
        configured: Collection[str],
        expected: Collection[str],
        settle: Callable[[Iterable[Outcome]], None],
        clock: Callable[[], float],
        divergence_nats: Mapping[str, float],
    ) -> None:
        self._router = router
        self._reports = reports
        self._settle = settle
        self._clock = clock
        self._divergence_nats = divergence_nats
        self._configured = frozenset(configured)
        self.expected = frozenset(expected)
        self.leaving_nodes: frozenset[str] = frozenset()
        self._groups: dict[str, ConnectedGroup] = {}
        self._names: dict[Link, str] = {}  # of the groups, by their connections

    def __getitem__(self, name: str) -> ConnectedGroup:
        return self._groups[name]

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._groups)

    @property
    def all(self) -> ValuesView[ConnectedGroup]:
        return self._groups.values()

    def name_of(self, connection: Link) -> str:
        """The group whose engine is at the other end; "" for others, and replaced engines."""
        return self._names.get(connection, "")

    def up(self, message: Hello, connection: Link) -> None:
        """Of two engines that both stay, the later is the group's: one that hung may return.

        One that leaves gets another name, whatever the clocks of their nodes say.
        """
        name, now = message.group, self._clock()
        this = (name, message.started_ns)
        for group in [x for x in self.all if (x.group, x.started_ns) == this]:
            self.down(group.connection)  # it connects again before the end of this is known
            group.connection.close()
        leaves = message.draining or message.node in self.leaving_nodes
        former = self._groups.get(name)
        if former is not None:
            if self._leaves(former):
                self._retire(former)
            elif leaves:
                name = name_while_leaving(name, self._groups)
            elif former.started_ns > message.started_ns:
                _replace(name, connection)
                return
            else:
                self.down(former.connection)
                _replace(name, former.connection)
        logger.info(
            "group %s is up with %d leases", name, len(message.leases), extra=about(group=name)
        )
        info = replace(
            message.info, kv_divergence_nats=divergence_of(message.info, self._divergence_nats)
        )
        self._groups[name] = ConnectedGroup(
            name,
            message.group,
            connection,
            info,
            message.address,
            message.started_ns,
            message.node,
            message.draining,
        )
        self._names[connection] = name
        not_wanted = name in self._configured and name not in self.expected
        if message.draining or not_wanted or name != message.group:
            self.close(name)
        self._close_leaving()
        # Who closes has done so by now, as the router admits those that wait at once.
        closed = self._groups[name].closed
        self._settle(self._router.group_up(name, info, message.leases, now, draining=closed))
        self.account(name, AccountNews(message.update, message.pages))

    def down(self, connection: Link) -> None:
        """A connection is lost; nothing happens if no group's engine was at its other end."""
        name = self._names.pop(connection, "")
        if not name:
            return
        group = self._groups.pop(name)
        if name in self.expected:
            logger.warning("group %s is down", name, extra=about(group=name))
            self._settle(self._router.group_down(name, self._clock()))
            if (report := self._reports.latest.get(name)) is not None:
                # What it had is gone; what it is made of stays known.
                self._reports.latest[name] = EngineReport(report.info, EngineLoads())
        else:
            logger.info("group %s has left", name, extra=about(group=name))
            self._forget(name)
        self._reports.reported(name)
        if not group.closed:
            self._close_leaving()

    def account(self, name: str, message: AccountNews) -> None:
        """News of an engine's leases and pages."""
        pages = message.pages
        if pages.held or pages.dropped:
            self._router.fleet.pages_changed(name, pages.held, pages.dropped)
        if message.update:
            self._settle(self._router.account(name, message.update, self._clock()))

    def report(self, name: str, message: Report) -> None:
        """An engine's periodic report, which the ledger may have to agree with."""
        group = self._groups[name]
        if message.report.draining:
            group.draining = True
            self.close(name)
        self._reports.latest[name] = replace(message.report, info=group.info, draining=group.closed)
        if message.audited:
            self._reports.audits += 1
            account = self._router.fleet.account(name)
            assert account is not None, "it is connected"
            if faults := audit(account, message.report.loads):
                self._reports.audit_faults += 1
                words = "; ".join(faults)
                logger.error(
                    "group %s and the ledger disagree: %s", name, words, extra=about(group=name)
                )
        self._reports.reported(name)

    def expect(self, groups: frozenset[str]) -> None:
        """These groups are to be up from now on; others close, and are forgotten once they left.

        One that is wanted again, and whose engine does not drain, takes requests again.
        """
        for name in self.expected - groups:
            self._router.fleet.missing.discard(name)
            self.close(name)
            if name not in self._groups and name in self._router.fleet.groups:
                self._forget(name)
        for name in groups - self.expected:
            self._reopen(name)
        self.expected = self._router.fleet.expected = groups
        self._close_leaving()

    def nodes_leave(self, nodes: frozenset[str]) -> None:
        """These nodes of the Ray cluster end soon, and their groups with them."""
        if nodes != self.leaving_nodes:
            self.leaving_nodes = nodes
            self._close_leaving()

    def close(self, name: str) -> None:
        """The group takes nothing new; what it has is finished, or continues elsewhere."""
        if (group := self._groups.get(name)) is not None and not group.closed:
            logger.info("group %s takes nothing new", name, extra=about(group=name))
            group.closed = True
            self._router.fleet.drain(name)

    def _reopen(self, name: str) -> None:
        """Those that wait are admitted at the next tick."""
        group = self._groups.get(name)
        if group is not None and group.closed and not group.draining:
            logger.info("group %s takes requests again", name, extra=about(group=name))
            group.closed = False
            self._router.fleet.reopen(name)

    def _leaves(self, group: ConnectedGroup) -> bool:
        return group.closed or group.node in self.leaving_nodes

    def _retire(self, group: ConnectedGroup) -> None:
        """An engine that leaves ends what it has under another name."""
        self.close(group.name)
        former, group.name = group.name, name_while_leaving(group.name, self._groups)
        self._groups[group.name] = self._groups.pop(former)
        self._names[group.connection] = group.name
        self._router.fleet.retire(former, group.name)
        if (report := self._reports.latest.pop(former, None)) is not None:
            self._reports.latest[group.name] = replace(report, draining=True)

    def _close_leaving(self) -> None:
        takes = {name: group.node for name, group in self._groups.items() if not group.closed}
        for name in to_close(takes, self.leaving_nodes):
            self.close(name)

    def _forget(self, name: str) -> None:
        self._settle(self._router.group_leaves(name, self._clock()))
        self._reports.latest.pop(name, None)


def _replace(name: str, connection: Link) -> None:
    logger.warning("an engine of group %s has been replaced", name, extra=about(group=name))
    connection.send(Replaced())
    connection.close()
