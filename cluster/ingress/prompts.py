"""Prompts as token ids and page hashes; large ones are computed outside the event loop."""

from __future__ import annotations

import asyncio

import numpy as np

from kvmesh.cluster.ingress import validate
from kvmesh.cluster.ingress.codec import TextCodec
from kvmesh.workers.loads import EngineInfo
from kvmesh.workers.prefix_cache import PageDigests
from kvmesh.workers.request import TokenIds

LONG_TEXT_CHARS = 4096  # tokenising longer texts would delay every stream
LONG_PROMPT_TOKENS = 1 << 16  # and so would hashing longer prompts


async def encode(prompt: validate.Prompt, codec: TextCodec, vocab_size: int) -> TokenIds:
    """Token ids of a prompt. Raises InvalidFieldError for ids that the model does not have."""
    if isinstance(prompt, np.ndarray):
        validate.check_prompt_ids(prompt, vocab_size)
        return prompt
    if isinstance(prompt, str):
        if len(prompt) < LONG_TEXT_CHARS:
            return codec.encode(prompt)
        return await asyncio.to_thread(codec.encode, prompt)
    turns = [(turn.role, turn.content) for turn in prompt]
    if not codec.has_chat_template:
        validate.refuse("prompt.chat", "must not be set: the model has no chat template; send text")
    try:
        if sum(len(content) for _, content in turns) < LONG_TEXT_CHARS:
            return codec.encode_chat(turns)
        return await asyncio.to_thread(codec.encode_chat, turns)
    except ValueError as error:
        validate.refuse("prompt.chat", str(error))


async def page_hashes(ids: TokenIds, salt: str, info: EngineInfo) -> tuple[bytes, ...]:
    """Hashes of the prompt's full pages, as used by the prefix caches of engines like this one."""
    if not info.prefix_cache:
        return ()
    page_size = info.geometry.page_size
    digests = PageDigests(page_size, salt)
    pages = len(ids) // page_size
    if len(ids) < LONG_PROMPT_TOKENS:
        return tuple(digests.upto(ids, pages))
    return tuple(await asyncio.to_thread(digests.upto, ids, pages))
