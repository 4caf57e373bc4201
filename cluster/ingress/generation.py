"""One request from placement to usage, whatever happens on the way.

place ──► submit ──► deltas ──► usage          the lease is released once, at the end
  ▲                    │
  └── engine lost ◄────┘   with the tokens so far as a prefix
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from kvmesh.cluster.ingress import wire
from kvmesh.cluster.ingress.attempt import Asked, Attempt, sequence_id
from kvmesh.cluster.ingress.choice import Choice, Output
from kvmesh.cluster.ingress.errors import (
    EngineLostError,
    IngressError,
    NotReadyError,
    RequestAbortedError,
    RequestDeadlineError,
)
from kvmesh.cluster.ingress.links import EngineLink, spawn
from kvmesh.cluster.ingress.validate import GenerationSpec, ResumedChoice, cache_salt, choice_seed
from kvmesh.cluster.peers import RouterClient, TextCodec
from kvmesh.cluster.routing.errors import DeadlineUnreachableError, OverCapacityError
from kvmesh.cluster.routing.request import PlaceRequest
from kvmesh.protos.kvmesh.v1 import kvmesh_pb2 as pb
from kvmesh.workers.errors import CapacityError
from kvmesh.workers.request import (
    EngineInfo,
    EngineRequest,
    FinishReason,
    SequenceDelta,
    SequenceUsage,
    TokenIds,
)
from kvmesh.workers.sampling_params import SamplingParams

logger = logging.getLogger(__name__)

MAX_FAILOVERS = 3
MAX_REFUSALS = 8
REFUSAL_PAUSE_S = 0.02  # doubled each time; the group's engine is freeing what it refused for
DEADLINE_GRACE_S = 0.5  # the engine ends an overdue sequence itself, with what it has
NATURAL = frozenset({FinishReason.STOP, FinishReason.LENGTH})


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What every request of an ingress shares.

    link: the output stream of a group's engine
    info: what is known of a group
    keep: holds on to a task that outlives its request
    """

    router: RouterClient
    link: Callable[[str], EngineLink]
    info: Callable[[str], Awaitable[EngineInfo]]
    codec: TextCodec
    queue_timeout_s: float
    keep: Callable[[asyncio.Task[None]], None]
    clock: Callable[[], float] = time.monotonic


