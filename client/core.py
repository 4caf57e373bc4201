"""What both clients share: their settings, and the flow of each method."""

from __future__ import annotations

import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvmesh.client import requests, transport
from kvmesh.client.chats import assign
from kvmesh.client.checks import Metadata, check_metadata, check_seconds
from kvmesh.client.credentials import checked_key, resolve_api_key, resolve_target
from kvmesh.client.errors import InvalidRequestError
from kvmesh.client.failures import Contact, RetryState
from kvmesh.client.flows import StreamFlow, UnaryFlow, stream, unary
from kvmesh.client.options import (
    TLS,
    UNSET,
    RetryPolicy,
    Timeout,
    Unset,
)
from kvmesh.client.stream_state import StreamState
from kvmesh.client.tracing import trace_context
from kvmesh.protos import pb

# For calls that generate nothing.
DEFAULT_TIMEOUT_S = 60.0
# Of a stream; several times the 5 s that the contract promises.
DEFAULT_SILENCE_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class Connection:
    """The server to connect to, and the credentials to use."""

    target: str
    api_key: str | None
    tls: TLS | None


def connection(
    target: str | None,
    api_key: str | None,
    tls: TLS | bool,
    *,
    interceptors: Sequence[object],
    channel: object,
    transport: object,
) -> Connection:
    """Fill in defaults from the environment, which is read only here.

    Raises InvalidRequestError for arguments that exclude each other.
    """
    if channel is not None or transport is not None:
        ready = "channel" if transport is None else "transport"
        excluded = {"target": target, "tls": tls, "interceptors": interceptors, "channel": channel}
        for name, value in excluded.items():
            if value and name != ready:
                raise InvalidRequestError.of(
                    name, f"cannot be combined with {ready}, which is connected already"
                )
        # A channel may lead anywhere, and the key in the local server's file is for that server.
        environ = os.environ if transport is None else {}
        return Connection("", resolve_api_key(api_key, "", environ), None)
    resolved = resolve_target(target, os.environ)
    return Connection(
        target=resolved,
        api_key=resolve_api_key(api_key, resolved, os.environ),
        tls=(TLS() if tls else None) if isinstance(tls, bool) else tls,
    )


@dataclass(frozen=True, slots=True)
class CallSettings:
    """What a client adds to its calls. Fields are described in `Client`."""

    api_key: str | None
    timeout_s: Timeout
    model: str | None
    metadata: Metadata
    retry: RetryPolicy

    def __post_init__(self) -> None:
        if self.timeout_s is not UNSET:
            check_seconds("timeout_s", self.timeout_s, none=True)
        if not isinstance(self.retry, RetryPolicy):
            raise InvalidRequestError.of("retry", f"expected a RetryPolicy, got {self.retry!r:.60}")

    def limit_s(self, timeout_s: Timeout, default_s: float | None) -> float | None:
        """The call's own timeout, or the client's, or the default of its kind."""
        for limit_s in (timeout_s, self.timeout_s):
            if not isinstance(limit_s, Unset):
                check_seconds("timeout_s", limit_s, none=True)
                return limit_s
        return default_s

    def with_model(self, request: transport.Request) -> transport.Request:
        """The request, for the client's model if it could name one and does not."""
        message: Any = request
        if self.model and "model" in message.DESCRIPTOR.fields_by_name and not message.model:
            assign(message, "model", self.model, "model")
        return request

    def call_metadata(self) -> Metadata:
        """Of a call that is made now."""
        return (
            *((("authorization", f"Bearer {self.api_key}"),) if self.api_key else ()),
            *self.metadata,
            *(() if "traceparent" in dict(self.metadata) else trace_context()),
        )


class Core:
    """Builds the flows of one client's calls."""

    def __init__(self, settings: CallSettings, contact: Contact | None = None) -> None:
        self._settings = settings
        self._rng = random.Random()
        self._contact = contact or Contact()

    def with_options(
        self,
        *,
        timeout_s: Timeout,
        api_key: str | None,
        model: str | None,
        metadata: Mapping[str, str | bytes] | None,
        retry: RetryPolicy | None,
    ) -> Core:
        """With other settings, of the same server. None, and UNSET for the timeout: the same."""
        old = self._settings
        settings = CallSettings(
            api_key=old.api_key if api_key is None else explicit_key(api_key),
            timeout_s=old.timeout_s if timeout_s is UNSET else timeout_s,
            model=old.model if model is None else model,
            metadata=tuple({**dict(old.metadata), **dict(check_metadata(metadata or {}))}.items()),
            retry=retry or old.retry,
        )
        return Core(settings, self._contact)

    def unary(
        self,
        method: transport.Method[transport.Request, transport.Reply],
        request: transport.Request,
        timeout_s: Timeout,
        default_s: float | None = DEFAULT_TIMEOUT_S,
    ) -> UnaryFlow[transport.Reply]:
        """A call with one reply. default_s: its limit if neither it nor the client sets one"""
        settings = self._settings
        limit_s = settings.limit_s(timeout_s, default_s)
        named = settings.with_model(request)
        return unary(method, named, limit_s, settings.call_metadata(), self._retries())

    def generate(
        self, prompt: pb.Prompt, options: Mapping[str, Any]
    ) -> UnaryFlow[pb.GenerateResponse]:
        request = requests.generate_request(prompt, options)
        return self.unary(transport.GENERATE, request, options.get("timeout_s", UNSET), None)

    def generate_stream(
        self, prompt: pb.Prompt, options: Mapping[str, Any]
    ) -> tuple[StreamState, StreamFlow]:
        request = self._settings.with_model(requests.generate_request(prompt, options))
        return self._stream(StreamState(request), options.get("timeout_s", UNSET))

    def resume(self, cursor: str, timeout_s: Timeout) -> tuple[StreamState, StreamFlow]:
        return self._stream(StreamState.of_cursor(cursor), timeout_s)

    def _stream(self, state: StreamState, timeout_s: Timeout) -> tuple[StreamState, StreamFlow]:
        settings = self._settings
        limit_s = settings.limit_s(timeout_s, None)
        return state, stream(state, limit_s, settings.call_metadata(), self._retries())

    def _retries(self) -> RetryState:
        return RetryState(self._settings.retry, self._rng, self._contact)


def explicit_key(api_key: str) -> str | None:
    return checked_key(api_key, "api_key") if api_key else None
