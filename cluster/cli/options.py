"""Options that several commands share, as dataclasses whose fields are the options."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import os
import typing
import urllib.parse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvmesh.cluster.cli.console import notes

if TYPE_CHECKING:
    from kvmesh.client import TLS, AsyncClient, Client


def with_options(function: Callable[..., None]) -> Callable[..., None]:
    """A command in which each parameter that is a dataclass stands for one option per field."""
    signature = inspect.signature(function, eval_str=True)
    parameters: list[inspect.Parameter] = []
    bundles: dict[str, type] = {}
    for parameter in signature.parameters.values():
        bundle = parameter.annotation
        if not dataclasses.is_dataclass(bundle):
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
            continue
        assert isinstance(bundle, type)
        bundles[parameter.name] = bundle
        hints = typing.get_type_hints(bundle, include_extras=True)
        parameters += [
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=field.default,
                annotation=hints[field.name],
            )
            for field in dataclasses.fields(bundle)
        ]

    @functools.wraps(function)
    def command(**values: Any) -> None:
        for name, bundle in bundles.items():
            fields = [field.name for field in dataclasses.fields(bundle)]
            values[name] = bundle(**{field: values.pop(field) for field in fields})
        function(**values)

    command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {x.name: x.annotation for x in parameters}
    return command


def without_none(**options: object) -> Any:
    """The options that were given; the others have defaults elsewhere."""
    return {name: value for name, value in options.items() if value is not None}


def be_quiet(quiet: bool) -> bool:
    notes.quiet = notes.quiet or quiet
    return quiet


QuietOption = Annotated[
    bool,
    typer.Option("--quiet", "-q", callback=be_quiet, help="Print results and errors alone."),
]


JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON; errors too.")]


CONNECT_S = 2.0
_connection = functools.partial(typer.Option, rich_help_panel="Connection")


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """Which server a command calls, and how."""

    target: Annotated[
        str | None,
        _connection(help="host:port; default: $KVMESH_TARGET, or localhost:9000."),
    ] = None
    api_key: Annotated[
        str | None,
        _connection(
            help="Default: $KVMESH_API_KEY, or the local server's key. Other users can see "
            "options: prefer a file.",
        ),
    ] = None
    api_key_file: Annotated[
        Path | None,
        _connection(help="A file with the key, of mode 0600."),
    ] = None
    tls: Annotated[
        bool,
        _connection("--tls", help="Encrypt, and check the certificate."),
    ] = False
    tls_ca_file: Annotated[
        Path | None,
        _connection(help="Certificates to trust instead of the system's (PEM)."),
    ] = None
    tls_cert_file: Annotated[
        Path | None,
        _connection(help="This client's certificate (PEM)."),
    ] = None
    tls_key_file: Annotated[
        Path | None,
        _connection(help="The certificate's private key (PEM)."),
    ] = None
    tls_server_name: Annotated[
        str | None,
        _connection(
            help="The name in the server's certificate, if not the target's.",
        ),
    ] = None
    timeout: Annotated[
        float | None,
        _connection(
            help="Seconds until the call counts as failed; default: 60, or none to generate.",
        ),
    ] = None

    def client(self) -> Client:
        """Raises typer.BadParameter and the SDK's errors."""
        from kvmesh.client import Client, RetryPolicy

        # Nobody wants to look at nothing while a server that is not there may start.
        return Client(self.target, retry=RetryPolicy(max_connect_s=CONNECT_S), **self._settings())

    def async_client(self) -> AsyncClient:
        """One that tries nothing again. Raises typer.BadParameter and the SDK's errors."""
        from kvmesh.client import NO_RETRY, AsyncClient

        return AsyncClient(self.target, retry=NO_RETRY, **self._settings())

    def http_key(self, url: str) -> str | None:
        """The key for a server with OpenAI's API: as given, $OPENAI_API_KEY, or for a server on
        this machine kvmesh's, from $KVMESH_API_KEY or the local server's file.

        The URL may be of anyone's server, which must not get a key for kvmesh.
        """
        from kvmesh.client.credentials import is_local, resolve_api_key

        # Without a user's name before it, which may look like a host.
        host = urllib.parse.urlsplit(url).hostname or ""
        given = self._key()
        key = given if given is not None else os.environ.get("OPENAI_API_KEY") or None
        return resolve_api_key(key, host, os.environ if is_local(host) else {})

    def _settings(self) -> dict[str, Any]:
        given: dict[str, Any] = without_none(timeout_s=self.timeout)
        return {"api_key": self._key(), "tls": self._tls(), **given}

    def _key(self) -> str | None:
        from kvmesh.client.credentials import read_key_file

        if self.api_key_file is None:
            return self.api_key
        if self.api_key is not None:
            raise typer.BadParameter("give one of --api-key and --api-key-file")
        key = read_key_file(self.api_key_file)
        if key is None:
            raise typer.BadParameter(
                f"there is no file {self.api_key_file}", param_hint="--api-key-file"
            )
        return key

    def _tls(self) -> TLS | bool:
        from kvmesh.client import TLS

        parts = without_none(
            root_ca=self.tls_ca_file,
            client_cert=self.tls_cert_file,
            client_key=self.tls_key_file,
            server_name=self.tls_server_name,
        )
        return TLS(**parts) if parts else self.tls
