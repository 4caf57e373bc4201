# Written by `make sdk` from async_stream.py; do not edit.
"""The stream of the blocking client."""

from __future__ import annotations

from collections.abc import Generator
from types import TracebackType
from typing import Any, Self, TypeVar

from kvmesh.client.errors import ClosedError
from kvmesh.client.flows import Emit, Now, Open, Read, Sleep, StreamFlow
from kvmesh.client.stream_state import StreamState
from kvmesh.client.stream_view import StreamView
from kvmesh.client.transport import RpcFailure, StreamCall, Transport
from kvmesh.client.types import (
    Delta,
    Prefilling,
    PromptLogprobs,
    Queued,
    Started,
    StreamEvent,
    Usage,
)
from kvmesh.protos import pb

Event = TypeVar("Event", bound=StreamEvent)


class Stream(StreamView):
    """Output as it is generated; can be iterated over once.

        with client.generate_stream("Once upon a time") as stream:
            for delta in stream:
                print(delta.text, end="", flush=True)
        print(stream.completion.usage)

    Leaving the loop or the `with` block ends the request on the server; `next(stream)`
    takes one delta and leaves it running, while something refers to the stream. A lost connection
    is resumed where it stopped; no token is emitted twice.
    """

    def __init__(self, transport: Transport, state: StreamState, flow: StreamFlow) -> None:
        super().__init__(state)
        self._transport = transport
        self._flow = flow
        self._call: StreamCall | None = None
        self._ended = False
        self._closed = False

    def __iter__(self) -> Generator[Delta]:
        return self._iterate(Delta)

    def __next__(self) -> Delta:
        delta = self._next((Delta,))
        if delta is None:
            raise StopIteration
        return delta

    def events(self) -> Generator[StreamEvent]:
        """Everything that happens, instead of the output alone; Usage is the last.

        Queued and Prefilling may come at any time before the output ends, most often before
        its first token, and say the same again when there is nothing new for some seconds.
        PromptLogprobs come, if they were requested, while the prompt is computed.
        """
        return self._iterate(Queued, Started, Prefilling, PromptLogprobs, Delta, Usage)

    def close(self) -> None:
        """End the request on the server, and a loop over the stream with ClosedError."""
        self._closed = True
        if self._call is not None:
            self._call.cancel()

    def __del__(self) -> None:
        """A stream that nobody can read any more ends its request, too."""
        if self._call is not None and not self._closed:
            self._call.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _iterate(self, *kinds: type[Event]) -> Generator[Event]:
        if self._closed:
            raise ClosedError("the stream has ended or been closed; it can be iterated over once")
        return self._each(kinds)

    def _each(self, kinds: tuple[type[Event], ...]) -> Generator[Event]:
        try:
            while (event := self._next(kinds)) is not None:
                yield event
        finally:
            self.close()

    def _next(self, kinds: tuple[type[Event], ...]) -> Event | None:
        """Execute the flow up to its next event of these kinds; None at its end."""
        if self._ended:
            return None
        self._check_open()
        outcome: Any = None
        failure: RpcFailure | None = None
        try:
            while True:
                step = self._flow.send(outcome) if failure is None else self._flow.throw(failure)
                outcome = failure = None
                try:
                    match step:
                        case Now():
                            outcome = self._transport.now()
                        case Sleep(seconds):
                            self._transport.sleep(seconds)
                        case Open(request, timeout_s, metadata):
                            if self._call is not None:
                                self._call.cancel()
                            self._call = self._transport.stream(request, timeout_s, metadata)
                        case Read():
                            outcome = self._read()
                        case Emit(event):
                            if isinstance(event, kinds):
                                return event
                    self._check_open()
                except RpcFailure as error:
                    self._check_open()
                    failure = error
        except StopIteration:  # the end of the flow
            self._ended = True
            self.close()
            return None
        except BaseException:
            self.close()
            raise

    def _read(self) -> pb.GenerateStreamResponse | None:
        assert self._call is not None
        return self._call.read()

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("the stream has been closed")
