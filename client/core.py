"""What both clients share: their setup, and the flow of each method."""

from __future__ import annotations

import os
import random
from dataclasses import dataclass

from kvmesh.client import requests, transport
from kvmesh.client.credentials import resolve_api_key, resolve_target
from kvmesh.client.errors import InvalidRequestError
from kvmesh.client.failures import Contact, RetryState
from kvmesh.client.flows import StreamFlow, UnaryFlow, stream, unary
from kvmesh.client.options import TLS, GenerateOptions, Prompt, RetryPolicy
from kvmesh.client.stream_state import StreamState
from kvmesh.protos import admin, pb

# For calls that generate nothing.
DEFAULT_TIMEOUT_S = 30.0
# Of a stream; several times the 5 s that the contract promises.
DEFAULT_SILENCE_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class Connection:
    """The server to connect to, and the credentials to use."""

    target: str
    api_key: str | None
    tls: TLS | None


def connection(target: str | None, api_key: str | None, tls: TLS | bool) -> Connection:
    """Fill in defaults from the environment, which is read only here."""
    resolved = resolve_target(target, os.environ)
    return Connection(
        target=resolved,
        api_key=resolve_api_key(api_key, resolved, os.environ),
        tls=(TLS() if tls else None) if isinstance(tls, bool) else tls,
    )


def check_silence_timeout(seconds: float | None) -> None:
    # A comparison that is also false for NaN.
    if seconds is not None and not 0 < seconds < float("inf"):
        raise InvalidRequestError.of(
            "silence_timeout_s", f"must be finite and greater than 0, or None, got {seconds}"
        )


class Core:
    """Builds the flows of one client's calls.

    timeout_s: default for generations that set none
    """

    def __init__(self, retry: RetryPolicy, timeout_s: float | None, rng: random.Random) -> None:
        self._retry = retry
        self._timeout_s = timeout_s
        self._rng = rng
        self._contact = Contact()

    def generate(
        self, prompt: pb.Prompt, options: GenerateOptions
    ) -> UnaryFlow[pb.GenerateResponse]:
        request = requests.generate_request(prompt, options)
        return self._unary(transport.GENERATE, request, self._timeout_of(options))

    def generate_stream(
        self, prompt: pb.Prompt, options: GenerateOptions
    ) -> tuple[StreamState, StreamFlow]:
        state = StreamState(requests.generate_request(prompt, options))
        return state, stream(state, self._timeout_of(options), self._retries())

    def tokenize(
        self, prompt: Prompt, model: str | None, timeout_s: float | None
    ) -> UnaryFlow[pb.TokenizeResponse]:
        request = pb.TokenizeRequest(prompt=requests.prompt_message(prompt), model=model or "")
        return self._unary(transport.TOKENIZE, request, timeout_s)

    def estimate(
        self, request: pb.EstimateBudgetRequest, timeout_s: float | None
    ) -> UnaryFlow[pb.EstimateBudgetResponse]:
        return self._unary(transport.ESTIMATE_BUDGET, request, timeout_s)

    def abort(self, request_id: str, timeout_s: float | None) -> UnaryFlow[pb.AbortResponse]:
        return self._unary(transport.ABORT, pb.AbortRequest(request_id=request_id), timeout_s)

    def explain(self, request_id: str, timeout_s: float | None) -> UnaryFlow[pb.ExplainResponse]:
        return self._unary(transport.EXPLAIN, pb.ExplainRequest(request_id=request_id), timeout_s)

    def model_info(self, timeout_s: float | None) -> UnaryFlow[pb.GetModelInfoResponse]:
        return self._unary(transport.GET_MODEL_INFO, pb.GetModelInfoRequest(), timeout_s)

    def tenant_loads(self, timeout_s: float | None) -> UnaryFlow[pb.GetTenantLoadsResponse]:
        return self._unary(transport.GET_TENANT_LOADS, pb.GetTenantLoadsRequest(), timeout_s)

    def loads(self, timeout_s: float | None) -> UnaryFlow[admin.GetLoadsResponse]:
        return self._unary(transport.GET_LOADS, admin.GetLoadsRequest(), timeout_s)

    def groups(self, timeout_s: float | None) -> UnaryFlow[admin.ListGroupsResponse]:
        return self._unary(transport.LIST_GROUPS, admin.ListGroupsRequest(), timeout_s)

    def _unary(
        self,
        method: transport.Method[transport.Request, transport.Reply],
        request: transport.Request,
        timeout_s: float | None,
    ) -> UnaryFlow[transport.Reply]:
        return unary(method, request, timeout_s, self._retries())

    def _retries(self) -> RetryState:
        return RetryState(self._retry, self._rng, self._contact)

    def _timeout_of(self, options: GenerateOptions) -> float | None:
        return options.get("timeout_s", self._timeout_s)
