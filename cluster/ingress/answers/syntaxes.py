"""How families of models write tool calls: how to read them, and the grammar to force them.

hermes    <tool_call>{"name": …, "arguments": {…}}</tool_call>     Hermes, Qwen 2.5 and 3
llama     {"name": …, "parameters": {…}}; …                        Llama 3, perhaps after
          <|python_tag|>
mistral   [TOOL_CALLS][{"name": …, "arguments": {…}}, …]           Mistral up to v3 …
          [TOOL_CALLS]name[ARGS]{…}                                … and later
deepseek  <｜tool▁calls▁begin｜><｜tool▁call▁begin｜>…              DeepSeek V3, R1, V3.1
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

from kvmesh.cluster.ingress.answers.characters import Malformed, Reading
from kvmesh.cluster.ingress.answers.json_reading import read_arguments, read_call
from kvmesh.cluster.ingress.answers.scanner import CallScanner
from kvmesh.workers.structured.grammar import Marker, literal

HERMES = ("<tool_call>", "</tool_call>")
PYTHON_TAG = "<|python_tag|>"
TOOL_CALLS, ARGS, CALL_ID = "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"
CALLS_BEGIN, CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL_BEGIN, CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"
SEPARATOR = "<｜tool▁sep｜>"
MAX_CALLS = 16


@dataclass(frozen=True, slots=True)
class ToolSyntax:
    """markers: texts that may be special tokens, and belong to calls
    read: an answer; it gets the tools' names
    call: the Lark rule of one call, from the tool's name, the rule of its arguments and markers
    calls: the Lark rule of all, from how many there may be and markers, over rules `call`
    """

    name: str
    markers: tuple[str, ...]
    read: Callable[[CallScanner, Collection[str]], Reading[None]]
    call: Callable[[str, str, Marker], str]
    calls: Callable[[int, Marker], str]


def _read_hermes(scanner: CallScanner, names: Collection[str]) -> Reading[None]:
    begin, end = HERMES
    while (yield from scanner.text_until(begin)):
        try:
            yield from scanner.skip_space()
            yield from read_call(scanner)
        except Malformed:
            scanner.give_up()
            continue
        yield from _read_end(scanner, end)


def _read_llama(scanner: CallScanner, names: Collection[str]) -> Reading[None]:
    yield from scanner.skip_space()
    while True:
        try:
            tagged = yield from scanner.optional(PYTHON_TAG)
            yield from scanner.skip_space()
            yield from read_call(scanner, None if tagged else names)
        except Malformed:
            scanner.give_up()
            break
        yield from scanner.skip_space()
        for separator in ";,":
            if (yield from scanner.optional(separator)):
                yield from scanner.skip_space()
    # A call that comes after text has the tag.
    while (yield from scanner.text_until(PYTHON_TAG)):
        try:
            yield from scanner.skip_space()
            yield from read_call(scanner)
        except Malformed:
            scanner.give_up()


def _read_mistral(scanner: CallScanner, names: Collection[str]) -> Reading[None]:
    while (yield from scanner.text_until(TOOL_CALLS)):
        try:
            yield from scanner.skip_space()
            if (yield from scanner.optional("[")):
                yield from _read_list(scanner)
            elif (yield from scanner.peek()) == "{":
                yield from read_call(scanner)
            else:
                yield from _read_named(scanner)
        except Malformed:
            scanner.give_up()


def _read_list(scanner: CallScanner) -> Reading[None]:
    """Calls, after the bracket."""
    while True:
        yield from scanner.skip_space()
        yield from read_call(scanner)
        yield from scanner.skip_space()
        if not (yield from scanner.optional(",")):
            break
    yield from _read_end(scanner, "]")


def _read_named(scanner: CallScanner) -> Reading[None]:
    name = yield from scanner.read_name("[{")
    if (yield from scanner.optional(CALL_ID)):
        yield from scanner.read_name("[{")
    yield from scanner.optional(ARGS)
    yield from scanner.skip_space()
    yield from read_arguments(scanner, name)


def _read_deepseek(scanner: CallScanner, names: Collection[str]) -> Reading[None]:
    while marker := (yield from scanner.text_until(CALLS_BEGIN, CALL_BEGIN)):
        try:
            if marker == CALLS_BEGIN:
                yield from scanner.skip_space()
                yield from scanner.expect(CALL_BEGIN)
            while True:
                yield from _read_fenced(scanner)
                if not (yield from scanner.optional(CALL_BEGIN)):
                    break
        except Malformed:
            scanner.give_up()
            continue
        yield from _read_end(scanner, CALLS_END)


def _read_fenced(scanner: CallScanner) -> Reading[None]:
    """A call after its begin: `type<sep>name` with the arguments in a code block, or
    `name<sep>` with the arguments as they are."""
    yield from scanner.skip_space()
    name = yield from scanner.read_name("<")
    yield from scanner.expect(SEPARATOR)
    yield from scanner.skip_space()
    if (yield from scanner.peek()) == "{":
        yield from read_arguments(scanner, name)
    else:
        name = yield from scanner.read_name("\n")
        yield from scanner.skip_space()
        fenced = yield from scanner.optional("```json")
        yield from scanner.skip_space()
        yield from read_arguments(scanner, name)
        if fenced:
            yield from _read_end(scanner, "```")
    yield from _read_end(scanner, CALL_END)


def _read_end(scanner: CallScanner, text: str) -> Reading[None]:
    """What follows a call; its absence is forgiven."""
    yield from scanner.skip_space()
    yield from scanner.optional(text)
    yield from scanner.skip_space()
    scanner.accept()


def _object(arguments_key: str) -> Callable[[str, str, Marker], str]:
    def call(name: str, arguments: str, marker: Marker) -> str:
        head = literal('{"name": ' + literal(name) + f', "{arguments_key}": ')
        return f'{head} {arguments} "}}"'

    return call


def _hermes_call(name: str, arguments: str, marker: Marker) -> str:
    begin, end = map(marker, HERMES)
    return f'{begin} "\\n" {_object("arguments")(name, arguments, marker)} "\\n" {end}'


def _repeated(separator: str, count: int) -> str:
    """The rule of one to `count` calls. separator: in Lark, "" for none"""
    if count == 1:
        return "call"
    return f"call ({separator} call){{0,{count - 1}}}" if separator else f"call{{1,{count}}}"


def _mistral_list(count: int, marker: Marker) -> str:
    separator = literal(", ")
    return f'{marker(TOOL_CALLS)} "[" {_repeated(separator, count)} "]"'


def _deepseek(form: str) -> Callable[[str, str, Marker], str]:
    def call(name: str, arguments: str, marker: Marker) -> str:
        begin, separator, end = map(marker, (CALL_BEGIN, SEPARATOR, CALL_END))
        if form == "fenced":
            block = literal(f"{name}\n```json\n")
            return f'{begin} "function" {separator} {block} {arguments} "\\n```" {end}'
        return f"{begin} {literal(name)} {separator} {arguments} {end}"

    return call


def _deepseek_calls(separator: str) -> Callable[[int, Marker], str]:
    def calls(count: int, marker: Marker) -> str:
        begin, end = marker(CALLS_BEGIN), marker(CALLS_END)
        return f"{begin} {_repeated(separator, count)} {end}"

    return calls


_DEEPSEEK_MARKERS = (CALLS_BEGIN, CALLS_END, CALL_BEGIN, CALL_END, SEPARATOR)

SYNTAXES = {
    syntax.name: syntax
    for syntax in (
        ToolSyntax(
            "hermes",
            HERMES,
            _read_hermes,
            _hermes_call,
            lambda count, marker: _repeated('"\\n"', count),
        ),
        ToolSyntax(
            "llama",
            (PYTHON_TAG,),
            _read_llama,
            _object("parameters"),
            lambda count, marker: _repeated('"; "', count),
        ),
        ToolSyntax(
            "mistral",
            (TOOL_CALLS, ARGS, CALL_ID),
            _read_mistral,
            _object("arguments"),
            _mistral_list,
        ),
        ToolSyntax(
            "mistral-v11",
            (TOOL_CALLS, ARGS, CALL_ID),
            _read_mistral,
            lambda name, arguments, marker: (
                f"{marker(TOOL_CALLS)} {literal(name)} {marker(ARGS)} {arguments}"
            ),
            lambda count, marker: _repeated("", count),
        ),
        ToolSyntax(
            "deepseek",
            _DEEPSEEK_MARKERS,
            _read_deepseek,
            _deepseek("fenced"),
            _deepseek_calls('"\\n"'),
        ),
        ToolSyntax(
            "deepseek-v31",
            _DEEPSEEK_MARKERS,
            _read_deepseek,
            _deepseek("plain"),
            _deepseek_calls(""),
        ),
    )
}


def detect(template: str, special_tokens: Collection[str]) -> ToolSyntax | None:
    """The syntax of the model with this chat template; None if it shows none.

    A template with tools that has none of the markers is taken for one of bare JSON.
    """

    def has(text: str) -> bool:
        return text in template or text in special_tokens

    if CALLS_BEGIN in template:
        return SYNTAXES["deepseek" if "```json" in template else "deepseek-v31"]
    if HERMES[0] in template:
        return SYNTAXES["hermes"]
    if TOOL_CALLS in template:
        return SYNTAXES["mistral-v11" if has(ARGS) else "mistral"]
    return SYNTAXES["llama"] if "tools" in template else None
