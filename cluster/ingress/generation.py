"""One request, from placement to usage.

    place ──► submit ──► deltas ──► all ended ──► usage
      ▲                    │
      └── engine lost ◄────┘   with the tokens so far as a prefix, unless it is to blame

One task (`_run`) owns the request: it holds the lease and waits for the end of the sequences
(attempt.py), and its `finally` blocks clean up, whether it ends or is cancelled. Tokens do not
wake this task: they collect in its `RequestOutput` until the reader of the stream takes them.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from kvmesh.cluster.errors import (
    EngineLostError,
    NotReadyError,
    RequestDeadlineError,
    RequestFaultError,
)
from kvmesh.cluster.ingress import wire
from kvmesh.cluster.ingress.answers.call_ids import call_id
from kvmesh.cluster.ingress.attempt import Attempt
from kvmesh.cluster.ingress.choice import RunningChoice, choice_seed
from kvmesh.cluster.ingress.codec import TextCodec
from kvmesh.cluster.ingress.engine_links import EngineLinks
from kvmesh.cluster.ingress.failovers import Failovers
from kvmesh.cluster.ingress.output import RequestOutput
from kvmesh.cluster.ingress.prepare import PreparedRequest
from kvmesh.cluster.ingress.prompt_scores import PromptScores
from kvmesh.cluster.ingress.prompts import cache_salt
from kvmesh.cluster.ingress.reply_queue import SILENCE_S, ReplyQueue
from kvmesh.cluster.ingress.resume import ResumedChoice
from kvmesh.cluster.ingress.router_link import HeldPlace, RouterLink
from kvmesh.cluster.ingress.stream_status import StreamStatus
from kvmesh.cluster.ingress.usage import RequestUsage
from kvmesh.cluster.ingress.waker import Waker
from kvmesh.cluster.messages import NewSequence, Submit, Waiting
from kvmesh.cluster.routing.errors import (
    DeadlineUnreachableError,
    RequestAbortedError,
    RequestIdInUseError,
)
from kvmesh.cluster.routing.request import Past, PlaceRequest
from kvmesh.cluster.telemetry.logs import about
from kvmesh.cluster.telemetry.meters import IngressMeters
from kvmesh.cluster.telemetry.traces import NO_TRACE, RequestTrace
from kvmesh.v1 import kvmesh_pb2 as pb
from kvmesh.workers.errors import PoolCapacityError
from kvmesh.workers.request import EndReason, PinTerms, TokenIds

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
    """Runs one request. trace: of the generation"""

    def __init__(
        self, request: PreparedRequest, context: IngressContext, trace: RequestTrace = NO_TRACE
    ) -> None:
        self._request = request
        self._spec = spec = request.spec
        self._context = context
        self._trace = trace
        self._usage = RequestUsage(context.clock)
        self._deadline_s = None
        if spec.timeout_s is not None:
            self._deadline_s = self._usage.arrived_s + spec.timeout_s
        self._status = StreamStatus(spec.request_id, context.clock)
        self._output = RequestOutput(
            _choices(request, context.codec),
            context.codec,
            ReplyQueue(context.waker, self._status, context.silence_s),
            partial(call_id, request.key, request.plan.form.syntax),
            PromptScores(
                request.prompt_ids,
                context.codec,
                spec.rules.skip_special_tokens,
                spec.resume.scores if spec.resume else 0,
            ),
        )
        self._incarnation = secrets.token_hex(8)
        self._attempt: Attempt | None = None  # the latest
        self._failovers = Failovers()
        # Whether its own deadline limits the wait for a place, and not the server's longest wait.
        self._deadline_is_first = False

    async def events(self) -> AsyncGenerator[pb.GenerateStreamResponse, None]:
        """The replies, in the contract's order; closing the generator ends the request.

        Raises the errors of the table in error_table.py.
        """
        queue = self._output.queue
        task = asyncio.create_task(self._run(), name=f"generate {self._request.key}")
        task.add_done_callback(lambda _: queue.wake())
        queue.open()
        try:
            over = False
            while not over:
                await queue.wait()
                over = task.done()
                events = self._output.take()
                if self._attempt is not None:
                    self._attempt.end(self._output.take_cut())
                for event in events:
                    yield event
            task.result()
        finally:
            task.cancel()
            queue.close()

    @property
    def longest_tokens(self) -> int:
        """New tokens of the longest choice so far."""
        return max(choice.num_new_tokens for choice in self._output.choices)

    # The request's task

    async def _run(self) -> None:
        try:
            await self._serve()
            await self._context.waker.turn()  # many may end at once, with much to decode
        except RequestAbortedError:
            if self._attempt is None:  # it waited; the contract wants `started` before its end
                self._output.add(pb.GenerateStreamResponse(started=self._started()))
            self._output.end_all(EndReason.ABORT)
        except RequestFaultError as error:
            logger.error(
                "request %s is not tried again: %s",
                self._request.key,
                error.cause,
                extra=self._log(),
            )
            raise
        except RequestIdInUseError:
            # With the id that the client gave, without the tenant.
            raise RequestIdInUseError(self._spec.request_id) from None
        except TimeoutError:
            self._end_overdue()
        except DeadlineUnreachableError:
            if self._attempt is None:
                raise
            self._end_overdue()
        except NotReadyError:  # no router answered in that time
            if not self._deadline_is_first:
                raise
            self._end_overdue()
        self._output.absorb()
        usage = self._usage.message(
            self._attempt.placed if self._attempt else None,
            prompt_tokens=len(self._request.prompt_ids),
            completion_tokens=self._output.num_tokens,
            failovers=self._failovers.total,
        )
        ends = [choice.finish for choice in self._output.choices]
        self._trace.finish(usage, [end.reason.value for end in ends if end is not None])
        self._output.add(pb.GenerateStreamResponse(usage=usage))

    async def _serve(self) -> None:
        """Run every choice to its end, over as many placements as necessary."""
        refusals = 0
        while True:
            request = self._place_request()
            self._trace.phase("place", prompt_tokens=request.prompt_tokens)
            self._queued = False  # since it asked for a place
            self._status.queued()
            try:
                async with self._context.router.place(request, self._note_waiting) as held:
                    attempt = self._begin(held)
                    self._status.placed(request.prompt_tokens)
                    if attempt.sequences:
                        await self._compute(attempt)
                    return
            except (EngineLostError, RequestFaultError) as error:
                self._output.absorb()
                if not self._output.unfinished:
                    return  # the client has all of it: stop strings have ended what still ran
                if isinstance(error, RequestFaultError):
                    raise
                self._note_loss()
            except PoolCapacityError as error:
                # The ledger was ahead of the group's allocator: retry after a pause.
                logger.warning(
                    "%s was refused by its group: %s", self._request.key, error, extra=self._log()
                )
                refusals += 1
                if not error.retryable or refusals == MAX_REFUSALS:
                    raise
                await asyncio.sleep(REFUSAL_PAUSE_S * 2**refusals)

    def _begin(self, held: HeldPlace) -> Attempt:
        """All unfinished choices have got a place, and will be computed under one lease."""
        placed, first = held.placed, self._attempt is None
        self._trace.phase("prefill", group=placed.group, kv_format=placed.engine.kv_format)
        self._usage.queue_s += placed.queue_s
        unfinished = self._output.unfinished
        self._attempt = Attempt(held, unfinished, self._output, self._usage, self._trace)
        if first:
            self._output.add(pb.GenerateStreamResponse(started=self._started()))
            self._output.catch_up()
        return self._attempt

    async def _compute(self, attempt: Attempt) -> None:
        """Raises what `Attempt.run` raises; TimeoutError after the deadline and a grace period."""
        await self._context.waker.turn()  # many may be placed at once
        placed = attempt.placed
        link = await self._context.engines.get(placed.engine.epoch, placed.address)
        message = self._submission(attempt)
        if message.suspicion:
            self._context.meters.quarantined(placed.group)
        timeout_s = self._remaining_s()
        await attempt.run(
            link, message, None if timeout_s is None else timeout_s + DEADLINE_GRACE_S
        )

    def _note_loss(self) -> None:
        """Raises RequestFaultError or EngineLostError if it was one too many."""
        assert self._attempt is not None
        placed, cause = self._attempt.placed, self._attempt.loss
        logger.warning(
            "request %s lost group %s", self._request.key, placed.group, extra=self._log()
        )
        self._trace.event("engine lost", cause=cause.name.lower())
        self._context.meters.failover(placed.group, cause.name.lower())
        self._failovers.note(placed.engine.epoch, cause, self._output.num_tokens)

    # What it sends to the router, engines and the client

    def _place_request(self) -> PlaceRequest:
        self._output.absorb()
        choices = self._output.choices
        longest = max(len(choice.token_ids) for choice in choices)
        remaining_s, limit_s = self._remaining_s(), self._context.queue_timeout_s
        self._deadline_is_first = remaining_s is not None and remaining_s < limit_s
        return PlaceRequest(
            request_id=self._request.key,
            prompt_tokens=len(self._request.prompt_ids) + longest,
            max_tokens=max(choices[0].params.max_tokens - longest, 1),
            tenant=self._request.tenant,
            priority=self._spec.priority,
            timeout_s=limit_s if remaining_s is None else min(remaining_s, limit_s),
            own_deadline=self._deadline_is_first,
            page_hashes=self._request.page_hashes,
            accepts=self._request.accepts,
            lost_engines=self._failovers.engines,
            past=self._past(),
            sequences=max(len(self._output.unfinished), 1),
            incarnation=self._incarnation,
        )

    def _past(self) -> Past:
        if self._failovers.ran:
            return Past.RAN
        if self._attempt is not None:
            return Past.ACCEPTED
        return Past.NEW if self._spec.resume is None else Past.AGAIN

    def _submission(self, attempt: Attempt) -> Submit:
        request = self._request
        sequences = tuple(
            NewSequence(
                name,
                choice.params,
                _int32_bytes(choice.token_ids),
                0 if choice.index else self._output.scores.received,
            )
            for name, choice in attempt.sequences.items()
        )
        return Submit(
            lease=attempt.placed.lease,
            prompt=_int32_bytes(request.prompt_ids),
            sequences=sequences,
            timeout_s=self._remaining_s(),
            cache_salt=cache_salt(request.tenant, self._spec.cache_salt),
            suspicion=self._failovers.suspicion,
            constraint=request.plan.constraint,
            pin=None if self._spec.pin_s is None else PinTerms(request.tenant, self._spec.pin_s),
        )

    def _started(self) -> pb.Started:
        placed = self._attempt.placed if self._attempt else None
        seed = self._output.choices[0].params.seed
        return wire.started(placed, self._spec.request_id, len(self._request.prompt_ids), seed)

    # What happens to it

    def _note_waiting(self, waiting: Waiting) -> None:
        self._status.queued(waiting.position, waiting.start_s)
        if not self._queued:
            self._trace.phase("queue")
            self._queued = True
        self._trace.event("waiting", position=waiting.position)
        self._output.queue.send_status()

    def _end_overdue(self) -> None:
        self._output.absorb()
        if not self._output.num_tokens:
            raise RequestDeadlineError()
        self._output.end_all(EndReason.DEADLINE)

    def _remaining_s(self) -> float | None:
        if self._deadline_s is None:
            return None
        return max(self._deadline_s - self._context.clock(), 1e-3)

    def _log(self) -> dict[str, str]:
        assert self._attempt is not None  # there is nothing to log before
        return about(self._request.key, self._attempt.placed.group)


def _choices(request: PreparedRequest, codec: TextCodec) -> list[RunningChoice]:
    """The choices of a request, with the output that its client already has."""
    spec, params, plan = request.spec, request.params, request.plan
    resumed = spec.resume.choices if spec.resume else (ResumedChoice(),) * spec.n
    return [
        RunningChoice(
            index,
            replace(
                params,
                seed=choice_seed(params.seed, index),
                # The prompt is the same for all choices.
                prompt_logprobs=None if index else params.prompt_logprobs,
            ),
            spec.rules,
            codec,
            resumed[index],
            request.prompt_ids,
            plan.form,
            plan.constraint is not None and bool(plan.constraint.grammar),
        )
        for index in range(spec.n)
    ]


def _int32_bytes(ids: TokenIds | list[int]) -> bytes:
    return np.asarray(ids, dtype="<i4").tobytes()
