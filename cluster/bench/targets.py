"""Servers that can be measured, and how they stream a reply."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Protocol

from kvmesh.client import AsyncClient, Delta, FinishReason, KVMeshError, Usage

Prompt = str | list[int]


@dataclass(frozen=True, slots=True)
class OutputChunk:
    """Output that has just arrived. tokens: in it; 1 where the server does not say"""

    tokens: int = 1


@dataclass(frozen=True, slots=True)
class TokenCounts:
    """What the server counted; the last event of a reply, if it comes."""

    prompt: int
    output: int
    cached: int = 0


class ReplyFailed(Exception):
    """A request without a complete reply.

    kind: by which failures are counted; the message is of this one
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class BenchTarget(Protocol):
    """A server. name: for the report"""

    @property
    def name(self) -> str: ...

    def reply(
        self, prompt: Prompt, output_tokens: int
    ) -> AsyncGenerator[OutputChunk | TokenCounts, None]:
        """Send a request, and yield what arrives as it arrives. Raises ReplyFailed."""


class GrpcTarget:
    """A kvmesh cluster over gRPC, through its SDK.

    client: without retries: a refusal is a result
    """

    def __init__(
        self, client: AsyncClient, name: str, *, temperature: float, ignore_eos: bool
    ) -> None:
        self.name = name
        self._client = client
        self._temperature = temperature
        self._ignore_eos = ignore_eos

    async def reply(
        self, prompt: Prompt, output_tokens: int
    ) -> AsyncGenerator[OutputChunk | TokenCounts, None]:
        stream = self._client.generate_stream(
            prompt,
            max_tokens=output_tokens,
            temperature=self._temperature,
            ignore_eos=self._ignore_eos,
        )
        try:
            async with aclosing(stream.events()) as events:
                async for event in events:
                    match event:
                        case Delta():
                            if event.token_ids:
                                yield OutputChunk(len(event.token_ids))
                            if event.finish_reason in (FinishReason.ABORT, FinishReason.DEADLINE):
                                reason = event.finish_reason.value
                                raise ReplyFailed(reason, f"the server ended it: {reason}")
                        case Usage():
                            yield TokenCounts(
                                event.prompt_tokens, event.completion_tokens, event.cached_tokens
                            )
        except KVMeshError as error:
            reason = f" {error.reason}" if error.reason else ""
            raise ReplyFailed(f"{type(error).__name__}{reason}", str(error)) from error
