"""How an Error travels in a call's status, both directions.

The details text is a sentence, and on its last line the serialised Error:

    prompt is empty
    kvmesh-error: CAMQARoP...

The wire contract (kvmesh.proto, "Errors") says why it is the text that carries it.
"""

from __future__ import annotations

import base64
import binascii

from google.protobuf.message import DecodeError

from kvmesh.protos import pb

MARK = "kvmesh-error: "
MAX_ERROR_BYTES = 2048
MAX_SENTENCE_CHARS = 300
_MAX_NAME_CHARS = 64


def encode_details(error: pb.Error) -> str:
    """The details text of a failed call; shortens what would not fit.

    At most MAX_ERROR_BYTES are serialised: texts are cut first, then verdicts
    of groups are left out, then field violations but the first.
    """
    fitting = pb.Error()
    fitting.CopyFrom(error)
    fitting.message = fitting.message[:MAX_SENTENCE_CHARS]
    fitting.request_id = fitting.request_id[:_MAX_NAME_CHARS]
    for violation in fitting.field_violations:
        violation.field = violation.field[:_MAX_NAME_CHARS]
        violation.description = violation.description[: MAX_SENTENCE_CHARS // 2]
    for verdict in fitting.groups:
        verdict.group = verdict.group[:_MAX_NAME_CHARS]
        verdict.reason = verdict.reason[: MAX_SENTENCE_CHARS // 2]
    while fitting.groups and fitting.ByteSize() > MAX_ERROR_BYTES:
        del fitting.groups[-1]
    while len(fitting.field_violations) > 1 and fitting.ByteSize() > MAX_ERROR_BYTES:
        del fitting.field_violations[-1]
    sentence = " ".join(fitting.message.split())
    tail = base64.b64encode(fitting.SerializeToString()).decode("ascii")
    return f"{sentence}\n{MARK}{tail}"


def decode_details(details: str) -> tuple[str, pb.Error | None]:
    """The sentence of a details text, and its Error if it carries one."""
    sentence, mark, tail = details.rpartition(MARK)
    if not mark:
        return details, None
    try:
        return sentence.rstrip("\n"), pb.Error.FromString(base64.b64decode(tail, validate=True))
    except (binascii.Error, DecodeError):
        return details, None
