"""What a request has used, in OpenAI's words, and in kvmesh's."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from kvmesh.v1 import kvmesh_pb2 as pb


class PromptDetails(msgspec.Struct):
    cached_tokens: int


class CompletionDetails(msgspec.Struct):
    reasoning_tokens: int


class KVUsage(msgspec.Struct):
    """The contract's Usage, as far as OpenAI has no words for it."""

    group: str
    kv_format: str
    kv_reserved_bytes: int
    kv_used_bytes: int
    queue_s: float
    time_to_first_token_s: float | None
    total_s: float
    preemptions: int
    failovers: int
    pinned_tokens: int


class TokenUsage(msgspec.Struct):
    """kvmesh: not while the request is running"""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails | None = None
    completion_tokens_details: CompletionDetails | None = None
    kvmesh: KVUsage | msgspec.UnsetType = msgspec.UNSET


def token_usage(parts: Sequence[pb.Usage], reasoning_tokens: int) -> TokenUsage:
    """The usage of one or more generations together."""
    prompt_tokens = sum(part.prompt_tokens for part in parts)
    completion_tokens = sum(part.completion_tokens for part in parts)
    return TokenUsage(
        prompt_tokens,
        completion_tokens,
        prompt_tokens + completion_tokens,
        PromptDetails(sum(part.cached_tokens for part in parts)),
        CompletionDetails(reasoning_tokens),
        KVUsage(
            group=parts[-1].group,
            kv_format=parts[-1].kv_format,
            kv_reserved_bytes=kv_bytes(parts),
            kv_used_bytes=sum(part.kv_used_bytes for part in parts),
            queue_s=max(part.queue_s for part in parts),
            time_to_first_token_s=min(
                (x.time_to_first_token_s for x in parts if x.HasField("time_to_first_token_s")),
                default=None,
            ),
            total_s=max(part.total_s for part in parts),
            preemptions=sum(part.preemptions for part in parts),
            failovers=sum(part.failovers for part in parts),
            pinned_tokens=sum(part.pinned_tokens for part in parts),
        ),
    )


def kv_bytes(parts: Sequence[pb.Usage]) -> int:
    """Bytes of KV cache that were reserved."""
    return sum(part.kv_reserved_bytes for part in parts)


class ReasoningTokens:
    """Counts the tokens of a call's reasoning, with the markers around it, which show nothing.

    A token of which a part is reasoning is one of it.
    """

    def __init__(self) -> None:
        self.count = 0
        # By prompt and choice: those whose reasoning is open, and tokens that may open it.
        self._open: set[tuple[int, int]] = set()
        self._hidden: dict[tuple[int, int], int] = {}

    def note(self, index: int, delta: pb.Delta) -> None:
        choice = index, delta.index
        tokens = len(delta.token_ids)
        if delta.reasoning:
            self.count += tokens + self._hidden.pop(choice, 0)
            self._open.add(choice)
        elif delta.text or delta.tool_calls:
            self._hidden.pop(choice, None)
            self._open.discard(choice)
        elif choice in self._open:
            self.count += tokens
        else:
            self._hidden[choice] = self._hidden.get(choice, 0) + tokens


class RunningUsage:
    """The usage of a call: so far, while it runs, and at its end."""

    def __init__(self) -> None:
        self._prompts: dict[int, int] = {}
        self._completion_tokens = 0
        self._reasoning = ReasoningTokens()
        self._final: list[pb.Usage] = []

    def note(self, index: int, event: pb.GenerateStreamResponse) -> None:
        match event.WhichOneof("event"):
            case "started":
                self._prompts[index] = event.started.prompt_tokens
            case "delta":
                self._completion_tokens += len(event.delta.token_ids)
                self._reasoning.note(index, event.delta)
            case "usage":
                self._final.append(event.usage)

    @property
    def so_far(self) -> TokenUsage:
        prompt_tokens = sum(self._prompts.values())
        return TokenUsage(
            prompt_tokens,
            self._completion_tokens,
            prompt_tokens + self._completion_tokens,
            completion_tokens_details=CompletionDetails(self._reasoning.count),
        )

    @property
    def final(self) -> TokenUsage:
        return token_usage(self._final, self._reasoning.count)

    @property
    def kv_bytes(self) -> int:
        """Bytes of KV cache that were reserved."""
        return kv_bytes(self._final)
