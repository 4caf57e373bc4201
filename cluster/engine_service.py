"""An engine as a process of a cluster.

    ingresses ── Submit, End ──► [leader] ── Deltas ──► the ingress that submitted
                                    │
                                    └── the account of leases ──► router (account_link.py)

If an ingress's connection is lost, its sequences are ended.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

import numpy as np

from kvmesh.cluster.account_link import AccountLink
from kvmesh.cluster.errors import EngineLostError, Failure
from kvmesh.cluster.identity import Identity
from kvmesh.cluster.link import Address, Link, Listener, listen
from kvmesh.cluster.messages import (
    TO_ENGINE_FROM_INGRESS,
    Deltas,
    End,
    NewSequence,
    Rejected,
    Submit,
)
from kvmesh.cluster.routing.errors import RequestAbortedError
from kvmesh.cluster.telemetry.gpus import Gpus
from kvmesh.cluster.telemetry.meters import EngineMeters
from kvmesh.workers.config import EngineConfig
from kvmesh.workers.errors import EngineDrainingError, EngineError, WorkerDiedError
from kvmesh.workers.executor import Executor
from kvmesh.workers.leader import EngineLeader
from kvmesh.workers.loads import EngineInfo
from kvmesh.workers.request import EndReason, EngineRequest, SequenceDelta, TokenIds

logger = logging.getLogger(__name__)

HAND_OVER_S = 5.0  # for the step that computes when sequences are handed over


class EngineService:
    """One group's engine.

    group: its name
    host: address of this node, to listen on
    node: this node's name in the Ray cluster
    find_router: where the router listens; raises LinkError while it is not known
    report_period_s: between two reports to the router
    """

    def __init__(
        self,
        group: str,
        config: EngineConfig,
        executor: Executor,
        meters: EngineMeters,
        identity: Identity,
        find_router: Callable[[], Awaitable[Address]],
        *,
        host: str = "127.0.0.1",
        node: str = "",
        report_period_s: float = 1.0,
    ) -> None:
        self._executor = executor
        self.leader = EngineLeader(config, executor, lambda: self._account.changed())
        self._account = AccountLink(group, node, self.leader, meters, report_period_s)
        self._meters = meters
        self._identity = identity
        self._find_router = find_router
        self._host = host
        self._listener: Listener | None = None

    # Life

    async def start(self) -> EngineInfo:
        """Wait until the ranks have loaded, then serve; raises what kept them from it."""
        info = await self.leader.start()
        self._listener = await listen(
            self._host, self._identity, TO_ENGINE_FROM_INGRESS, lambda c: _Ingress(self, c)
        )
        gpus = Gpus([rank.gpu_uuid for rank in self._executor.describe()])
        self._account.start(self._find_router, self._identity, self._listener.address, gpus)
        return info

    def check_health(self) -> None:
        """Raises EngineLostError when the engine has failed, or the router no longer hears of it.

        It is then replaced.
        """
        if self.leader.failed is not None or self._account.broken:
            raise EngineLostError()

    async def drain(self, timeout_s: float) -> None:
        """Accept nothing new and let running sequences end, for at most this long.

        Those that are left continue on other groups, with their tokens so far as a prefix.
        """
        self._account.draining = True
        self._account.report_now()
        try:
            async with asyncio.timeout(timeout_s + HAND_OVER_S):
                await self.leader.drain(timeout_s)
        except TimeoutError:
            logger.error("a step hangs, so the engine ends with its sequences")

    async def stop(self) -> None:
        self._account.leave()
        if self._listener is not None:
            self._listener.close()
        await self.leader.stop()

    # Ingresses

    def submit(self, message: Submit, ingress: _Ingress) -> None:
        """Accept all sequences of a lease, or reject them.

        A leader that drains or has failed counts as lost, so that the request moves elsewhere.
        """
        lease_id = message.lease.lease_id
        try:
            if lease_id in self._account.withdrawn:
                raise RequestAbortedError()
            self.leader.submit([_request(message, x) for x in message.sequences], ingress.deliver)
        except (EngineDrainingError, WorkerDiedError):
            ingress.reject(lease_id, Failure.of(EngineLostError()))
        except (EngineError, RequestAbortedError) as error:
            ingress.reject(lease_id, Failure.of(error))
        except Exception:
            # A bug that one request triggers must not end the others.
            logger.exception("internal error at the request of lease %s", lease_id)
            ingress.reject(lease_id, Failure.of(EngineError("internal error")))

    def end(self, request_ids: list[str], reason: EndReason) -> None:
        self.leader.abort(request_ids, reason)

    def count(self, deltas: list[SequenceDelta]) -> None:
        self._meters.deltas(deltas)


class _Ingress:
    """A connected ingress."""

    def __init__(self, service: EngineService, connection: Link) -> None:
        self._service = service
        self._connection = connection

    def received(self, message: Submit | End) -> None:
        match message:
            case Submit():
                self._service.submit(message, self)
            case End(request_ids=request_ids, reason=reason):
                self._service.end(request_ids, reason)

    def lost(self) -> None:
        self._service.leader.disconnect(self.deliver)

    def deliver(self, deltas: list[SequenceDelta]) -> None:
        self._service.count(deltas)
        self._connection.send(Deltas(deltas))

    def reject(self, lease_id: str, failure: Failure) -> None:
        self._connection.send(Rejected(lease_id, failure))


def _request(message: Submit, sequence: NewSequence) -> EngineRequest:
    ids = _token_ids(message.prompt + sequence.output if sequence.output else message.prompt)
    return EngineRequest(
        request_id=sequence.request_id,
        prompt_token_ids=ids,
        params=sequence.params,
        lease=message.lease,
        resumed_tokens=len(sequence.output) // ids.itemsize,
        timeout_s=message.timeout_s,
        cache_salt=message.cache_salt,
        suspicion=message.suspicion,
        constraint=message.constraint,
        scored_tokens=sequence.scored,
        pin=message.pin,
    )


def _token_ids(data: bytes) -> TokenIds:
    return np.frombuffer(data, dtype="<i4").astype(np.int32, copy=False)
