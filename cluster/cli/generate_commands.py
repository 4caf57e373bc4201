"""`kvmesh generate` and `chat`: a model's output on the terminal, as it arrives."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from kvmesh.cluster.cli.console import human_bytes, human_seconds, notes, out, print_json
from kvmesh.cluster.cli.exits import CommandFailed, ExitCode
from kvmesh.cluster.cli.options import (
    JsonOption,
    QuietOption,
    ServerOptions,
    with_options,
    without_none,
)

if TYPE_CHECKING:
    from kvmesh.client import Completion, Stream

# How a schema begins that is not the name of a file.
_JSON = ("{", "true", "false")

MaxTokensOption = Annotated[int | None, typer.Option(help="Maximum output tokens.")]
TemperatureOption = Annotated[float | None, typer.Option(help="0 is greedy.")]
SeedOption = Annotated[int | None, typer.Option(help="Makes sampling repeatable.")]


@with_options
def generate(
    connection: ServerOptions,
    prompt: Annotated[
        str | None, typer.Argument(help="The text to continue; default: what stdin has.")
    ] = None,
    file: Annotated[
        Path | None, typer.Option("--file", "-f", help="A file with the prompt; - is stdin.")
    ] = None,
    max_tokens: MaxTokensOption = None,
    temperature: TemperatureOption = None,
    top_p: Annotated[float | None, typer.Option(help="Nucleus sampling.")] = None,
    seed: SeedOption = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="A string that ends the output; may be repeated.")
    ] = None,
    include_stop: Annotated[
        bool, typer.Option("--include-stop", help="Print the string that ends the output, too.")
    ] = False,
    special_tokens: Annotated[
        bool, typer.Option("--special-tokens", help="Print special tokens, too.")
    ] = False,
    prompt_logprobs: Annotated[
        int | None,
        typer.Option(
            help="With --json: log-probabilities of the prompt's tokens and of this many "
            "alternatives. --max-tokens may then be 0."
        ),
    ] = None,
    pin_s: Annotated[
        float | None,
        typer.Option(
            help="The prompt stays cached for this many seconds after the request; 0 ends that. "
            "--max-tokens may be 0."
        ),
    ] = None,
    request_id: Annotated[
        str | None, typer.Option(help="Names the request, for `abort` and `explain`.")
    ] = None,
    json_schema: Annotated[
        str | None,
        typer.Option(help="The output is JSON of this schema: a file, or JSON."),
    ] = None,
    json_object: Annotated[
        bool, typer.Option("--json-object", help="The output is a JSON object.")
    ] = False,
    regex: Annotated[
        str | None, typer.Option(help="The output matches this regular expression.")
    ] = None,
    grammar: Annotated[
        Path | None,
        typer.Option(help="The output matches the grammar in this file (Lark or GBNF)."),
    ] = None,
    choice: Annotated[
        list[str] | None, typer.Option(help="The output is this text, or another --choice.")
    ] = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Continue a prompt and stream the output to the terminal. With --json, print it at the end."""
    options = without_none(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        stop=stop,
        include_stop_str_in_output=include_stop or None,
        skip_special_tokens=False if special_tokens else None,
        prompt_logprobs=prompt_logprobs,
        pin_s=pin_s,
        request_id=request_id,
        structured_output=_structured(
            json_schema=json_schema,
            json_object=json_object or None,
            regex=regex,
            grammar=grammar,
            choice=choice or None,
        ),
    )
    with (
        connection.client() as client,
        client.generate_stream(_prompt(prompt, file), **options) as stream,
    ):
        if as_json:
            list(stream)
            print_json(stream.completion)
        else:
            try:
                _print_stream(stream, [])
            finally:
                out.print()
            _note_usage(stream)
        _check_finished(stream.completion)


