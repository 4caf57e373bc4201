"""What the control plane refuses or fails at, besides the router's own tree (routing/errors.py).

ClusterError
├── UnauthenticatedError    no key, or a wrong one
├── NotAllowedError         the key is no admin key
├── UnknownModelError       the request names another model
├── UnknownPathError        there is no such call over HTTP
├── ResumeMismatchError     the cursor does not belong to what is served
├── ContextExceededError    the prompt is longer than any group's context
├── RequestDeadlineError    the time ran out before the first token
├── EngineLostError         the engine that ran the request died
├── RequestFaultError       the request cannot be computed: it must not be tried again
├── IngressBusyError        this ingress has as many calls as it takes; try again soon
├── DrainingError           the server is shutting down
└── NotReadyError           no group is up yet

UnsupportedFieldError and OversizedRequestError are InvalidFieldErrors: what later servers may
support, and what no request may be.

`Failure` carries these errors, the router's and the engine's to another process, as the class
name and its arguments, which are plain data.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import msgspec

from kvmesh.cluster.routing.errors import RoutingError
from kvmesh.workers.errors import EngineError, InvalidFieldError


class StartError(Exception):
    """The cluster did not start. The message is for users."""


class RayDiedError(Exception):
    """A process of Ray that the cluster needs has died. The message is for users."""


class ClusterError(Exception):
    """Anything the control plane itself refuses or fails at."""


class UnauthenticatedError(ClusterError):
    """The call has no API key (`missing`), or one that is not known."""

    def __init__(self, missing: bool) -> None:
        super().__init__(missing)
        self.missing = missing

    def __str__(self) -> str:
        if self.missing:
            return "an API key is required: send the metadata `authorization: Bearer <key>`"
        return "the API key is not valid for this server"


class NotAllowedError(ClusterError):
    """The call needs an admin key."""

    def __str__(self) -> str:
        return "this call needs an admin key"


class UnsupportedFieldError(InvalidFieldError):
    """A field, or a value of it, that this server does not know or does not support yet."""


class OversizedRequestError(InvalidFieldError):
    """A request with more bytes than the server takes."""


class UnknownModelError(ClusterError):
    """The request names a model that is not served."""

    def __init__(self, asked: str, served: str) -> None:
        super().__init__(asked, served)
        self.asked = asked
        self.served = served

    def __str__(self) -> str:
        return f"model {self.asked!r} is not served here; this server has {self.served!r}"


class UnknownPathError(ClusterError):
    """There is no such call over HTTP."""

    def __init__(self, method: str, path: str) -> None:
        super().__init__(method, path)
        self.method = method
        self.path = path

    def __str__(self) -> str:
        return f"there is no {self.method} {self.path} here; /openapi.json lists what there is"


class ResumeMismatchError(ClusterError):
    """The resume cursor does not belong to what is served."""


class ContextExceededError(ClusterError):
    """The prompt is longer than the context of every group."""

    def __init__(self, prompt_tokens: int, max_model_len: int, needed: int, available: int) -> None:
        super().__init__(prompt_tokens, max_model_len, needed, available)
        self.prompt_tokens = prompt_tokens
        self.max_model_len = max_model_len
        self.needed_bytes = needed
        self.available_bytes = available

    def __str__(self) -> str:
        return (
            f"the prompt has {self.prompt_tokens} tokens, but the context holds "
            f"{self.max_model_len}, one of them for output; the request would need "
            f"{self.needed_bytes} B of KV cache, and a group has {self.available_bytes} B"
        )


class RequestDeadlineError(ClusterError):
    """The request's time ran out before its first token."""

    def __str__(self) -> str:
        return "the request timed out before its first token"


class EngineLostError(ClusterError):
    """The engine that ran the request died or was replaced."""

    def __str__(self) -> str:
        return "the engine that served the request was lost"


class RequestFaultError(ClusterError):
    """The request cannot be computed, or makes engines fail: it must not be tried again."""

    def __init__(self, cause: str) -> None:
        super().__init__(cause)
        self.cause = cause

    def __str__(self) -> str:
        return f"this request cannot be served, do not send it again: {self.cause}"


class IngressBusyError(ClusterError):
    """This ingress has as many calls, or requests that it receives or tokenises, as it takes."""


class DrainingError(ClusterError):
    """The server is shutting down."""

    def __str__(self) -> str:
        return "the server is shutting down"


class NotReadyError(ClusterError):
    """No group is up yet, or the router does not answer."""

    def __init__(self, message: str = "no engine is ready yet") -> None:
        super().__init__(message)


class Failure(msgspec.Struct, frozen=True):
    """An error as a message to another process."""

    kind: str
    args: list[Any]

    @staticmethod
    def of(error: EngineError | ClusterError | RoutingError) -> Failure:
        return Failure(type(error).__name__, list(error.args))

    @property
    def error(self) -> Exception:
        return _kinds()[self.kind](*self.args)


@cache
def _kinds() -> dict[str, type[Exception]]:
    roots: tuple[type[Exception], ...] = (EngineError, ClusterError, RoutingError)
    return {kind.__name__: kind for root in roots for kind in _tree(root)}


def _tree(root: type[Exception]) -> Iterator[type[Exception]]:
    yield root
    for child in root.__subclasses__():
        yield from _tree(child)
