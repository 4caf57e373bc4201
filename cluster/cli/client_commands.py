"""`kvmesh generate`, `chat`, `status`, `estimate`, `explain`: clients of a running cluster."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from kvmesh.cluster.cli.console import err, friendly_errors, human_bytes, human_seconds, out

TargetOption = Annotated[
    str | None, typer.Option(help="host:port; default: $KVMESH_TARGET, or localhost:9000.")
]
KeyOption = Annotated[
    str | None,
    typer.Option(
        help="Default: $KVMESH_API_KEY, or the local server's key. Other users can see options."
    ),
]
MaxTokensOption = Annotated[int | None, typer.Option(help="Maximum output tokens.")]
TemperatureOption = Annotated[float | None, typer.Option(help="0 is greedy.")]
SeedOption = Annotated[int | None, typer.Option(help="Makes sampling repeatable.")]


def generate(
    prompt: Annotated[str, typer.Argument(help="The text to continue.")],
    max_tokens: MaxTokensOption = None,
    temperature: TemperatureOption = None,
    top_p: Annotated[float | None, typer.Option(help="Nucleus sampling.")] = None,
    seed: SeedOption = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="A string that ends the output; may be repeated.")
    ] = None,
    target: TargetOption = None,
    api_key: KeyOption = None,
) -> None:
    """Continue a prompt and stream the output to the terminal."""
    with friendly_errors():
        from kvmesh.client import Client

        options = _without_none(
            max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed, stop=stop
        )
        with (
            Client(target, api_key=api_key) as client,
            client.generate_stream(prompt, **options) as stream,
        ):
            _print_stream(stream)


def chat(
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    max_tokens: MaxTokensOption = None,
    temperature: TemperatureOption = None,
    seed: SeedOption = None,
    target: TargetOption = None,
    api_key: KeyOption = None,
) -> None:
    """Chat with the model. An empty line or Ctrl-D quits, Ctrl-C stops an answer."""
    with friendly_errors():
        from kvmesh.client import Client, Message

        options = _without_none(max_tokens=max_tokens, temperature=temperature, seed=seed)
        messages = [Message("system", system)] if system else []
        with Client(target, api_key=api_key) as client:
            while line := _read_line():
                messages.append(Message("user", line))
                with client.chat_stream(messages, **options) as stream:
                    text = _print_stream(stream)
                messages.append(Message("assistant", text))


def _read_line() -> str:
    try:
        return out.input("[bold cyan]you ›[/bold cyan] ").strip()
    except (EOFError, KeyboardInterrupt):
        return ""


def _print_stream(stream: Any) -> str:
    """Print a stream as it arrives; returns its text. Ctrl-C cancels it and frees its pages."""
    from kvmesh.client import Delta
    from kvmesh.cluster.cli.wait_display import WaitDisplay

    pieces: list[str] = []
    try:
        with WaitDisplay(err) as waiting:
            for event in stream.events():
                waiting.show(event)
                if isinstance(event, Delta) and event.index == 0:
                    pieces.append(event.text)
                    out.print(event.text, end="", markup=False, soft_wrap=True)
                    out.file.flush()
    except KeyboardInterrupt:
        stream.close()
    out.print()
    usage = stream.usage
    if usage is not None and err.is_terminal:
        first_s = usage.time_to_first_token_s
        latency = f", first after {human_seconds(first_s)}" if first_s is not None else ""
        err.print(
            f"[dim]{usage.prompt_tokens} + {usage.completion_tokens} tokens{latency}, "
            f"{human_bytes(usage.kv_used_bytes)} of KV[/dim]"
        )
    return "".join(pieces)


def status(target: TargetOption = None, api_key: KeyOption = None) -> None:
    """Show the model, and with an admin key the groups' loads and the router's ledger.

    With another key: what its tenant is using.
    """
    with friendly_errors():
        from kvmesh.client import Client, PermissionDeniedError
        from kvmesh.cluster.cli.status_view import show_cluster, show_model, show_tenant

        with Client(target, api_key=api_key) as client:
            show_model(client.model_info())
            try:
                groups, loads = client.groups(), client.loads()
            except PermissionDeniedError:
                show_tenant(client.tenant_loads())
            else:
                show_cluster(groups, loads)


def estimate(
    prompt: Annotated[str | None, typer.Argument(help="A prompt; or use --prompt-tokens.")] = None,
    prompt_tokens: Annotated[int | None, typer.Option(help="Length of the prompt.")] = None,
    max_tokens: MaxTokensOption = None,
    n: Annotated[int | None, typer.Option("-n", help="Number of choices.")] = None,
    allow_kv_format: Annotated[
        list[str] | None, typer.Option(help="An acceptable KV format; may be repeated.")
    ] = None,
    target: TargetOption = None,
    api_key: KeyOption = None,
) -> None:
    """Show what a request would need and when it could start, without sending it."""
    with friendly_errors():
        from kvmesh.client import Client
        from kvmesh.cluster.cli.status_view import show_estimate

        if (prompt is None) == (prompt_tokens is None):
            raise typer.BadParameter("expected either a prompt or --prompt-tokens")
        with Client(target, api_key=api_key) as client:
            show_estimate(
                client.estimate(
                    prompt,
                    prompt_tokens=prompt_tokens,
                    max_tokens=max_tokens,
                    n=n,
                    allowed_kv_formats=allow_kv_format,
                )
            )


def explain(
    request_id: Annotated[str, typer.Argument(help="ID of a request made with the same key.")],
    target: TargetOption = None,
    api_key: KeyOption = None,
) -> None:
    """Explain where a recent request was placed, or why it waited or was rejected."""
    with friendly_errors():
        from kvmesh.client import Client
        from kvmesh.cluster.cli.status_view import show_explanation

        with Client(target, api_key=api_key) as client:
            show_explanation(client.explain(request_id))


def _without_none(**options: object) -> Any:
    """The options that were set; the server has defaults for the others."""
    return {name: value for name, value in options.items() if value is not None}
