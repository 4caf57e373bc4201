"""Where a stream stopped, as a text that another process can continue from.

    kvmesh-cursor-1.<request>.<received>

Both parts are messages in URL-safe base64: the request, whose `resume` has the model_revision
if the stream has started, and the output that was received. The contract ("Resuming a stream")
says why the output itself is the cursor. It contains no API key.
"""

from __future__ import annotations

import base64

from google.protobuf.message import DecodeError

from kvmesh.client.errors import InvalidRequestError
from kvmesh.protos import pb

_VERSION = "kvmesh-cursor-1"


def encode_cursor(request: pb.GenerateRequest, received: pb.GenerateResponse) -> str:
    parts = (message.SerializeToString() for message in (request, received))
    return ".".join([_VERSION, *(base64.urlsafe_b64encode(part).decode("ascii") for part in parts)])


def decode_cursor(cursor: str) -> tuple[pb.GenerateRequest, pb.GenerateResponse]:
    """Raises InvalidRequestError for anything but a cursor of this version."""
    if not isinstance(cursor, str):
        raise InvalidRequestError.of("cursor", f"expected a stream's cursor, got {cursor!r:.60}")
    version, *parts = cursor.split(".")
    if version != _VERSION or len(parts) != 2:
        raise InvalidRequestError.of(
            "cursor", f"expected a stream's cursor ({_VERSION}.…), got {cursor!r:.60}"
        )
    try:
        request, received = (base64.b64decode(part, b"-_", validate=True) for part in parts)
        return pb.GenerateRequest.FromString(request), pb.GenerateResponse.FromString(received)
    except (ValueError, DecodeError) as error:
        raise InvalidRequestError.of("cursor", f"is damaged: {error}") from error