class Generation:
    """Runs one request; `events` are its replies, in the order the contract gives.

    params: the request's, with a max_tokens that the context holds
    tenant: as authentication found it
    page_hashes: of the prompt's full pages, as the engines' prefix caches know them
    excluded: groups whose KV format is below what the request asks for
    """

    def __init__(
        self,
        spec: GenerationSpec,
        prompt_ids: TokenIds,
        params: SamplingParams,
        tenant: str,
        around: Surroundings,
        page_hashes: tuple[bytes, ...] = (),
        excluded: frozenset[str] = frozenset(),
    ) -> None:
        self.key = f"{tenant}/{spec.request_id}"
        self._spec = spec
        self._prompt_ids = prompt_ids
        self._tenant = tenant
        self._around = around
        self._page_hashes = page_hashes
        self._excluded = excluded
        self._arrived_s = around.clock()
        self._deadline_s = None if spec.timeout_s is None else self._arrived_s + spec.timeout_s
        resumed = spec.resume.choices if spec.resume else (ResumedChoice(),) * spec.n
        self.choices = [
            Choice(
                index,
                replace(params, seed=choice_seed(params.seed, index)),
                spec.stop,
                around.codec,
                resumed[index],
            )
            for index in range(spec.n)
        ]
        self._attempt: Attempt | None = None
        self._placed: Asked | None = None
        self._usages: list[SequenceUsage] = []
        self._reserved_bytes = 0
        self._first_token_s: float | None = None
        self._queue_s = 0.0
        self._failovers = 0
        self._ticket = ""  # of the placement under way

    async def events(self) -> AsyncGenerator[pb.GenerateStreamResponse, None]:
        """Raises the errors of the table in errors.py; closing it ends the request."""
        try:
            async for event in self._events():
                yield event
        finally:
            # Also when the client is gone, and then in a task that outlives this call.
            self._begin_giving_back()
            if self._ticket:
                self._around.keep(spawn(self._withdraw(self._ticket), "withdraw"))

    async def _events(self) -> AsyncGenerator[pb.GenerateStreamResponse, None]:
        try:
            placed = await self._place()
        except RequestAbortedError:
            for event in self._end_all(FinishReason.ABORT):
                yield event
        else:
            yield pb.GenerateStreamResponse(started=self._started(placed))
            for event in self._catch_up():
                yield event
            async for event in self._run():
                yield event
        await self._give_back(self._natural_output_tokens())
        yield pb.GenerateStreamResponse(usage=self._usage())

    async def _run(self) -> AsyncGenerator[pb.GenerateStreamResponse, None]:
        """Deltas of all choices until each has finished, over as many engines as it takes."""
        try:
            while True:
                try:
                    await self._submit()
                    while self._unfinished():
                        for event in self._accept(await self._take()):
                            yield event
                        await self._end_finished()
                    return
                except EngineLostError:
                    await self._place_again()
        except (RequestAbortedError, TimeoutError, DeadlineUnreachableError) as error:
            aborted = isinstance(error, RequestAbortedError)
            if not aborted and not self._has_output():
                raise RequestDeadlineError() from None
            reason = FinishReason.ABORT if aborted else FinishReason.DEADLINE
            for event in self._end_all(reason):
                yield event

    # Placing

    async def _place(self, *, again: bool = False) -> Asked:
        remaining_s = self._remaining_s()
        timeout_s = self._around.queue_timeout_s
        mine = remaining_s is not None and remaining_s <= timeout_s
        if mine:
            assert remaining_s is not None
            timeout_s = max(remaining_s, 1e-3)
        longest = max(len(choice.token_ids) for choice in self.choices)
        request = PlaceRequest(
            request_id=self.key,
            prompt_tokens=len(self._prompt_ids) + longest,
            max_tokens=max(self.choices[0].params.max_tokens - longest, 1),
            tenant=self._tenant,
            priority=self._spec.priority,
            timeout_s=timeout_s,
            page_hashes=self._page_hashes,
            excluded_groups=self._excluded,
            resumed=again,
            sequences=max(len(self._unfinished()), 1),
        )
        supersede = self._spec.resume is not None and not again
        self._ticket = uuid.uuid4().hex
        try:
            placement = await self._around.router.place(
                request, ticket=self._ticket, supersede=supersede
            )
        except DeadlineUnreachableError:
            self._ticket = ""
            if mine:
                raise
            raise OverCapacityError(
                f"no room within {timeout_s:g} s", self._around.queue_timeout_s / 4, 0, 0
            ) from None
        except Exception:
            # Refused. Not so a cancellation: the router may have granted meanwhile.
            self._ticket = ""
            raise
        self._queue_s += placement.queue_s
        try:
            info = await self._around.info(placement.group)
        except NotReadyError:
            # Before the client hears of it, or its next attempt would meet this one.
            ticket, self._ticket = self._ticket, ""
            await self._withdraw(ticket)
            raise
        asked = Asked(request, placement, info)
        link = self._around.link(placement.group)
        self._attempt = Attempt(asked, self._around.router, link, self._around.keep)
        self._ticket = ""  # from here on the attempt owns the lease
        self._placed = asked
        return asked

    async def _place_again(self) -> None:
        """Another lease after the engine was lost, up to a limit; the router is told."""
        lost = self._attempt
        assert lost is not None
        self._failovers += 1
        logger.warning("request %s lost group %s", self.key, lost.placement.group)
        if self._failovers > MAX_FAILOVERS:
            raise EngineLostError()
        await self._around.router.suspect(lost.placement.group, lost.epoch)
        await self._give_back()
        await self._place(again=True)

    async def _submit(self) -> None:
        """Send every unfinished choice to the placement's engine.

        A group that refuses is asked again, with a new lease, after a pause: the ledger
        was ahead of its allocator. Raises its CapacityError once that has happened too often.
        """
        refusals = 0
        while True:
            try:
                for position, choice in enumerate(self._unfinished()):
                    await self._submit_choice(position, choice)
                return
            except CapacityError as error:
                logger.warning("%s was refused by its group: %s", self.key, error)
                refusals += 1
                if not error.ever or refusals == MAX_REFUSALS:
                    raise
            await self._give_back()
            await asyncio.sleep(REFUSAL_PAUSE_S * 2**refusals)
            await self._place(again=True)

    async def _submit_choice(self, position: int, choice: Choice) -> None:
        """position: among the sequences of the placement"""
        attempt = self._attempt
        assert attempt is not None
        ids = self._prompt_ids
        if choice.token_ids:
            ids = np.concatenate([ids, np.array(choice.token_ids, dtype=np.int32)])
        request = EngineRequest(
            request_id=sequence_id(attempt.placement.lease.lease_id, position),
            client_id="",
            prompt_token_ids=ids,
            params=choice.params,
            lease=attempt.share,
            resumed_tokens=len(choice.token_ids),
            timeout_s=self._remaining_s(),
            cache_salt=cache_salt(self._tenant, self._spec.cache_salt),
        )
        await attempt.submit(request, choice.index)

    # Receiving

    async def _take(self) -> list[SequenceDelta]:
        """What has come; TimeoutError once the deadline and a grace are over."""
        assert self._attempt is not None
        remaining_s = self._remaining_s()
        if remaining_s is None:
            return await self._attempt.take()
        async with asyncio.timeout(remaining_s + DEADLINE_GRACE_S):
            return await self._attempt.take()

    def _accept(self, deltas: list[SequenceDelta]) -> Iterator[pb.GenerateStreamResponse]:
        """One delta a choice, however many came together."""
        assert self._attempt is not None
        by_choice: dict[int, list[SequenceDelta]] = {}
        for delta in deltas:
            index = self._attempt.live.get(delta.request_id)
            if index is None:
                continue
            if delta.finish_reason is not None:
                self._attempt.note_end(delta)
            by_choice.setdefault(index, []).append(delta)
        failed = False
        for index, found in by_choice.items():
            choice = self.choices[index]
            if choice.finish is not None:
                continue
            failed = failed or any(d.finish_reason is FinishReason.ERROR for d in found)
            found = [d for d in found if d.finish_reason is not FinishReason.ERROR]
            output = choice.accept(found)
            if output.token_ids and self._first_token_s is None:
                self._first_token_s = self._around.clock() - self._arrived_s
            if self._overdue(choice) and not self._has_output():
                raise RequestDeadlineError()
            yield from self._to_wire(choice, output)
        if failed:
            raise EngineLostError()

    def _to_wire(self, choice: Choice, output: Output) -> Iterator[pb.GenerateStreamResponse]:
        if output:
            delta = wire.delta(choice.index, output, self._around.codec)
            yield pb.GenerateStreamResponse(delta=delta)
        if choice.finish is not None:
            finished = wire.choice_finished(choice.index, choice.finish)
            yield pb.GenerateStreamResponse(choice_finished=finished)

    def _catch_up(self) -> Iterator[pb.GenerateStreamResponse]:
        """What a resuming client lacks of the tokens that it has."""
        for choice in self.choices:
            if not choice.already_finished:
                yield from self._to_wire(choice, choice.owed())

    def _end_all(self, reason: FinishReason) -> Iterator[pb.GenerateStreamResponse]:
        for choice in self._unfinished():
            yield from self._to_wire(choice, choice.end(reason))

    # Ending

    async def _end_finished(self) -> None:
        """End sequences of choices that a stop string has ended, while others go on."""
        if self._attempt is not None and self._unfinished():
            await self._attempt.stop([x.index for x in self.choices if x.finish is not None])

    async def _give_back(self, output_tokens: int | None = None) -> None:
        """End what still runs, see its pages freed, and release the lease; once.

        Goes on if this call is cancelled. output_tokens: see Attempt.end
        """
        task = self._begin_giving_back(output_tokens)
        if task is not None:
            await asyncio.shield(task)

    def _begin_giving_back(self, output_tokens: int | None = None) -> asyncio.Task[None] | None:
        attempt, self._attempt = self._attempt, None
        if attempt is None:
            return None
        task = spawn(self._end_attempt(attempt, output_tokens), "give-back")
        self._around.keep(task)
        return task

    async def _end_attempt(self, attempt: Attempt, output_tokens: int | None) -> None:
        await attempt.end(output_tokens)
        self._usages += attempt.usages
        self._reserved_bytes = attempt.reserved_bytes

    async def _withdraw(self, ticket: str) -> None:
        """The client left while the request was being placed."""
        try:
            await self._around.router.withdraw(self.key, ticket)
        except IngressError as error:
            logger.warning("%s could not be withdrawn: %s", self.key, error)

    # Reading

    def _natural_output_tokens(self) -> int | None:
        """How long the longest choice became, if all ended by themselves and in one go."""
        natural = all(x.finish is not None and x.finish.reason in NATURAL for x in self.choices)
        if not natural or self._failovers or self._spec.resume is not None:
            return None
        return max(len(choice.token_ids) for choice in self.choices)

    def _unfinished(self) -> list[Choice]:
        return [choice for choice in self.choices if choice.finish is None]

    def _overdue(self, choice: Choice) -> bool:
        return choice.finish is not None and choice.finish.reason is FinishReason.DEADLINE

    def _has_output(self) -> bool:
        return any(choice.token_ids for choice in self.choices)

    def _remaining_s(self) -> float | None:
        if self._deadline_s is None:
            return None
        return max(self._deadline_s - self._around.clock(), 1e-3)

    def _started(self, placed: Asked) -> pb.Started:
        info, placement = placed.info, placed.placement
        return pb.Started(
            request_id=self._spec.request_id,
            model=info.model,
            model_revision=info.model_revision,
            group=placement.group,
            kv_format=info.kv_format,
            seed=self.choices[0].params.seed,
            prompt_tokens=len(self._prompt_ids),
            kv_hot_pages=placement.lease.hot_pages,
            kv_sealed_pages=placement.lease.sealed_pages,
            kv_reserved_bytes=placement.lease_bytes,
        )

    def _usage(self) -> pb.Usage:
        usages, placed = self._usages, self._placed
        used_bytes = sum(usage.kv_bytes for usage in usages)
        reply = pb.Usage(
            prompt_tokens=len(self._prompt_ids),
            completion_tokens=sum(len(choice.token_ids) for choice in self.choices),
            cached_tokens=min(
                max((usage.cached_tokens for usage in usages), default=0), len(self._prompt_ids)
            ),
            queue_s=self._queue_s + max((usage.queue_s for usage in usages), default=0.0),
            total_s=self._around.clock() - self._arrived_s,
            kv_hot_pages=sum(usage.hot_pages for usage in usages),
            kv_sealed_pages=sum(usage.sealed_pages for usage in usages),
            # A sequence's usage comes with its end, when its pages have been freed.
            kv_used_bytes=used_bytes,
            kv_freed_bytes=used_bytes,
            preemptions=sum(usage.preemptions for usage in usages),
            failovers=self._failovers,
        )
        if placed is not None:
            reply.kv_reserved_bytes = self._reserved_bytes
            reply.group = placed.placement.group
            reply.kv_format = placed.info.kv_format
        if self._first_token_s is not None:
            reply.time_to_first_token_s = self._first_token_s
        return reply
