"""A server whose replies a test writes, and a clock that it moves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence

from kvmesh.cluster.bench.targets import OutputChunk, Prompt, ReplyFailed, TokenCounts

Step = OutputChunk | TokenCounts | ReplyFailed | float


class TestClock:
    """now: in seconds"""

    __test__ = False

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class ScriptedTarget:
    """Plays the steps of the n-th request; a number moves the clock.

    gate: every reply waits for it before its first step
    """

    name = "a script"

    def __init__(self, clock: TestClock, *scripts: Sequence[Step]) -> None:
        self.prompts: list[Prompt] = []
        self.running = 0
        self.max_running = 0
        self.gate = asyncio.Event()
        self.gate.set()
        self.called = asyncio.Event()
        self._clock = clock
        self._scripts = scripts

    async def reply(
        self, prompt: Prompt, output_tokens: int
    ) -> AsyncGenerator[OutputChunk | TokenCounts, None]:
        steps = self._scripts[min(len(self.prompts), len(self._scripts) - 1)]
        self.prompts.append(prompt)
        self.called.set()
        self.running += 1
        self.max_running = max(self.max_running, self.running)
        try:
            await self.gate.wait()
            for step in steps:
                if isinstance(step, ReplyFailed):
                    raise step
                if isinstance(step, float):
                    self._clock.now += step
                else:
                    yield step
                await asyncio.sleep(0)
        finally:
            self.running -= 1
