"""Server-sent events: chunks of a stream, and comments that keep proxies awake."""

from __future__ import annotations

import msgspec

from kvmesh.v1 import kvmesh_pb2 as pb

DONE = b"data: [DONE]\n\n"
_encode = msgspec.json.Encoder().encode


def data(payload: msgspec.Struct) -> bytes:
    return b"data: " + _encode(payload) + b"\n\n"


def named(event: str, payload: msgspec.Struct) -> bytes:
    """An event with a name, as streams of responses have them."""
    return b"event: " + event.encode() + b"\n" + data(payload)


def comment(event: pb.GenerateStreamResponse) -> bytes | None:
    """What a stream says while it has no output; None for any other event."""
    match event.WhichOneof("event"):
        case "queued":
            text = f"queued position={event.queued.position}"
            if event.queued.HasField("projected_wait_s"):
                text += f" projected_wait_s={event.queued.projected_wait_s:.1f}"
        case "prefilling":
            text = f"prefilling {event.prefilling.computed_tokens}/{event.prefilling.total_tokens}"
        case None:
            text = "reading the prompt"
        case _:
            return None
    return f": {text}\n\n".encode()
