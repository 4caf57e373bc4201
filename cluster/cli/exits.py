"""How commands end: the exit codes, which error has which, and how an error is printed."""

from __future__ import annotations

import contextlib
import enum
import json
import os
import sys
from collections.abc import Iterator
from typing import Any

import typer
from rich.markup import escape

from kvmesh.client.errors import (
    AuthenticationError,
    CapacityError,
    DeadlineExceededError,
    DuplicateRequestError,
    InvalidRequestError,
    KVFormatError,
    KVMeshError,
    ModelNotFoundError,
    PermissionDeniedError,
    ResumeError,
    UnavailableError,
)
from kvmesh.cluster.cli.console import err, jsonable
from kvmesh.cluster.errors import RayDiedError, StartError
from kvmesh.workers.errors import ConfigError, ConfigErrors, EngineError


class ExitCode(enum.IntEnum):
    DONE = 0
    FAILED = 1
    USAGE = 2
    REFUSED = 3
    UNREACHABLE = 4
    DEADLINE = 5
    INTERRUPTED = 130
    BROKEN_PIPE = 141

    @property
    def meaning(self) -> str:
        return _MEANINGS[self]


_MEANINGS = {
    ExitCode.DONE: "done",
    ExitCode.FAILED: "failed: a fault of the server, or what was asked for could not be done",
    ExitCode.USAGE: "an argument or a setting is wrong",
    ExitCode.REFUSED: "refused: the server does not accept the request, or has no room for it now",
    ExitCode.UNREACHABLE: "unreachable: no server answers there, or it is not ready",
    ExitCode.DEADLINE: "the time ran out",
    ExitCode.INTERRUPTED: "interrupted by Ctrl-C",
    ExitCode.BROKEN_PIPE: "the program that reads the output has ended",
}


class CommandFailed(Exception):
    """A command that cannot do what was asked; the message is for users."""

    def __init__(self, message: str, code: ExitCode = ExitCode.FAILED) -> None:
        super().__init__(message)
        self.code = code


# The first row whose class matches decides. Other errors are bugs, and show their traceback.
_BY_ERROR: tuple[tuple[type[Exception], ExitCode], ...] = (
    (UnavailableError, ExitCode.UNREACHABLE),
    (DeadlineExceededError, ExitCode.DEADLINE),
    (InvalidRequestError, ExitCode.REFUSED),
    (AuthenticationError, ExitCode.REFUSED),
    (PermissionDeniedError, ExitCode.REFUSED),
    (ModelNotFoundError, ExitCode.REFUSED),
    (DuplicateRequestError, ExitCode.REFUSED),
    (CapacityError, ExitCode.REFUSED),
    (KVFormatError, ExitCode.REFUSED),
    (ResumeError, ExitCode.REFUSED),
    (KVMeshError, ExitCode.FAILED),
    (ConfigError, ExitCode.USAGE),
    (EngineError, ExitCode.FAILED),
    (StartError, ExitCode.FAILED),
    (RayDiedError, ExitCode.FAILED),
    (typer.TyperException, ExitCode.USAGE),
)


def exit_code_of(error: Exception) -> ExitCode | None:
    """The exit code after an error that is meant for users; None for others."""
    if isinstance(error, CommandFailed):
        return error.code
    if isinstance(error, ModuleNotFoundError) and _is_elsewhere(error):
        return ExitCode.USAGE
    return next((code for kind, code in _BY_ERROR if isinstance(error, kind)), None)


def _is_elsewhere(error: ModuleNotFoundError) -> bool:
    """Whether what is missing is a package that is not installed, and not a part of kvmesh."""
    return error.name is not None and error.name.partition(".")[0] != "kvmesh"


@contextlib.contextmanager
def friendly_errors(*, as_json: bool = False) -> Iterator[None]:
    """Print an error that is meant for users, without a traceback, and exit with its code."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        # What is still buffered would be written, and fail, when the interpreter ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(ExitCode.BROKEN_PIPE) from None
    except Exception as error:
        if _while_interrupted(error):
            raise KeyboardInterrupt from None
        code = exit_code_of(error)
        if code is None or (isinstance(error, typer.TyperException) and not as_json):
            raise  # Typer prints its own errors, with the usage
        if as_json:
            typer.echo(json.dumps({"error": as_fields(error, code)}), err=True)
        else:
            err.print(f"[red]error:[/red] {escape(as_text(error))}", soft_wrap=True)
        raise typer.Exit(code) from None


def _while_interrupted(error: BaseException) -> bool:
    """Whether Ctrl-C was being handled. It comes between any two instructions, also within a
    lock's own code, which may then fail to release what it did not acquire."""
    while error.__context__ is not None:
        error = error.__context__
        if isinstance(error, KeyboardInterrupt):
            return True
    return False


def as_text(error: Exception) -> str:
    """An error in a line; several wrong settings in a line each."""
    if isinstance(error, ModuleNotFoundError):
        return (
            f"this command needs packages that are not here ({error.name}): "
            "pip install 'kvmesh[serve]'"
        )
    text = str(error)
    if isinstance(error, ConfigErrors):
        lines = "\n  ".join(map(str, error.problems))
        return f"{len(error.problems)} settings are wrong\n  {lines}"
    if isinstance(error, UnavailableError) and error.reason is None:
        text += " (is `kvmesh serve` running there? use --target for another address)"
    if isinstance(error, KVMeshError):
        if error.retry_after_s is not None:
            text += f" (try again in {error.retry_after_s:.1f} s)"
        if error.request_id:
            text += f" (request {error.request_id})"
    return text


def as_fields(error: Exception, code: ExitCode) -> dict[str, Any]:
    """An error for programs: all that it carries, without what does not apply."""
    fields: dict[str, Any] = {"type": type(error).__name__, "message": str(error)}
    if isinstance(error, KVMeshError):
        fields |= vars(error)
    if isinstance(error, ConfigError):
        problems = error.problems if isinstance(error, ConfigErrors) else (error,)
        fields["violations"] = [
            {"field": problem.field, "description": problem.message} for problem in problems
        ]
    if isinstance(error, typer.TyperException):
        fields["message"] = error.format_message()
    given = {name: value for name, value in fields.items() if value not in (None, "", ())}
    return {**jsonable(given), "exit_code": int(code)}


@contextlib.contextmanager
def errors_by_option() -> Iterator[None]:
    """Report a ConfigError as an error of the option that the field is named after."""
    try:
        yield
    except ConfigError as error:
        option = f"--{error.field.replace('_', '-')}"
        raise typer.BadParameter(error.message, param_hint=option) from None
