"""The data plane's errors, in one tree.

Every class survives pickling, so that it may cross a process; `field` names
the input at fault where there is one.
"""

from __future__ import annotations


class EngineError(Exception):
    """Anything the data plane refuses or fails at."""


class InvalidRequestError(EngineError):
    """A request that can never be served as it is; `field` says which part."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(field, message)
        self.field = field
        self.message = message

    def __str__(self) -> str:
        return f"{self.field}: {self.message}"


class CapacityError(EngineError):
    """The pool cannot hold the request: not now, or never where it is not `retryable`."""

    def __init__(
        self, message: str, needed_bytes: int, available_bytes: int, retryable: bool
    ) -> None:
        super().__init__(message, needed_bytes, available_bytes, retryable)
        self.message = message
        self.needed_bytes = needed_bytes
        self.available_bytes = available_bytes
        self.retryable = retryable

    def __str__(self) -> str:
        return self.message


class ConfigError(EngineError):
    """A configuration that cannot work; `field` names the setting."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(field, message)
        self.field = field
        self.message = message

    def __str__(self) -> str:
        return f"{self.field}: {self.message}"


class UnsupportedModelError(ConfigError):
    """A model kvmesh would compute wrongly, refused by name with the reason."""


class WorkerDiedError(EngineError):
    """A rank of the group is gone; the group must be replaced."""


class DrainingError(EngineError):
    """The engine finishes what it has and takes nothing new."""
