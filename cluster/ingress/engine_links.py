"""The ingress's connections to engines: sequences out, deltas back."""

from __future__ import annotations

import asyncio
import logging
from typing import Protocol

from kvmesh.cluster.errors import EngineLostError
from kvmesh.cluster.identity import Identity
from kvmesh.cluster.link import Address, Link, LinkError, connect
from kvmesh.cluster.messages import TO_INGRESS_FROM_ENGINE, Deltas, End, Rejected, Submit
from kvmesh.workers.request import EndReason, SequenceDelta

logger = logging.getLogger(__name__)


class Receiver(Protocol):
    """Receives the output of a lease's sequences. No method may block."""

    def deliver(self, delta: SequenceDelta) -> None: ...

    def reject(self, error: Exception) -> None:
        """The engine rejected the sequences; no output follows."""

    def lose(self) -> None:
        """The engine is gone; no output follows."""


class EngineLink:
    """A connection to one engine, and the handler of its messages."""

    def __init__(self) -> None:
        self._connection: Link | None = None
        self._receivers: dict[str, Receiver] = {}  # by sequence
        self._sequences: dict[str, tuple[str, ...]] = {}  # by lease

    def use(self, connection: Link) -> EngineLink:
        self._connection = connection
        return self

    @property
    def closed(self) -> bool:
        return self._connection is None or self._connection.closed

    def submit(self, message: Submit, receiver: Receiver) -> None:
        """Send the sequences of a lease; raises EngineLostError."""
        if self.closed:
            raise EngineLostError()
        assert self._connection is not None
        ids = tuple(sequence.request_id for sequence in message.sequences)
        self._sequences[message.lease.lease_id] = ids
        self._receivers.update(dict.fromkeys(ids, receiver))
        self._connection.send(message)

    def end(self, request_ids: list[str], reason: EndReason) -> None:
        """End sequences; their last deltas follow."""
        if self._connection is not None:
            self._connection.send(End(request_ids, reason))

    def forget(self, lease_id: str) -> None:
        """Stop receiving a lease's output; sequences that still run are ended."""
        ids = self._sequences.pop(lease_id, ())
        left = [name for name in ids if self._receivers.pop(name, None) is not None]
        if left:
            self.end(left, EndReason.ABORT)

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()

    def received(self, message: Deltas | Rejected) -> None:
        receivers = self._receivers
        match message:
            case Deltas(deltas=deltas):
                for delta in deltas:
                    if delta.finish_reason is None:
                        receiver = receivers.get(delta.request_id)
                    else:
                        receiver = receivers.pop(delta.request_id, None)
                    if receiver is not None:
                        receiver.deliver(delta)
            case Rejected(lease_id=lease_id, failure=failure):
                found = [receivers.pop(x, None) for x in self._sequences.pop(lease_id, ())]
                for receiver in dict.fromkeys(found):
                    if receiver is not None:
                        receiver.reject(failure.error)

    def lost(self) -> None:
        receivers, self._receivers = self._receivers, {}
        for receiver in dict.fromkeys(receivers.values()):
            receiver.lose()


class EngineLinks:
    """One connection per engine, opened at first use."""

    def __init__(self, identity: Identity) -> None:
        self._identity = identity
        self._links: dict[str, EngineLink] = {}
        self._opening: dict[str, asyncio.Task[EngineLink]] = {}

    async def get(self, epoch: str, address: Address) -> EngineLink:
        """The connection to the engine of this incarnation; raises EngineLostError."""
        link = self._links.get(epoch)
        if link is not None and not link.closed:
            return link
        opening = self._opening.get(epoch)
        if opening is None:
            opening = asyncio.create_task(self._open(epoch, address))
            self._opening[epoch] = opening
        # Shielded: other requests use the connection too.
        return await asyncio.shield(opening)

    async def _open(self, epoch: str, address: Address) -> EngineLink:
        link = EngineLink()
        try:
            await connect(address, self._identity, TO_INGRESS_FROM_ENGINE, link.use)
        except LinkError as error:
            logger.warning("%s", error)
            raise EngineLostError() from None
        finally:
            del self._opening[epoch]
        self._links = {name: x for name, x in self._links.items() if not x.closed}
        self._links[epoch] = link
        return link

    def close(self) -> None:
        """Close every connection, which ends all sequences submitted over it."""
        for link in self._links.values():
            link.close()
