"""The groups whose engines are connected to the router: under which names, and which of them leave.

joins ──► open ──► closed: takes nothing new ──► leaves
             │          ▲
             └──────────┘  its node or its engine drains, or fewer groups are wanted
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass

from kvmesh.cluster.leaving import name_while_leaving, to_close
from kvmesh.cluster.link import Address, Link
from kvmesh.cluster.messages import Hello
from kvmesh.cluster.telemetry.logs import about
from kvmesh.workers.loads import EngineInfo

logger = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Member:
    """A group whose engine is connected.

    started_ns, node: of the engine, see Hello
    closed: it takes nothing new
    """

    name: str
    connection: Link
    info: EngineInfo
    address: Address
    started_ns: int
    node: str
    closed: bool = False


class Membership:
    """Keeps names and connections in step.

    configured: names of all groups
    expected: of those that are to be up now
    on_close: called with the name of a group that takes nothing new from now on
    leaving_nodes: of the Ray cluster, that end soon
    """

    def __init__(
        self,
        configured: Collection[str],
        expected: Collection[str],
        on_close: Callable[[str], None],
    ) -> None:
        self.configured = tuple(configured)
        self.expected = frozenset(expected)
        self.leaving_nodes: frozenset[str] = frozenset()
        self.members: dict[str, Member] = {}
        self._names: dict[Link, str] = {}
        self._on_close = on_close

    def name_of(self, connection: Link) -> str:
        """The group whose engine is at the other end; "" for others, and replaced engines."""
        return self._names.get(connection, "")

    def name_for(self, hello: Hello) -> str:
        """The name under which an engine joins; "" if a later one has replaced it.

        One that leaves ends what it has next to the later one.
        """
        former = self.members.get(hello.group)
        if former is None or former.started_ns <= hello.started_ns:
            return hello.group
        leaves = hello.draining or hello.node in self.leaving_nodes
        return name_while_leaving(hello.group, self.members) if leaves else ""

    def has_to_leave(self, member: Member, hello: Hello) -> bool:
        """Whether a member gives its name to a later engine, and ends what it has."""
        leaves = member.closed or member.node in self.leaving_nodes
        return leaves and member.started_ns < hello.started_ns

    def join(self, name: str, hello: Hello, connection: Link) -> None:
        """The engine is a member."""
        self.members[name] = Member(
            name, connection, hello.info, hello.address, hello.started_ns, hello.node
        )
        self._names[connection] = name

    def close_unwanted(self, name: str, hello: Hello) -> None:
        """Close what leaves, now that the router knows the engine that has joined."""
        unwanted = name in self.configured and name not in self.expected
        if hello.draining or unwanted or name != hello.group:
            self.close(name)
        self._close_leaving()

    def leave(self, name: str) -> None:
        """The engine is no longer connected."""
        member = self.members.pop(name)
        del self._names[member.connection]
        if not member.closed:
            self._close_leaving()

    def rename(self, member: Member) -> str:
        """Close a member and take its name. Returns the one that it has from now on."""
        self.close(member.name)
        former, member.name = member.name, name_while_leaving(member.name, self.members)
        self.members[member.name] = self.members.pop(former)
        self._names[member.connection] = member.name
        return member.name

    def close(self, name: str) -> None:
        """A member takes nothing new; what it has is finished, or continues elsewhere."""
        if (member := self.members.get(name)) is not None and not member.closed:
            logger.info("group %s takes nothing new", name, extra=about(group=name))
            member.closed = True
            self._on_close(name)

    def expect(self, groups: frozenset[str]) -> frozenset[str]:
        """These groups are to be up from now on. Returns those that were, and are not connected."""
        dropped, self.expected = self.expected - groups, groups
        for name in dropped:
            self.close(name)
        return dropped - self.members.keys()

    def nodes_leave(self, nodes: frozenset[str]) -> None:
        """These nodes of the Ray cluster end soon, and their groups with them."""
        if nodes != self.leaving_nodes:
            self.leaving_nodes = nodes
            self._close_leaving()

    def _close_leaving(self) -> None:
        takes = {name: x.node for name, x in self.members.items() if not x.closed}
        for name in to_close(takes, self.leaving_nodes):
            self.close(name)
