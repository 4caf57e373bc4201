"""`kvmesh status`, `models`, `estimate` and others: questions to a running cluster."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvmesh.cluster.cli.console import out, print_json
from kvmesh.cluster.cli.exits import CommandFailed, ExitCode
from kvmesh.cluster.cli.generate_commands import MaxTokensOption
from kvmesh.cluster.cli.options import JsonOption, QuietOption, ServerOptions, with_options

if TYPE_CHECKING:
    from kvmesh.client import Client

IdArgument = Annotated[str, typer.Argument(help="ID of a request made with the same key.")]


@with_options
def status(
    connection: ServerOptions, as_json: JsonOption = False, quiet: QuietOption = False
) -> None:
    """Show the model, and with an admin key the groups' loads and the router's ledger.

    With another key: what its tenant is using.
    """
    from kvmesh.cluster.cli.status_view import show_model

    with connection.client() as client:
        model, found = client.model_info(), _loads(client)
    if as_json:
        print_json({"model": model, **found})
    else:
        show_model(model)
        _show(found)


@with_options
def models(
    connection: ServerOptions, as_json: JsonOption = False, quiet: QuietOption = False
) -> None:
    """Show the served model, and what each group can hold."""
    from kvmesh.cluster.cli.status_view import show_groups, show_model

    with connection.client() as client:
        model = client.model_info()
    if as_json:
        print_json(model)
    else:
        show_model(model)
        show_groups(model)


@with_options
def loads(
    connection: ServerOptions, as_json: JsonOption = False, quiet: QuietOption = False
) -> None:
    """Show the load of the groups and the router, or with an ordinary key its tenant's."""
    with connection.client() as client:
        found = _loads(client)
    if as_json:
        print_json(found)
    else:
        _show(found)


def _loads(client: Client) -> dict[str, Any]:
    """All loads, if the key is an admin's; else those of its tenant. What is missing is None."""
    from kvmesh.client import PermissionDeniedError

    try:
        groups, found = client.groups(), client.loads()
    except PermissionDeniedError:
        tenant = client.tenant_loads()
        return {"groups": None, "loads": None, "tenant": tenant}
    return {"groups": groups, "loads": found, "tenant": None}


def _show(found: Mapping[str, Any]) -> None:
    from kvmesh.cluster.cli.status_view import show_cluster, show_tenant

    if found["tenant"] is not None:
        show_tenant(found["tenant"])
    else:
        show_cluster(found["groups"], found["loads"])


@with_options
def estimate(
    connection: ServerOptions,
    prompt: Annotated[str | None, typer.Argument(help="A prompt; or use --prompt-tokens.")] = None,
    prompt_tokens: Annotated[int | None, typer.Option(help="Length of the prompt.")] = None,
    max_tokens: MaxTokensOption = None,
    n: Annotated[int | None, typer.Option("-n", help="Number of choices.")] = None,
    allow_kv_format: Annotated[
        list[str] | None, typer.Option(help="An acceptable KV format; may be repeated.")
    ] = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Show what a request would need and when it could start, without sending it."""
    from kvmesh.cluster.cli.status_view import show_estimate

    if (prompt is None) == (prompt_tokens is None):
        raise typer.BadParameter("expected either a prompt or --prompt-tokens")
    with connection.client() as client:
        found = client.estimate(
            prompt,
            prompt_tokens=prompt_tokens,
            max_tokens=max_tokens,
            n=n,
            allowed_kv_formats=allow_kv_format,
        )
    if as_json:
        print_json(found)
    else:
        show_estimate(found)
    if not found.feasible_ever:
        message = (
            "no group could hold the request, even when empty, or it exceeds its tenant's quota"
        )
        raise CommandFailed(message, ExitCode.REFUSED)


@with_options
def explain(
    request_id: IdArgument,
    connection: ServerOptions,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Explain where a recent request was placed, or why it waited or was rejected."""
    from kvmesh.cluster.cli.status_view import show_explanation

    with connection.client() as client:
        found = client.explain(request_id)
    if as_json:
        print_json(found)
    else:
        show_explanation(found)
    if not found.decisions:
        raise CommandFailed(
            f"request {request_id} is not known with this key; only recent requests are kept"
        )


@with_options
def abort(
    request_id: IdArgument,
    connection: ServerOptions,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """End a request, and free what it holds."""
    with connection.client() as client:
        aborted = client.abort(request_id)
    if as_json:
        print_json({"request_id": request_id, "aborted": aborted})
    elif aborted:
        out.print(f"aborted {request_id}", markup=False)
    if not aborted:
        raise CommandFailed(f"no request {request_id} of this key is waiting or running")


@with_options
def tokenize(
    text: Annotated[str, typer.Argument(help="The text of a prompt.")],
    connection: ServerOptions,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Show a text's token ids, as a generation would use them."""
    with connection.client() as client:
        tokens = client.tokenize(text)
    if as_json:
        print_json(tokens)
        return
    out.print(f"{len(tokens.token_ids)} tokens; the context holds {tokens.max_model_len}")
    out.print(" ".join(map(str, tokens.token_ids)), soft_wrap=True)


@with_options
def detokenize(
    token_ids: Annotated[list[int], typer.Argument(help="Token ids.", min=0)],
    connection: ServerOptions,
    skip_special_tokens: Annotated[
        bool, typer.Option("--skip-special-tokens", help="Leave special tokens out.")
    ] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Show the text of token ids."""
    with connection.client() as client:
        text = client.detokenize(token_ids, skip_special_tokens=skip_special_tokens)
    if as_json:
        print_json({"text": text})
    else:
        out.print(text, markup=False, highlight=False, soft_wrap=True)
