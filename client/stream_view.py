"""What both kinds of stream expose besides the deltas."""

from __future__ import annotations

from typing import NoReturn

from kvmesh.client.stream_state import StreamState
from kvmesh.client.types import Completion, Prefilling, Queued, Started, Usage


class StreamView:
    """The state of a stream, during and after it."""

    def __init__(self, state: StreamState) -> None:
        self._state = state

    @property
    def request_id(self) -> str:
        return self._state.request_id

    @property
    def cursor(self) -> str:
        """Where the stream is now: a text from which `resume` of any client continues it.

        It holds the request and the output so far, but no API key. Compute it when it is to be
        saved, not with every delta: its size is that of the prompt and the output.
        """
        return self._state.cursor

    @property
    def queued(self) -> Queued | None:
        """The latest queue position, if the request had to wait."""
        return self._state.queued

    @property
    def started(self) -> Started | None:
        """The group that runs it and what is reserved for it, once known."""
        return self._state.started

    @property
    def prefilling(self) -> Prefilling | None:
        """The latest progress of the prompt, if it takes longer than a moment."""
        return self._state.prefilling

    @property
    def usage(self) -> Usage | None:
        """What the request used, once the stream has ended."""
        return self._state.usage

    @property
    def resumes(self) -> int:
        """How often the stream was resumed after a lost connection."""
        return self._state.resumes

    @property
    def completion(self) -> Completion:
        """The whole output; raises ClosedError before the stream has ended."""
        return self._state.completion()

    def __reduce__(self) -> NoReturn:
        raise TypeError("a stream cannot be pickled or copied; save its `cursor`")
