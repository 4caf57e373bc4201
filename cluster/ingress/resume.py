"""What a client that resumes a stream already has."""

from __future__ import annotations

from dataclasses import dataclass

from kvmesh.cluster.ingress.refuse import refuse
from kvmesh.v1 import kvmesh_pb2 as pb


@dataclass(frozen=True, slots=True)
class ResumedChoice:
    """Output that a client already has: its tokens, and how many characters of its text, of its
    reasoning and of the arguments of each tool call.

    position: in the request's list, which need not be in the order of the choices
    """

    token_ids: tuple[int, ...] = ()
    text_chars: int = 0
    finished: bool = False
    position: int = 0
    reasoning_chars: int = 0
    tool_arguments_chars: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Resume:
    """choices: one for each index below n; scores: of the prompt, that the client has"""

    model_revision: str
    choices: tuple[ResumedChoice, ...]
    scores: int = 0


def read_resume(wire: pb.Resume, n: int) -> Resume:
    """Raises InvalidFieldError naming the field. n: how many choices the request has"""
    choices = [ResumedChoice()] * n
    seen: set[int] = set()
    for position, choice in enumerate(wire.choices):
        field = f"resume.choices[{position}].index"
        if choice.index >= n:
            refuse(field, f"must be less than n ({n}), got {choice.index}")
        if choice.index in seen:
            refuse(field, f"must be unique, but {choice.index} appears twice")
        seen.add(choice.index)
        choices[choice.index] = ResumedChoice(
            tuple(choice.token_ids),
            choice.text_chars,
            choice.finished,
            position,
            choice.reasoning_chars,
            tuple(choice.tool_arguments_chars),
        )
    return Resume(wire.model_revision, tuple(choices), wire.prompt_logprobs_received)
