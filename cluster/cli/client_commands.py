"""`kvmesh generate`, `chat`, `status` and `estimate`: clients of a running cluster."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from kvmesh.cluster.cli.console import err, explained, human_bytes, human_seconds, out

TargetOption = Annotated[
    str | None, typer.Option(help="host:port; else $KVMESH_TARGET, else localhost:9000.")
]
KeyOption = Annotated[
    str | None,
    typer.Option(
        help="Else $KVMESH_API_KEY, else the local server's; visible to other users here."
    ),
]
MaxTokensOption = Annotated[int | None, typer.Option(help="Output tokens.")]
TemperatureOption = Annotated[float | None, typer.Option(help="0 is greedy.")]
SeedOption = Annotated[int | None, typer.Option(help="Makes sampling repeatable.")]


def generate(
    prompt: Annotated[str, typer.Argument(help="The text to continue.")],
    max_tokens: MaxTokensOption = None,
    temperature: TemperatureOption = None,
    top_p: Annotated[float | None, typer.Option(help="Nucleus sampling.")] = None,
    seed: SeedOption = None,
    stop: Annotated[list[str] | None, typer.Option(help="Ends the output; repeatable.")] = None,
    target: TargetOption = None,
    api_key: KeyOption = None,
) -> None:
    """Continue a prompt, streaming to the terminal."""
    with explained():
        from kvmesh.client import Client

        options = _given(
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
    """Talk with the model; an empty line or Ctrl-D ends it, Ctrl-C ends an answer."""
    with explained():
        from kvmesh.client import Client, Message

        options = _given(max_tokens=max_tokens, temperature=temperature, seed=seed)
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
    """Print a stream as it comes; its text. Ctrl-C ends it, which frees its pages."""
    pieces: list[str] = []
    try:
        for delta in stream:
            if delta.index == 0:
                pieces.append(delta.text)
                out.print(delta.text, end="", markup=False, soft_wrap=True)
                out.file.flush()
    except KeyboardInterrupt:
        stream.close()
    out.print()
    usage = stream.usage
    if usage is not None and err.is_terminal:
        first_s = usage.time_to_first_token_s
        told = f", first after {human_seconds(first_s)}" if first_s is not None else ""
        err.print(
            f"[dim]{usage.prompt_tokens} + {usage.completion_tokens} tokens{told}, "
            f"{human_bytes(usage.kv_used_bytes)} of KV[/dim]"
        )
    return "".join(pieces)


def status(target: TargetOption = None, api_key: KeyOption = None) -> None:
    """Show the model, the groups' pools and latencies, and the router's ledger."""
    with explained():
        from kvmesh.client import Client
        from kvmesh.cluster.cli.status_view import show_status

        with Client(target, api_key=api_key) as client:
            show_status(client.model_info(), client.loads())


def estimate(
    prompt: Annotated[str | None, typer.Argument(help="A prompt; or give its length.")] = None,
    prompt_tokens: Annotated[int | None, typer.Option(help="The prompt's length.")] = None,
    max_tokens: MaxTokensOption = None,
    n: Annotated[int | None, typer.Option("-n", help="Choices.")] = None,
    min_kv_format: Annotated[str | None, typer.Option(help="Least faithful that will do.")] = None,
    target: TargetOption = None,
    api_key: KeyOption = None,
) -> None:
    """What a request would need of every group, and when it could start, without sending it."""
    with explained():
        from kvmesh.client import Client
        from kvmesh.cluster.cli.status_view import show_estimate

        if (prompt is None) == (prompt_tokens is None):
            raise typer.BadParameter("give either a prompt or --prompt-tokens")
        with Client(target, api_key=api_key) as client:
            show_estimate(
                client.estimate(
                    prompt,
                    prompt_tokens=prompt_tokens,
                    max_tokens=max_tokens,
                    n=n,
                    min_kv_format=min_kv_format,
                )
            )


def explain(
    request_id: Annotated[str, typer.Argument(help="Of a request of the same key.")],
    target: TargetOption = None,
    api_key: KeyOption = None,
) -> None:
    """Why a request went where it went, waited or was refused; of the latest requests only."""
    with explained():
        from kvmesh.client import Client
        from kvmesh.cluster.cli.status_view import show_explanation

        with Client(target, api_key=api_key) as client:
            show_explanation(client.explain(request_id))


def _given(**options: object) -> Any:
    """Only what was asked for: the server has its own defaults."""
    return {name: value for name, value in options.items() if value is not None}
