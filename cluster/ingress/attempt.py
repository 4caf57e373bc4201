"""One placement of a request: its sequences on one engine, and the lease they run under.

submit ──► deltas ──► end        begun is told once, the lease grows ahead of the output,
   │                   ▲         and is released once, when the engine holds nothing more
   └── engine lost ────┘
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from kvmesh.cluster.ingress.errors import EngineLostError, IngressError
from kvmesh.cluster.ingress.estimate import geometry_of
from kvmesh.cluster.ingress.links import EngineLink, Mailbox, spawn
from kvmesh.cluster.peers import RouterClient
from kvmesh.cluster.routing.request import Placement, PlaceRequest
from kvmesh.workers.request import EngineInfo, EngineRequest, SequenceDelta, SequenceUsage
from kvmesh.workers.sizes import PageNeed

logger = logging.getLogger(__name__)

FREEING_TIMEOUT_S = 10.0
# A lease is grown so many tokens before it is used up; the engine pauses what gets there first.
AHEAD_TOKENS = 16
GROW_PAUSE_S = 0.05  # doubled each time that the pages are not free yet
GROW_PAUSE_MOST_S = 1.0

Keep = Callable[[asyncio.Task[None]], None]


@dataclass(frozen=True, slots=True)
class Asked:
    """What was placed, and where it went."""

    request: PlaceRequest
    placement: Placement
    info: EngineInfo


class Attempt:
    """The sequences of one placement.

    keep: holds on to a task that outlives its request
    share, reserved_bytes: one sequence's part of the lease, and all of it, as it has grown
    live: sequence id -> choice index
    usages: of the sequences that have ended
    epoch: the incarnation of the group's engine, as far as is known
    """

    def __init__(self, asked: Asked, router: RouterClient, link: EngineLink, keep: Keep) -> None:
        self.placement = asked.placement
        self.share = asked.placement.lease.share
        self.reserved_bytes = asked.placement.lease_bytes
        self.epoch = asked.info.epoch
        self.live: dict[str, int] = {}
        self.usages: list[SequenceUsage] = []
        self._request = asked.request
        self._geometry = geometry_of(asked.info)
        self._router = router
        self._link = link
        self._keep = keep
        # Not what the client has read: one that reads slowly must not hold up the lease.
        self._mailbox = Mailbox(self._note_progress)
        self._tokens: dict[str, int] = {}  # of each sequence that goes on, prompt included
        self._ending: set[str] = set()
        # The submission under way; its outcome decides what there is to end.
        self._sending: asyncio.Task[None] | None = None
        self._growing: asyncio.Task[None] | None = None
        self._submitted = 0
        self._begun = False

    async def submit(self, request: EngineRequest, choice: int) -> None:
        """Send one sequence. Raises CapacityError, InvalidRequestError, EngineLostError."""
        # Not cancelled with this call: whether the engine has the sequence must be known,
        # or nobody would end it.
        self._sending = spawn(self._send(request, choice), "submit")
        self._keep(self._sending)
        await asyncio.shield(self._sending)

    async def take(self) -> list[SequenceDelta]:
        """What has come, at least one delta; EngineLostError when nothing will."""
        return await self._mailbox.take()

    def note_end(self, delta: SequenceDelta) -> None:
        self.live.pop(delta.request_id, None)
        if delta.usage is not None:
            self.usages.append(delta.usage)

    async def stop(self, choices: Sequence[int]) -> None:
        """Ask the engine to end the sequences of these choices, while others go on."""
        over = [x for x, index in self.live.items() if index in choices and x not in self._ending]
        if over:
            self._ending.update(over)
            await self._link.abort(over)

    async def end(self, output_tokens: int | None) -> None:
        """End what still runs, see its pages freed, and release the lease.

        output_tokens: of one sequence, if all ended of their own accord
        """
        if self._growing is not None:
            self._growing.cancel()
        lease_id = self.placement.lease.lease_id
        if not await self._end_sequences():
            # The pages may still be held, and the lease stands for them. The router
            # takes it back when the engine's report no longer lists it.
            logger.error("sequences of lease %s did not end in time", lease_id)
            return
        try:
            await self._router.release(lease_id, output_tokens)
        except IngressError as error:
            # No fault of the request's: the engine's report will show that it has ended.
            logger.warning("lease %s could not be given back: %s", lease_id, error)

    def _note_progress(self, delta: SequenceDelta) -> None:
        """Tell the router of the first token, and let the lease grow ahead of the output."""
        if delta.finish_reason is not None or delta.request_id not in self._tokens:
            self._tokens.pop(delta.request_id, None)
            return
        self._tokens[delta.request_id] += len(delta.token_ids)
        if not self._begun:
            self._begun = True
            self._keep(spawn(self._tell_begun(), "begun"))
        self._grow_if_due()

    def _grow_if_due(self) -> None:
        if self._must_grow() and (self._growing is None or self._growing.done()):
            self._growing = spawn(self._grow(), "grow")
            self._keep(self._growing)

    async def _send(self, request: EngineRequest, choice: int) -> None:
        """Among the live ones while the engine may have it."""
        self.live[request.request_id] = choice
        self._tokens[request.request_id] = len(request.prompt_token_ids)
        try:
            self.epoch = await self._link.submit(request, self._mailbox)
        except BaseException:
            self.live.pop(request.request_id, None)
            self._tokens.pop(request.request_id, None)
            raise
        self._submitted += 1
        self._grow_if_due()

    async def _end_sequences(self) -> bool:
        """Whether the engine has confirmed every sequence's end, or is gone with all of them."""
        try:
            async with asyncio.timeout(FREEING_TIMEOUT_S):
                if self._sending is not None:
                    await asyncio.wait([self._sending])
                if self.live:
                    await self._link.abort(list(self.live))
                while self.live:
                    for delta in await self._mailbox.take():
                        if delta.finish_reason is not None:
                            self.note_end(delta)
        except EngineLostError:
            return True
        except TimeoutError:
            return False
        return True

    async def _tell_begun(self) -> None:
        try:
            await self._router.begun(self.placement.lease.lease_id)
        except IngressError as error:
            logger.warning("the router was not told of a first token: %s", error)

    def _must_grow(self) -> bool:
        # A sequence on its way to the engine carries the share of before: it would not be
        # among those extended, and pause for ever.
        if self._submitted < self._request.sequences:
            return False
        covered = self._geometry.tokens_within(self.share.sealed_pages)
        more = self.share.sealed_pages < self.share.most_sealed_pages
        return more and self._longest_tokens + AHEAD_TOKENS > covered

    @property
    def _longest_tokens(self) -> int:
        return max(self._tokens.values(), default=0)

    async def _grow(self) -> None:
        """Extend the lease, asking again as long as others hold the pages."""
        pause_s = GROW_PAUSE_S
        while self._must_grow():
            if await self._grow_once():
                pause_s = GROW_PAUSE_S
            else:
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, GROW_PAUSE_MOST_S)

    async def _grow_once(self) -> bool:
        lease_id = self.placement.lease.lease_id
        ids = list(self._tokens)
        request = replace(self._request, sequences=len(ids))
        output_tokens = self._longest_tokens + AHEAD_TOKENS - request.prompt_tokens
        try:
            growth = await self._router.grow(lease_id, request, output_tokens)
            if growth is None:
                return False
            share = replace(growth.lease, sequences=request.sequences).share
            await self._link.extend(ids, share)
        except IngressError as error:
            logger.warning("lease %s could not be extended: %s", lease_id, error)
            return False
        self.share = share
        need = PageNeed(growth.lease.hot_pages, growth.lease.sealed_pages)
        self.reserved_bytes = self._geometry.bytes_of(need)
        return True


def sequence_id(lease_id: str, position: int) -> str:
    """A sequence's id on its engine; the router derives the same to abort it.

    position: among the sequences of the lease
    """
    return f"{lease_id}.{position}"
