"""Log-probabilities of a prompt's tokens, on their way to the client."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from kvmesh.cluster.ingress.codec import TextCodec
from kvmesh.cluster.ingress.wire import shown_bytes
from kvmesh.v1 import kvmesh_pb2 as pb
from kvmesh.workers.plan import TokenScores
from kvmesh.workers.request import TokenIds

# Entries of an event: about a quarter of a megabyte, where a client accepts 4 MB by default.
EVENT_ENTRIES = 1 << 14


class PromptScores:
    """Makes events of what engines have computed, in order and each token once.

    received: of the prompt's tokens, from its second on, those that the client has or will get
    """

    def __init__(
        self, prompt_ids: TokenIds, codec: TextCodec, skip_special_tokens: bool, received: int = 0
    ) -> None:
        self._prompt_ids = prompt_ids
        self._codec = codec
        self._skip = skip_special_tokens
        self.received = self._sent = received
        self._waiting: list[TokenScores] = []

    def put(self, scores: TokenScores) -> None:
        """Those of the next tokens."""
        self.received += scores.num_tokens
        self._waiting.append(scores)

    def take(self) -> list[pb.GenerateStreamResponse]:
        """The events that have not been taken yet."""
        waiting, self._waiting = self._waiting, []
        return [event for scores in waiting for event in self._events(scores)]

    def _events(self, scores: TokenScores) -> Iterator[pb.GenerateStreamResponse]:
        count = scores.num_tokens
        ids = self._prompt_ids[self._sent + 1 : self._sent + 1 + count].tolist()
        self._sent += count
        chosen = np.frombuffer(scores.logprobs, np.float32)
        top_ids = np.frombuffer(scores.top_ids, np.int32)
        top = np.frombuffer(scores.top, np.float32)
        k = len(top) // count
        step = max(1, EVENT_ENTRIES // (1 + k))
        for start in range(0, count, step):
            some, best = slice(start, start + step), slice(k * start, k * (start + step))
            alternatives = top_ids[best].tolist()
            columns = pb.Logprobs(
                chosen=chosen[some].tolist(),
                chosen_bytes=map(self._bytes_of, ids[some]),
                chosen_token_ids=ids[some],
                top_token_ids=alternatives,
                top=top[best].tolist(),
                top_bytes=map(self._bytes_of, alternatives),
            )
            yield pb.GenerateStreamResponse(prompt_logprobs=columns)

    def _bytes_of(self, token_id: int) -> bytes:
        return shown_bytes(token_id, self._codec, self._skip)
