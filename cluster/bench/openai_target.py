"""A server with OpenAI's API, over HTTP: kvmesh's own, vLLM, SGLang, llama.cpp and others."""

from __future__ import annotations

import contextlib
import json
import urllib.parse
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing
from types import TracebackType
from typing import Any, Final, Literal, Self

import aiohttp

from kvmesh.cluster.bench.targets import OutputChunk, Prompt, ReplyFailed, TokenCounts

Endpoint = Literal["completions", "chat"]

_PATHS: Final[Mapping[str, str]] = {"completions": "/completions", "chat": "/chat/completions"}
# What a chunk of a chat may have besides `content`, by server.
_CHAT_OUTPUT: Final = ("content", "reasoning_content", "reasoning", "tool_calls")
_MAX_SHOWN: Final = 200


class OpenAITarget:
    """An async context manager.

    base_url: e.g. http://localhost:8000/v1; /v1 is added if it has no path
    model: None asks the server, and takes the first one
    endpoint: completions takes token ids and text, chat one message of a user
    ignore_eos: sent only if true, because not every server knows it
    timeout_s: of a request, None: no limit
    """

    def __init__(
        self,
        base_url: str,
        *,
        model: str | None,
        api_key: str | None,
        endpoint: Endpoint,
        temperature: float,
        ignore_eos: bool,
        timeout_s: float | None,
    ) -> None:
        self._base_url = _with_path(base_url)
        self._model = model
        self._endpoint = endpoint
        self._temperature = temperature
        self._ignore_eos = ignore_eos
        self._timeout = aiohttp.ClientTimeout(total=timeout_s)
        self._headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        # Requests must not wait for a connection, nor share one that the server closes.
        connector = aiohttp.TCPConnector(limit=0)
        self._session = aiohttp.ClientSession(
            connector=connector, timeout=self._timeout, headers=self._headers
        )
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._open.close()

    @property
    def _open(self) -> aiohttp.ClientSession:
        assert self._session is not None, "it is used in an async with block"
        return self._session

    @property
    def name(self) -> str:
        return f"{self._model or 'a model'} at {self._base_url}, {self._endpoint}"

    async def find_model(self) -> None:
        """Choose the model to name in requests. Raises ReplyFailed."""
        if self._model is None:
            url = f"{self._base_url}/models"
            async with _errors_as_failures(), self._open.get(url) as response:
                await _check(response)
                listed = _object(await response.text()).get("data") or [{}]
                self._model = str(listed[0].get("id", ""))

    async def reply(
        self, prompt: Prompt, output_tokens: int
    ) -> AsyncGenerator[OutputChunk | TokenCounts, None]:
        body = self._body(prompt, output_tokens)
        url = self._base_url + _PATHS[self._endpoint]
        async with _errors_as_failures(), self._open.post(url, json=body) as response:
            await _check(response)
            finished = False
            async with aclosing(_events(response.content.iter_any())) as events:
                async for data in events:
                    if data == "[DONE]":
                        finished = True
                        break
                    chunk = _object(data)
                    if chunk.get("error"):
                        raise _failure(200, chunk)
                    for choice in chunk.get("choices") or ():
                        finished = finished or bool(choice.get("finish_reason"))
                        if _has_output(choice):
                            yield OutputChunk()
                    if usage := chunk.get("usage"):
                        yield _counts(usage)
            if not finished:
                raise ReplyFailed("stream broken", "the stream ended without a finish_reason")

    def _body(self, prompt: Prompt, output_tokens: int) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self._model or "",
            "stream": True,
            "stream_options": {"include_usage": True},
            "temperature": self._temperature,
            "max_tokens": output_tokens,
        }
        if self._ignore_eos:
            body["ignore_eos"] = True
        if self._endpoint == "completions":
            return {**body, "prompt": prompt}
        assert isinstance(prompt, str), "chats are made of words"
        return {**body, "messages": [{"role": "user", "content": prompt}]}


def _with_path(url: str) -> str:
    """Raises ValueError unless it is an address over HTTP."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise ValueError(f"must be an address such as http://localhost:8000/v1, got {url!r}")
    return url.rstrip("/") if parts.path.strip("/") else f"{url.rstrip('/')}/v1"


def _has_output(choice: Mapping[str, Any]) -> bool:
    """Whether it carries new output, and not only a role or a finish_reason."""
    if "delta" not in choice:
        return bool(choice.get("text"))
    delta = choice["delta"] or {}
    return any(delta.get(name) for name in _CHAT_OUTPUT)


def _counts(usage: Mapping[str, Any]) -> TokenCounts:
    details = usage.get("prompt_tokens_details") or {}
    return TokenCounts(
        int(usage.get("prompt_tokens") or 0),
        int(usage.get("completion_tokens") or 0),
        int(details.get("cached_tokens") or 0),
    )


async def _events(pieces: AsyncIterator[bytes]) -> AsyncGenerator[str, None]:
    """The data of server-sent events. pieces: as they arrive, cut anywhere"""
    rest = b""
    async for piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip().decode("utf-8", "replace")


def _object(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ReplyFailed("not JSON", f"expected a JSON object, got {text[:_MAX_SHOWN]!r}")
    return found


async def _check(response: aiohttp.ClientResponse) -> None:
    if response.status == 200:
        return
    text = await response.text(errors="replace")
    try:
        found = json.loads(text)
    except ValueError:
        found = {"error": text[:_MAX_SHOWN]}
    raise _failure(response.status, found if isinstance(found, dict) else {"error": found})


def _failure(status: int, found: Mapping[str, Any]) -> ReplyFailed:
    """found: the body of an error, whose shape differs between servers"""
    error = found.get("error", found)
    code, message = None, error
    if isinstance(error, dict):
        code, message = error.get("code") or error.get("type"), error.get("message", error)
    code = "" if code is None or str(code) == str(status) else f" {code}"
    return ReplyFailed(f"HTTP {status}{code}", str(message)[: 2 * _MAX_SHOWN])


@contextlib.asynccontextmanager
async def _errors_as_failures() -> AsyncIterator[None]:
    """Raise what aiohttp raises as ReplyFailed."""
    try:
        yield
    except TimeoutError as error:
        raise ReplyFailed("timeout", "the time of the request ran out") from error
    except aiohttp.ClientError as error:
        raise ReplyFailed(type(error).__name__, str(error) or repr(error)) from error
