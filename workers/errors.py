"""The data plane's errors, in one tree.

Every class can be pickled, so that it can be sent to another process; `field`
names the input at fault, if there is one.
"""

from __future__ import annotations

from collections.abc import Sequence


class EngineError(Exception):
    """Any refusal or failure of the data plane."""


class InvalidFieldError(EngineError):
    """A request that is not valid; `field` names the part at fault."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(field, message)
        self.field = field
        self.message = message

    def __str__(self) -> str:
        return f"{self.field}: {self.message}"


class PoolCapacityError(EngineError):
    """The pool cannot hold the request now or, if not `retryable`, at any time."""

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


class ConfigErrors(ConfigError):
    """Several settings that are wrong; `field` and `message` are those of the first.

    problems: one or more
    """

    def __init__(self, problems: Sequence[ConfigError]) -> None:
        super().__init__(problems[0].field, problems[0].message)
        self.args = (tuple(problems),)
        self.problems = tuple(problems)

    def __str__(self) -> str:
        return "\n".join(map(str, self.problems))


class UnsupportedModelError(ConfigError):
    """A model that kvmesh would compute wrongly; the message has its name and the reason."""


class WorkerDiedError(EngineError):
    """A rank of the group has died or hangs; the group must be replaced."""


class RankRaisedError(WorkerDiedError):
    """A rank has raised an error and ended; what it computed may be the cause."""


class EngineDrainingError(EngineError):
    """The engine is draining: it finishes its sequences and accepts no others."""
