"""One request, from placement to usage.

    place ──► submit ──► deltas ──► all ended ──► usage
      ▲                    │
      └── engine lost ◄────┘   with the tokens so far as a prefix, unless it is to blame

One task (`_run`) owns the request: it holds the lease and waits for the end of the sequences,
and its `finally` blocks clean up, whether it ends or is cancelled. Tokens do not wake this task:
they collect in its `RequestOutput` until the reader of the stream takes them.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from kvmesh.cluster.errors import EngineLostError, RequestDeadlineError, RequestFaultError
from kvmesh.cluster.ingress import wire
from kvmesh.cluster.ingress.answers.call_ids import call_id
from kvmesh.cluster.ingress.answers.plan import NO_PLAN, AnswerPlan
from kvmesh.cluster.ingress.choice import RunningChoice
from kvmesh.cluster.ingress.codec import TextCodec
from kvmesh.cluster.ingress.engine_links import EngineLink, EngineLinks
from kvmesh.cluster.ingress.failovers import LOSSES, Failovers, Loss
from kvmesh.cluster.ingress.output import SILENCE_S, RequestOutput
from kvmesh.cluster.ingress.prompt_scores import PromptScores
from kvmesh.cluster.ingress.router_link import HeldPlace, RouterLink
from kvmesh.cluster.ingress.stream_status import StreamStatus
from kvmesh.cluster.ingress.validate import GenerationSpec, ResumedChoice, cache_salt, choice_seed
from kvmesh.cluster.ingress.waker import Waker
from kvmesh.cluster.messages import NewSequence, Placed, Submit, Waiting
from kvmesh.cluster.routing.errors import (
    DeadlineUnreachableError,
    NoRoomError,
    RequestAbortedError,
    RequestIdInUseError,
)
from kvmesh.cluster.routing.request import PlaceRequest
from kvmesh.cluster.telemetry.logs import about
from kvmesh.cluster.telemetry.meters import IngressMeters
from kvmesh.cluster.telemetry.traces import NO_TRACE, RequestTrace
from kvmesh.v1 import kvmesh_pb2 as pb
from kvmesh.workers.errors import PoolCapacityError
from kvmesh.workers.request import EndReason, SequenceDelta, SequenceUsage, TokenIds
from kvmesh.workers.sampling_params import SamplingParams

logger = logging.getLogger(__name__)

MAX_REFUSALS = 8
REFUSAL_PAUSE_S = 0.02  # doubled each time; the group's engine is freeing what it refused for
DEADLINE_GRACE_S = 0.5  # the engine ends an overdue sequence itself, with what it has


@dataclass(frozen=True, slots=True)
class IngressContext:
    """What every request of an ingress shares.

    clock: seconds, monotonic
    silence_s: a stream that has sent nothing for this long sends its status
    """

    router: RouterLink
    engines: EngineLinks
    codec: TextCodec
    queue_timeout_s: float
    meters: IngressMeters
    waker: Waker = field(default_factory=Waker)
    clock: Callable[[], float] = time.monotonic
    silence_s: float = SILENCE_S


class Generation:
    """Runs one request; a `Receiver` of its sequences' deltas.

    params: the request's, with a max_tokens that the context holds
    tenant: as authentication found it
    page_hashes: of the prompt's full pages, as the engines' prefix caches know them
    excluded: groups whose KV format the request does not accept
    trace: of the generation
    plan: of the answer
    """

    def __init__(
        self,
        spec: GenerationSpec,
        prompt_ids: TokenIds,
        params: SamplingParams,
        tenant: str,
        context: IngressContext,
        page_hashes: tuple[bytes, ...] = (),
        excluded: frozenset[str] = frozenset(),
        trace: RequestTrace = NO_TRACE,
        plan: AnswerPlan = NO_PLAN,
    ) -> None:
        self._trace = trace
        self.key = f"{tenant}/{spec.request_id}"
        self._spec = spec
        self._prompt_ids = prompt_ids
        self._tenant = tenant
        self._context = context
        self._page_hashes = page_hashes
        self._excluded = excluded
        self._constraint = plan.constraint
        self._arrived_s = context.clock()
        self._deadline_s = None if spec.timeout_s is None else self._arrived_s + spec.timeout_s
        resumed = spec.resume.choices if spec.resume else (ResumedChoice(),) * spec.n
        choices = [
            RunningChoice(
                index,
                replace(
                    params,
                    seed=choice_seed(params.seed, index),
                    # The prompt is the same for all choices.
                    prompt_logprobs=None if index else params.prompt_logprobs,
                ),
                spec.rules,
                context.codec,
                resumed[index],
                prompt_ids,
                plan.form,
                plan.constraint is not None and bool(plan.constraint.grammar),
            )
            for index in range(spec.n)
        ]
        self._status = StreamStatus(spec.request_id, context.clock)
        self._output = RequestOutput(
            choices,
            context.codec,
            context.waker,
            self._end_cut,
            partial(call_id, self.key, plan.form.syntax),
            self._status,
            PromptScores(
                prompt_ids,
                context.codec,
                spec.rules.skip_special_tokens,
                spec.resume.scores if spec.resume else 0,
            ),
            context.silence_s,
        )
        # The current placement: its sequences, those still running, and how it ends.
        self._placed: Placed | None = None
        self._held: HeldPlace | None = None
        self._link: EngineLink | None = None
        self._sequences: dict[str, RunningChoice] = {}
        self._live: set[str] = set()
        self._end: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._failure: Exception | None = None
        self._loss = Loss.REFUSED
        self._failovers = Failovers()
        # For the usage.
        self._usages: list[SequenceUsage] = []
        self._first_token_s: float | None = None
        self._queue_s = 0.0
        self._queued = False  # since it asked for a place
        self._prefilling = True  # on this engine

    async def events(self) -> AsyncGenerator[pb.GenerateStreamResponse, None]:
        """The replies, in the contract's order; closing the generator ends the request.

        Raises the errors of the table in error_table.py.
        """

        def note_over(task: asyncio.Task[None]) -> None:
            if not task.cancelled():
                task.exception()  # retrieved, even if the reader has left meanwhile
            self._output.wake()

        task = asyncio.create_task(self._run(), name=f"generate {self.key}")
        task.add_done_callback(note_over)
        self._output.open()
        try:
            over = False
            while not over:
                await self._output.wait()
                over = task.done()
                for event in self._output.take():
                    yield event
            task.result()
        finally:
            task.cancel()
            self._output.close()

    # The request's task

    async def _run(self) -> None:
        try:
            await self._serve()
        except RequestAbortedError:
            if self._placed is None:  # it waited; the contract wants `started` before its end
                self._output.add(pb.GenerateStreamResponse(started=self._started()))
            self._output.end_all(EndReason.ABORT)
        except RequestFaultError as error:
            logger.error(
                "request %s is not tried again: %s", self.key, error.cause, extra=self._log()
            )
            raise
        except RequestIdInUseError:
            # With the id that the client gave, without the tenant.
            raise RequestIdInUseError(self._spec.request_id) from None
        except TimeoutError:
            self._end_overdue()
        except DeadlineUnreachableError as error:
            if error.timeout_s >= self._context.queue_timeout_s:
                # The limit was the server's longest wait, not the request's own deadline.
                limit_s = self._context.queue_timeout_s
                raise NoRoomError(f"no room within {limit_s:g} s", limit_s / 4, 0, 0) from None
            if self._placed is None:
                raise
            self._end_overdue()
        self._output.absorb()
        usage = wire.usage(self._usages, self._placed)
        usage.prompt_tokens = len(self._prompt_ids)
        usage.completion_tokens = sum(len(choice.token_ids) for choice in self._output.choices)
        usage.queue_s += self._queue_s
        usage.total_s = self._context.clock() - self._arrived_s
        usage.failovers = self._failovers.total
        if self._first_token_s is not None:
            usage.time_to_first_token_s = self._first_token_s
        ends = [choice.finish for choice in self._output.choices]
        self._trace.finish(usage, [end.reason.value for end in ends if end is not None])
        self._output.add(pb.GenerateStreamResponse(usage=usage))

    async def _serve(self) -> None:
        """Run every choice to its end, over as many placements as necessary."""
        refusals = 0
        while True:
            request = self._place_request()
            self._trace.phase("place", prompt_tokens=request.prompt_tokens)
            self._queued = False
            self._status.queued()
            try:
                async with self._context.router.place(request, self._note_waiting) as held:
                    self._status.placed(request.prompt_tokens)
                    self._note_placed(held.placed)
                    if self._output.unfinished:
                        await self._generate(held)
                    return
            except EngineLostError:
                assert self._placed is not None
                logger.warning(
                    "request %s lost group %s", self.key, self._placed.group, extra=self._log()
                )
                self._trace.event("engine lost", cause=self._loss.name.lower())
                self._context.meters.failover(self._placed.group, self._loss.name.lower())
                self._output.absorb()
                tokens = sum(len(choice.token_ids) for choice in self._output.choices)
                self._failovers.note(self._placed.engine.epoch, self._loss, tokens)
            except PoolCapacityError as error:
                # The ledger was ahead of the group's allocator: retry after a pause.
                logger.warning(
                    "%s was refused by its group: %s", self.key, error, extra=self._log()
                )
                refusals += 1
                if not error.retryable or refusals == MAX_REFUSALS:
                    raise
                await asyncio.sleep(REFUSAL_PAUSE_S * 2**refusals)

    async def _generate(self, held: HeldPlace) -> None:
        """Submit all unfinished choices under one lease, and wait until each has ended.

        Raises EngineLostError, RequestFaultError, TimeoutError after the deadline and a grace
        period, and the engine's reason if it rejects them.
        """
        placed, lease_id = held.placed, held.placed.lease.lease_id
        self._failure, self._loss = None, Loss.REFUSED
        await self._context.waker.turn()  # many may be placed at once
        self._link = await self._context.engines.get(placed.engine.epoch, placed.address)
        unfinished = self._output.unfinished
        self._sequences = {f"{lease_id}.{i}": choice for i, choice in enumerate(unfinished)}
        self._live = set(self._sequences)
        self._end = asyncio.get_running_loop().create_future()
        self._held = held
        message = Submit(
            placed.lease,
            _int32_bytes(self._prompt_ids),
            tuple(
                NewSequence(
                    name,
                    choice.params,
                    _int32_bytes(choice.token_ids),
                    0 if choice.index else self._output.scores.received,
                )
                for name, choice in self._sequences.items()
            ),
            self._remaining_s(),
            cache_salt(self._tenant, self._spec.cache_salt),
            self._failovers.suspicion,
            self._constraint,
        )
        self._link.submit(message, self)
        if message.suspicion:
            self._context.meters.quarantined(placed.group)
        held.submitted = True
        try:
            remaining_s = self._remaining_s()
            grace_s = None if remaining_s is None else remaining_s + DEADLINE_GRACE_S
            async with asyncio.timeout(grace_s):
                await self._end
        finally:
            self._link.forget(lease_id)
        if self._failure is not None:
            raise self._failure

    # Receiver

    def deliver(self, delta: SequenceDelta) -> None:
        choice = self._sequences.get(delta.request_id)
        if choice is None:
            return  # of a placement that was lost
        if delta.progress is not None:
            self._trace.event("prefilling", computed_tokens=delta.progress.computed_tokens)
            if self._status.computed(delta.request_id, delta.progress):
                self._output.send_status()
            return
        if delta.scores is not None:
            self._output.put_scores(delta.scores)
            return
        if self._prefilling and delta.token_ids:
            self._note_first_token()
        if delta.finish_reason is not None:
            self._live.discard(delta.request_id)
            if delta.usage is not None:
                self._usages.append(delta.usage)
            if delta.finish_reason is EndReason.FAULT:
                self._fail(RequestFaultError(delta.error or "it failed"))
                return
            if (loss := LOSSES.get(delta.finish_reason)) is not None:
                self.lose(loss)
                return
            if not self._live and not self._end.done():
                self._end.set_result(None)
        self._output.put(choice, delta)

    def reject(self, error: Exception) -> None:
        assert self._held is not None
        self._held.submitted = False
        self._fail(error)

    def lose(self, loss: Loss = Loss.SUSPECT) -> None:
        """The engine is lost; without a message from it, the request may be the cause."""
        self._loss = max(self._loss, loss)
        self._fail(EngineLostError())

    def _fail(self, error: Exception) -> None:
        """The first error counts, unless another sequence turns out to be at fault."""
        if not self._end.done():
            self._end.set_result(None)
            self._failure = error
        elif self._failure is not None and isinstance(error, RequestFaultError):
            self._failure = error

    # Placing

    def _place_request(self) -> PlaceRequest:
        self._output.absorb()
        choices = self._output.choices
        longest = max(len(choice.token_ids) for choice in choices)
        again = self._placed is not None
        remaining_s, limit_s = self._remaining_s(), self._context.queue_timeout_s
        return PlaceRequest(
            request_id=self.key,
            prompt_tokens=len(self._prompt_ids) + longest,
            max_tokens=max(choices[0].params.max_tokens - longest, 1),
            tenant=self._tenant,
            priority=self._spec.priority,
            timeout_s=limit_s if remaining_s is None else min(remaining_s, limit_s),
            page_hashes=self._page_hashes,
            excluded_groups=self._excluded,
            lost_engines=self._failovers.engines,
            resumed=again,
            supersedes=again or self._spec.resume is not None,
            sequences=max(len(self._output.unfinished), 1),
        )

    def _note_waiting(self, waiting: Waiting) -> None:
        self._status.queued(waiting.position, waiting.start_s)
        if not self._queued:
            self._trace.phase("queue")
            self._queued = True
        self._trace.event("waiting", position=waiting.position)
        self._output.send_status()

    def _note_placed(self, placed: Placed) -> None:
        first, self._placed = self._placed is None, placed
        self._prefilling = True
        self._trace.phase("prefill", group=placed.group, kv_format=placed.engine.kv_format)
        self._queue_s += placed.queue_s
        if first:
            self._output.add(pb.GenerateStreamResponse(started=self._started()))
            self._output.catch_up()

    def _log(self) -> dict[str, str]:
        return about(self.key, self._placed.group if self._placed else "")

    def _note_first_token(self) -> None:
        self._prefilling = False
        self._trace.phase("decode")
        if self._first_token_s is None:
            self._first_token_s = self._context.clock() - self._arrived_s

    def _started(self) -> pb.Started:
        seed = self._output.choices[0].params.seed
        return wire.started(self._placed, self._spec.request_id, len(self._prompt_ids), seed)

    # Ending

    def _end_cut(self, choice: RunningChoice) -> None:
        """Its text has ended the choice: end its sequence."""
        names = [name for name in self._live if self._sequences[name] is choice]
        if names and self._link is not None:
            self._link.end(names, EndReason.STOP)

    def _end_overdue(self) -> None:
        self._output.absorb()
        if not self._output.has_tokens:
            raise RequestDeadlineError()
        self._output.end_all(EndReason.DEADLINE)

    def _remaining_s(self) -> float | None:
        if self._deadline_s is None:
            return None
        return max(self._deadline_s - self._context.clock(), 1e-3)


def _int32_bytes(ids: TokenIds | list[int]) -> bytes:
    return np.asarray(ids, dtype="<i4").tobytes()
