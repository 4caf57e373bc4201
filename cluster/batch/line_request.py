"""What a line asks, in OpenAI's batch format.

{"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {…}}
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import msgspec

from kvmesh.cluster.batch.input_file import InputLine

URLS: Final = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
# Of a prompt, what is compared to find requests with the same beginning.
ORDER_BYTES: Final = 4096


@dataclass(frozen=True, slots=True)
class LineRequest:
    """id: of the answer; beginning: of the prompt, as JSON has it"""

    id: str
    custom_id: str
    url: str
    body: bytes
    beginning: bytes


class LineError(Exception):
    """A line that asks nothing that can be answered. code, message: for its answer"""

    def __init__(self, code: str, message: str, custom_id: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.custom_id = custom_id


class _LineFields(msgspec.Struct):
    custom_id: Any = None
    method: Any = None
    url: Any = None
    body: msgspec.Raw = msgspec.Raw()


class _BodyFields(msgspec.Struct):
    """What a request's order depends on; the rest is read when it is served."""

    stream: Any = None
    tools: msgspec.Raw = msgspec.Raw()
    instructions: msgspec.Raw = msgspec.Raw()
    messages: msgspec.Raw = msgspec.Raw()
    prompt: msgspec.Raw = msgspec.Raw()
    input: msgspec.Raw = msgspec.Raw()


_line_decoder = msgspec.json.Decoder(_LineFields)
_body_decoder = msgspec.json.Decoder(_BodyFields)


def read_request(line: InputLine) -> LineRequest:
    """Raises LineError."""
    try:
        found = _line_decoder.decode(line.data)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise LineError(
            "invalid_json", f"line {line.number} is not a JSON object: {error}"
        ) from None
    except RecursionError:
        raise LineError("invalid_json", f"line {line.number} is nested too deeply") from None
    custom_id = found.custom_id
    if not isinstance(custom_id, str) or not custom_id:
        raise LineError("invalid_request", f"custom_id: must be text, got {custom_id!r:.60}")

    def refuse(field: str, problem: str, code: str = "invalid_request") -> LineError:
        return LineError(code, f"{field}: {problem}", custom_id)

    if found.method != "POST":
        raise refuse("method", f'must be "POST", got {found.method!r:.60}')
    if found.url not in URLS:
        raise refuse(
            "url", f"must be one of {', '.join(URLS)}; got {found.url!r:.60}", "unsupported_url"
        )
    if not found.body:
        raise refuse("body", "is required")
    try:
        body = _body_decoder.decode(found.body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise refuse("body", "must be a JSON object") from None
    if body.stream not in (None, False):
        raise refuse("body.stream", "must be false: a line has one answer")
    parts = (body.tools, body.instructions, body.messages, body.prompt, body.input)
    beginning = b"".join(bytes(part) for part in parts)[:ORDER_BYTES]
    return LineRequest(line.id, custom_id, found.url, bytes(found.body), beginning)
