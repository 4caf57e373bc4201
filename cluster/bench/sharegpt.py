"""Prompts and output lengths from a ShareGPT file."""

from __future__ import annotations

import json
import random
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, Final

from kvmesh.cluster.bench.lengths import SHAREGPT_LONGEST
from kvmesh.cluster.bench.workload import BenchRequest

MIN_TOKENS: Final = 4  # of a prompt and of an output, as in vLLM's filter
CountTokens = Callable[[str], Awaitable[int]]


async def sharegpt_requests(
    path: Path, count: int, seed: int, count_tokens: CountTokens
) -> list[BenchRequest]:
    """`count` first turns of conversations in random order: the prompt, and as long an output.

    Those with fewer than 4 tokens, prompts of more than 1,024 and conversations of more than
    2,048 tokens are left out, as in `vllm bench serve`.

    count_tokens: of a text, as the server's model would have them
    Raises ValueError with what is wrong with the file, or if it has fewer requests.
    """
    turns = list(_first_turns(path))
    random.Random(seed).shuffle(turns)
    requests: list[BenchRequest] = []
    for prompt, answer in turns:
        if len(requests) == count:
            break
        prompt_tokens = await count_tokens(prompt)
        output_tokens = await count_tokens(answer)
        if (
            min(prompt_tokens, output_tokens) >= MIN_TOKENS
            and prompt_tokens <= SHAREGPT_LONGEST // 2
            and prompt_tokens + output_tokens <= SHAREGPT_LONGEST
        ):
            number = len(requests)
            requests.append(BenchRequest(number, prompt_tokens, output_tokens, text=prompt))
    if len(requests) < count:
        raise ValueError(
            f"{path} has {len(requests)} conversations of suitable lengths; ask for as many with "
            f"--requests, got {count}"
        )
    return requests


def _first_turns(path: Path) -> Iterator[tuple[str, str]]:
    """The first message and its answer of every conversation that has both."""
    expected = (
        "expected a ShareGPT file: a JSON list of objects with `conversations`, a list of "
        "{from, value}"
    )
    try:
        found = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {expected}; it is not JSON: {error}") from error
    if not isinstance(found, list):
        raise ValueError(f"{path}: {expected}")
    for number, entry in enumerate(found):
        talk: Any = entry.get("conversations") if isinstance(entry, dict) else None
        if not isinstance(talk, list):
            raise ValueError(f"{path}, entry {number}: {expected}")
        texts = [turn.get("value") if isinstance(turn, dict) else None for turn in talk[:2]]
        if len(texts) == 2:
            prompt, answer = texts
            if not isinstance(prompt, str) or not isinstance(answer, str):
                raise ValueError(f"{path}, entry {number}: {expected}")
            yield prompt, answer
