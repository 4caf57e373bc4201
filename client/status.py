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
MAX_SENTENCE_CHARS = 500


def encode_details(error: pb.Error) -> str:
    """The details text of a failed call; shortens what would not fit.

    At most MAX_ERROR_BYTES are serialised: verdicts of groups go first, then
    field violations, then the end of the message.
    """
    fitting = pb.Error()
    fitting.CopyFrom(error)
    fitting.message = fitting.message[:MAX_SENTENCE_CHARS]
    for parts in (fitting.groups, fitting.field_violations):
        while parts and fitting.ByteSize() > MAX_ERROR_BYTES:
            del parts[-1]
    if fitting.ByteSize() > MAX_ERROR_BYTES:
        fitting.message = fitting.message[: MAX_SENTENCE_CHARS // 5]
        fitting.request_id = fitting.request_id[: MAX_SENTENCE_CHARS // 5]
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
