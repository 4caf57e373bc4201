"""Plans answers; what takes long is computed outside the event loop, and kept."""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from kvmesh.cluster.errors import IngressBusyError
from kvmesh.cluster.ingress.answers.model_form import TAIL_TOKENS
from kvmesh.cluster.ingress.answers.plan import AnswerPlan, AnswerSpec, plan_answer
from kvmesh.cluster.ingress.codec import TextCodec
from kvmesh.cluster.ingress.interruptible import InterruptedWorkError, run_interruptible
from kvmesh.cluster.ingress.refuse import refuse
from kvmesh.workers.request import TokenIds

GRAMMAR_TIMEOUT_S = 10.0
_KEPT = 256
_THREADS = 2


class AnswerPlanner:
    """All methods belong to one event loop. New grammars of a tenant are tried one at a time, and
    each once, however many requests have it and whichever of them are still there.

    max_waiting: grammars of one tenant
    """

    def __init__(self, codec: TextCodec, max_waiting: int) -> None:
        self._codec = codec
        self._max_waiting = max_waiting
        self._threads = ThreadPoolExecutor(_THREADS, "kvmesh-grammars")
        self._turns: defaultdict[str, asyncio.Semaphore] = defaultdict(lambda: asyncio.Semaphore(1))
        self._waiting: Counter[str] = Counter()  # by tenant
        self._planning: dict[bytes, asyncio.Task[AnswerPlan]] = {}
        self._kept: OrderedDict[bytes, AnswerPlan] = OrderedDict()

    async def plan(self, spec: AnswerSpec, prompt: TokenIds, tenant: str) -> AnswerPlan:
        """Raises InvalidFieldError naming the field that cannot be enforced, and IngressBusyError
        if too many grammars of the tenant wait."""
        model, reasoning = self._codec.form, None
        if spec.is_chat and model.think is not None:
            tail = self._codec.raw_text(prompt[-TAIL_TOKENS:].tolist())
            reasoning = model.reasoning(tail, spec.continued)
        if not spec.needs_grammar:
            return plan_answer(spec, model, reasoning)
        key = hashlib.sha256(f"{spec.key()}{reasoning}".encode()).digest()
        if (found := self._kept.get(key)) is not None:
            self._kept.move_to_end(key)
            return found
        if (planning := self._planning.get(key)) is None:
            if self._waiting[tenant] >= self._max_waiting:
                raise IngressBusyError(f"{self._max_waiting} grammars wait to be compiled already")
            self._waiting[tenant] += 1
            work = partial(plan_answer, spec, model, reasoning)
            planning = asyncio.create_task(self._compile(key, spec, tenant, work))
            planning.add_done_callback(_retrieve)
            self._planning[key] = planning
        # A caller that leaves must not leave its thread to the tenant's next grammar.
        return await asyncio.shield(planning)

    async def _compile(
        self, key: bytes, spec: AnswerSpec, tenant: str, work: Callable[[], AnswerPlan]
    ) -> AnswerPlan:
        try:
            async with self._turns[tenant]:
                found = await run_interruptible(self._threads, work, GRAMMAR_TIMEOUT_S)
        except InterruptedWorkError:
            field = "prompt.chat.tools" if spec.structured is None else spec.structured.field
            refuse(field, f"takes more than {GRAMMAR_TIMEOUT_S:g} s to compile")
        finally:
            self._waiting[tenant] -= 1
            del self._planning[key]
        self._kept[key] = found
        while len(self._kept) > _KEPT:
            self._kept.popitem(last=False)
        return found

    def close(self) -> None:
        """Wait for nothing: what runs ends by itself."""
        self._threads.shutdown(wait=False, cancel_futures=True)


def _retrieve(planning: asyncio.Task[AnswerPlan]) -> None:
    """Everybody who wanted to know its error may have left."""
    if not planning.cancelled():
        planning.exception()
