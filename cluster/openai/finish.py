"""Why a choice has ended, in OpenAI's words."""

from __future__ import annotations

from dataclasses import dataclass

from kvmesh.v1 import kvmesh_pb2 as pb

# Typed clients know no other reasons than OpenAI's: an aborted choice has stopped, and one
# whose time ran out has reached a limit.
_REASONS: dict[int, str] = {
    pb.FINISH_REASON_STOP: "stop",
    pb.FINISH_REASON_LENGTH: "length",
    pb.FINISH_REASON_TOOL_CALLS: "tool_calls",
    pb.FINISH_REASON_ABORT: "stop",
    pb.FINISH_REASON_DEADLINE: "length",
}


@dataclass(frozen=True, slots=True)
class Finish:
    """stop: the string, or the token's id, that ended it; None if nothing matched"""

    reason: str
    stop: str | int | None


def finish_of(ended: pb.Choice | pb.ChoiceFinished) -> Finish:
    reason = _REASONS[ended.finish_reason]
    match ended.WhichOneof("matched_stop"):
        case "matched_stop_string":
            return Finish(reason, ended.matched_stop_string)
        case "matched_stop_token_id":
            return Finish(reason, ended.matched_stop_token_id)
    return Finish(reason, None)
