"""The sequences of a request on one engine, under one lease."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from kvmesh.cluster.errors import EngineLostError, RequestFaultError
from kvmesh.cluster.ingress.choice import RunningChoice
from kvmesh.cluster.ingress.engine_links import EngineLink
from kvmesh.cluster.ingress.failovers import LOSSES, Loss
from kvmesh.cluster.ingress.output import RequestOutput
from kvmesh.cluster.ingress.router_link import HeldPlace
from kvmesh.cluster.ingress.usage import RequestUsage
from kvmesh.cluster.messages import Submit
from kvmesh.cluster.telemetry.traces import RequestTrace
from kvmesh.workers.request import EndReason, SequenceDelta

UNREAD_PERIOD_S = 5.0


class Attempt:
    """Over when every sequence has ended; a `Receiver` of their deltas until then.

    choices: to compute; each is a sequence
    output, usage, trace: of the request
    loss: how the engine was lost, if it was
    """

    def __init__(
        self,
        held: HeldPlace,
        choices: Sequence[RunningChoice],
        output: RequestOutput,
        usage: RequestUsage,
        trace: RequestTrace,
    ) -> None:
        self.placed = held.placed
        self.loss = Loss.REFUSED
        lease_id = held.placed.lease.lease_id
        self.sequences = {f"{lease_id}.{i}": choice for i, choice in enumerate(choices)}
        self._held = held
        self._output = output
        self._usage = usage
        self._trace = trace
        self._prefilling = True
        self._live = set(self.sequences)
        self._end: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._failure: Exception | None = None

    async def run(self, link: EngineLink, message: Submit, timeout_s: float | None) -> None:
        """Submit the sequences, and wait for their ends.

        Raises EngineLostError, RequestFaultError, TimeoutError, and the engine's reason if it
        rejects them. What still runs is ended.
        """
        self._link: EngineLink = link
        link.submit(message, self)
        self._held.submitted = True
        try:
            async with asyncio.timeout(timeout_s):
                while not self._end.done():
                    await asyncio.wait((self._end,), timeout=UNREAD_PERIOD_S)
                    if self._output.unread:
                        # A stop string may be in it, which no reader finds.
                        self._output.absorb()
                        self.end(self._output.take_cut())
        finally:
            link.forget(message.lease.lease_id)
        if self._failure is not None:
            raise self._failure

    def end(self, choices: Sequence[RunningChoice]) -> None:
        """The texts of their output have ended these choices: end their sequences."""
        if not choices:
            return
        names = [name for name in self._live if self.sequences[name] in choices]
        if names:
            self._link.end(names, EndReason.STOP)

    # Receiver

    def deliver(self, delta: SequenceDelta) -> None:
        if delta.progress is not None:
            self._trace.event("prefilling", computed_tokens=delta.progress.computed_tokens)
            self._output.note_progress(delta.request_id, delta.progress)
            return
        if delta.scores is not None:
            self._output.put_scores(delta.scores)
            return
        if self._prefilling and delta.token_ids:
            self._prefilling = False
            self._trace.phase("decode")
            self._usage.note_first_token()
        if delta.finish_reason is not None:
            self._live.discard(delta.request_id)
            if delta.usage is not None:
                self._usage.add(delta.usage)
            if delta.finish_reason is EndReason.FAULT:
                self._fail(RequestFaultError(delta.error or "it failed"))
                return
            if (loss := LOSSES.get(delta.finish_reason)) is not None:
                self.lose(loss)
                return
            if not self._live and not self._end.done():
                self._end.set_result(None)
        self._output.put(self.sequences[delta.request_id], delta)

    def reject(self, error: Exception) -> None:
        self._held.submitted = False
        self._fail(error)

    def lose(self, loss: Loss = Loss.SUSPECT) -> None:
        """The engine is lost; without a message from it, the request may be the cause."""
        self.loss = max(self.loss, loss)
        self._fail(EngineLostError())

    def _fail(self, error: Exception) -> None:
        """The first error counts, unless another sequence turns out to be at fault."""
        if not self._end.done():
            self._end.set_result(None)
            self._failure = error
        elif self._failure is not None and isinstance(error, RequestFaultError):
            self._failure = error