@with_options
def chat(
    connection: ServerOptions,
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    max_tokens: MaxTokensOption = None,
    temperature: TemperatureOption = None,
    seed: SeedOption = None,
    template: Annotated[
        str | None, typer.Option(help="Name of one of the model's chat templates.")
    ] = None,
    quiet: QuietOption = False,
) -> None:
    """Chat with the model. Ctrl-C stops an answer, and Ctrl-D ends the chat.

    On a terminal, Enter sends and Alt-Enter begins a line; arrow keys find earlier messages.
    """
    from kvmesh.client import Message
    from kvmesh.cluster.cli.line_input import message_reader

    read = message_reader()
    options = without_none(
        max_tokens=max_tokens, temperature=temperature, seed=seed, chat_template_name=template
    )
    messages = [Message("system", system)] if system else []
    with connection.client() as client:
        while (line := _next(read)) is not None:
            if not line:
                continue
            messages.append(Message("user", line))
            pieces: list[str] = []
            with client.chat_stream(messages, **options) as stream:
                try:
                    _print_stream(stream, pieces)
                except KeyboardInterrupt:
                    stream.close()
            out.print()
            _note_usage(stream)
            messages.append(Message("assistant", "".join(pieces)))


def _structured(**given: Any) -> dict[str, Any] | None:
    """What the output must match, from the one option that is given."""
    given = without_none(**given)
    if len(given) > 1:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise typer.BadParameter(f"only one of them can be given: {names}")
    if not given:
        return None
    ((kind, value),) = given.items()
    if kind == "grammar" or (kind == "json_schema" and not value.lstrip().startswith(_JSON)):
        try:
            value = Path(value).read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CommandFailed(f"{value} cannot be read: {error}", ExitCode.USAGE) from None
    return {kind: value}


def _prompt(prompt: str | None, file: Path | None) -> str:
    """The prompt, from wherever it is given."""
    if prompt is not None and file is not None:
        raise typer.BadParameter("give one of PROMPT and --file")
    if prompt is not None:
        return prompt
    if file is None and sys.stdin.isatty():
        raise typer.BadParameter("give a PROMPT, --file, or text on stdin")
    source = "stdin" if file is None or str(file) == "-" else str(file)
    try:
        data = sys.stdin.buffer.read() if source == "stdin" else Path(source).read_bytes()
        text = data.decode("utf-8")
    except OSError as error:
        raise CommandFailed(f"cannot read {source}: {error.strerror}", ExitCode.USAGE) from None
    except UnicodeDecodeError as error:
        raise CommandFailed(
            f"{source} must be text in UTF-8; byte {error.start} is not", ExitCode.USAGE
        ) from None
    if not text:
        raise typer.BadParameter(f"{source} is empty; give a PROMPT, a file, or text on stdin")
    return text


def _next(read: Callable[[], str]) -> str | None:
    """The user's next message, None when there is no more."""
    try:
        return read()
    except (EOFError, KeyboardInterrupt):
        return None


def _print_stream(stream: Stream, pieces: list[str]) -> None:
    """Print a stream as it arrives, and add its text to `pieces`."""
    from kvmesh.client import Delta, Queued
    from kvmesh.cluster.cli.wait_display import WaitDisplay

    named = not notes.is_terminal
    with WaitDisplay(notes) as waiting:
        for event in stream.events():
            if isinstance(event, Queued) and not named:
                named = True
                notes.print(f"[dim]request {escape(stream.request_id)}[/dim]")
            waiting.show(event)
            if isinstance(event, Delta) and event.index == 0:
                if event.reasoning:
                    notes.print(escape(event.reasoning), style="dim", end="")
                pieces.append(event.text)
                # Rich would print it again after a Ctrl-C in the middle of this.
                out.file.write(event.text)
                out.file.flush()


def _note_usage(stream: Stream) -> None:
    usage = stream.usage
    if usage is None or not notes.is_terminal:
        return
    first_s = usage.time_to_first_token_s
    latency = f", first after {human_seconds(first_s)}" if first_s is not None else ""
    pinned = f", {usage.pinned_tokens} pinned" if usage.pinned_tokens else ""
    notes.print(
        f"[dim]{usage.prompt_tokens} + {usage.completion_tokens} tokens{latency}{pinned}, "
        f"{human_bytes(usage.kv_used_bytes)} of KV, request {escape(stream.request_id)}[/dim]"
    )


def _check_finished(completion: Completion) -> None:
    """Raises CommandFailed if the output is not complete."""
    from kvmesh.client import FinishReason

    reasons = {choice.finish_reason for choice in completion.choices}
    if FinishReason.ABORT in reasons:
        raise CommandFailed(f"request {completion.request_id} was aborted")
    if FinishReason.DEADLINE in reasons:
        raise CommandFailed(
            f"the time of request {completion.request_id} ran out before its output was complete",
            ExitCode.DEADLINE,
        )
