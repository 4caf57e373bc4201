"""Fields of the contract by their names in OpenAI's requests, for errors."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence

from kvmesh.workers.errors import InvalidFieldError

# Tried in order; each may change what the ones before have left.
COMMON = (
    (r"^sampling_params\.", ""),
    (r"^prompt\.text$", "prompt"),
    (r"^prompt\.token_ids(\.ids)?", "prompt"),
    (r"\.arguments_json$", ".function.arguments"),
    (r"^prompt\.chat\.tools(\[\d+\])\.parameters_json$", r"tools\1.function.parameters"),
    (r"^prompt\.chat\.tools(\[\d+\])\.(name|description)$", r"tools\1.function.\2"),
    (r"(tool_calls\[\d+\])\.name$", r"\1.function.name"),
    (r"\.parts\[", ".content["),
    (r"^prompt\.chat\.tool_choice\.name$", "tool_choice.function.name"),
    (r"^prompt\.chat\.", ""),
    (r"^prompt\.chat$", "messages"),
)

Renames = Sequence[tuple[str, str]]


def prompt_names(place: str) -> Renames:
    """For a call about one of several prompts. place: of the prompt, such as prompt[3]"""
    return ((r"^(prompt|token_ids)(?=\[|$)", place),)


def renamed(field: str, renames: Renames) -> str:
    for pattern, name in (*COMMON, *renames):
        field = re.sub(pattern, name, field)
    return field


@contextlib.contextmanager
def openai_names(renames: Renames = ()) -> Iterator[None]:
    """Errors that name a field of the contract name that of OpenAI's request.

    renames: after the common ones, patterns with what takes their place
    """
    try:
        yield
    except InvalidFieldError as error:
        raise type(error)(renamed(error.field, renames), error.message) from error
