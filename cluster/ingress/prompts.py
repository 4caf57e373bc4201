"""Prompts as token ids and page hashes; what takes long is computed outside the event loop.

The tokenizer and the hashes release the interpreter's lock while they work. Long prompts are
computed in LONG_THREADS threads, one at a time of each tenant, so that nobody has all of them.
Chats have a thread of their own, because a template may take long, and those with a template of
their own another one, which tenants have in turn, too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import numpy as np

from kvmesh.cluster.ingress import served, validate, wire
from kvmesh.cluster.ingress.codec import TextCodec
from kvmesh.cluster.ingress.model_checks import PROMPT_IDS, check_ids
from kvmesh.cluster.ingress.refuse import refuse
from kvmesh.cluster.ingress.tenant_threads import TenantThreads
from kvmesh.cluster.reports import ClusterStatus
from kvmesh.v1 import kvmesh_pb2 as pb
from kvmesh.workers.errors import InvalidFieldError
from kvmesh.workers.freed_memory import return_memory
from kvmesh.workers.loads import EngineInfo
from kvmesh.workers.model.chat import Conversation
from kvmesh.workers.prefix_cache import PageDigests
from kvmesh.workers.request import TokenIds

LONG_TEXT_CHARS = 4096  # tokenising longer texts would delay every stream
LONG_PROMPT_TOKENS = 1 << 16  # and so would hashing longer prompts
LONG_THREADS = 2

T = TypeVar("T")


class Prompts:
    """All methods belong to one event loop."""

    def __init__(self, codec: TextCodec, limits: validate.Limits) -> None:
        self._codec = codec
        max_long = limits.max_waiting_prompts
        self._long = TenantThreads(LONG_THREADS, "long prompts", max_long)
        self._chats = TenantThreads(1, "chats", limits.max_waiting_chats)
        self._given_chats = TenantThreads(1, "chats with templates", max_long)

    async def of(self, prompt: pb.Prompt, tenant: str, status: ClusterStatus) -> TokenIds:
        """Token ids of a prompt on the wire. Raises what the methods below raise."""
        self.check_length(prompt, status)
        return await self.encode(validate.prompt(prompt), tenant, status)

    def check_length(self, prompt: pb.Prompt, status: ClusterStatus) -> None:
        """Refuse a prompt that no context can hold, before anything is computed from it.

        Raises ContextExceededError.
        """
        tokens = len(prompt.token_ids.ids)
        if not tokens:
            chars = len(prompt.text) + sum(
                len(message.content) + sum(len(part.text) for part in message.parts)
                for message in prompt.chat.messages
            )
            tokens = -(-chars // self._codec.max_token_chars)
        if tokens > served.longest_context(status, tokens):
            raise served.context_exceeded(tokens, status)

    async def encode(self, prompt: validate.Prompt, tenant: str, status: ClusterStatus) -> TokenIds:
        """Token ids of a prompt that has passed `check_length`.

        Raises InvalidFieldError for ids that the model does not have and for chats that its
        template refuses, and IngressBusyError if too much of the tenant waits for a thread.
        """
        if isinstance(prompt, np.ndarray):
            vocab_size = served.any_info(status).vocab_size
            unused = self._codec.unused_token_ids
            check_ids(PROMPT_IDS, prompt, vocab_size, unused)
            return prompt
        if isinstance(prompt, str):
            if len(prompt) < LONG_TEXT_CHARS:
                return self._codec.encode(prompt)
            return await self._run_long(tenant, lambda: self._codec.encode(prompt))
        return await self._encode_chat(prompt, tenant, status)

    async def decode(
        self, request: pb.DetokenizeRequest, tenant: str, status: ClusterStatus
    ) -> pb.DetokenizeResponse:
        """The text of token ids, and what each adds to it."""
        vocab_size, ids = served.any_info(status).vocab_size, request.token_ids
        array = np.array(ids, dtype=np.int64)
        check_ids("token_ids", array, vocab_size, self._codec.unused_token_ids)
        skip = request.skip_special_tokens

        def decode() -> pb.DetokenizeResponse:
            stream = self._codec.stream((), skip)
            text = stream.push(ids) + stream.flush()
            pieces = [wire.shown_bytes(token_id, self._codec, skip) for token_id in ids]
            return pb.DetokenizeResponse(text=text, token_bytes=pieces)

        if len(ids) < LONG_TEXT_CHARS:
            return decode()
        return await self._run_long(tenant, decode)

    async def page_hashes(
        self, ids: TokenIds, tenant: str, salt: str, info: EngineInfo
    ) -> tuple[bytes, ...]:
        """Hashes of the prompt's full pages, as in the prefix caches of engines like this one."""
        if not info.prefix_cache:
            return ()
        page_size = info.geometry.page_size
        digests = PageDigests(page_size, cache_salt(tenant, salt))
        pages = len(ids) // page_size
        if len(ids) < LONG_PROMPT_TOKENS:
            return tuple(digests.upto(ids, pages))
        return await self._run_long(tenant, lambda: tuple(digests.upto(ids, pages)))

    def close(self) -> None:
        """Wait for nothing: what runs ends by itself."""
        for threads in (self._long, self._chats, self._given_chats):
            threads.close()

    async def _encode_chat(
        self, chat: Conversation, tenant: str, status: ClusterStatus
    ) -> TokenIds:
        if not self._codec.chat_template_names and not chat.template:
            refuse("prompt.chat", "must not be set: the model has no chat template; send text")

        def encode() -> TokenIds:
            pieces = self._codec.render_chat(chat)
            chars = sum(len(piece.text) for piece in pieces)
            tokens = -(-chars // self._codec.max_token_chars)
            if tokens > served.longest_context(status, tokens):
                raise served.context_exceeded(tokens, status)
            return self._codec.encode_pieces(pieces)

        def encode_and_clean() -> TokenIds:
            ids = encode()
            if len(ids) > LONG_PROMPT_TOKENS:
                return_memory()
            return ids

        try:
            if chat.template:
                return await self._given_chats.run(tenant, partial(_returning_memory, encode))
            return await self._chats.run(tenant, encode_and_clean)
        except InvalidFieldError as error:
            refuse(f"prompt.chat.{error.field}", error.message)

    async def _run_long(self, tenant: str, work: Callable[[], T]) -> T:
        return await self._long.run(tenant, partial(_returning_memory, work))


def _returning_memory(work: Callable[[], T]) -> T:
    try:
        return work()
    finally:
        return_memory()


def cache_salt(tenant: str, salt: str) -> str:
    """Prompts with different salts share no cached pages.

    Otherwise the time to the first token would reveal that another tenant sent the same text.
    Each part is hashed with its length, so that no two pairs are alike.
    """
    digest = hashlib.sha256()
    for part in (tenant.encode(), salt.encode()):
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()
