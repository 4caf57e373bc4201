"""The routes of OpenAI's HTTP API, over the calls of the wire contract."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence
from functools import cache
from typing import Any

from fastapi import FastAPI, Request
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.responses import Response

from kvmesh.cluster.errors import UnknownModelError, UnknownPathError
from kvmesh.cluster.ingress.whole_reply import WholeReply
from kvmesh.cluster.openai.body import RequestBody, read_body
from kvmesh.cluster.openai.call import KV_BYTES, Contract, EventSource, HttpCall, reply
from kvmesh.cluster.openai.chat import ChatBody
from kvmesh.cluster.openai.chat_reply import chat_chunks, chat_reply
from kvmesh.cluster.openai.completions import (
    CompletionBody,
    CompletionChunks,
    Echo,
    completion_reply,
)
from kvmesh.cluster.openai.failures import error_headers, error_reply
from kvmesh.cluster.openai.names import openai_names, prompt_names
from kvmesh.cluster.openai.response_stream import ResponseStream
from kvmesh.cluster.openai.responses import ResponseBody
from kvmesh.cluster.openai.text_calls import (
    DetokenizeBody,
    Detokenized,
    ModelList,
    ServerHealth,
    ServerVersion,
    TokenizeBody,
    Tokenized,
    model_card,
)
from kvmesh.cluster.openai.usage import RunningUsage
from kvmesh.v1 import kvmesh_pb2 as pb

CALL = "kvmesh.call"  # where the front puts the HttpCall in the scope
# Answered without a key, as probes have none. They send no body either: none is received.
KEYLESS = frozenset({("GET", "/health"), ("HEAD", "/health")})

_SCHEMAS = "#/components/schemas/"  # where a document's references lead

Operation = Callable[[HttpCall], Awaitable[Response]]


class _OpenAIApp(FastAPI):
    def openapi(self) -> dict[str, Any]:
        """With the bodies, which the routes read themselves."""
        made = self.openapi_schema is not None
        document = super().openapi()
        if not made:
            document.setdefault("components", {}).setdefault("schemas", {}).update(_schemas())
        return document


def openai_app(contract: Contract, version: str) -> FastAPI:
    """The application; the front gives it the HttpCall of each request.

    version: of the server
    """
    app = _OpenAIApp(title="kvmesh", version=version, docs_url=None, redoc_url=None)
    api = OpenAIRoutes(contract, version)

    def route(method: str, path: str, operation: Operation, body: type[RequestBody] | None) -> None:
        async def handle(request: Request) -> Response:
            call: HttpCall = request.scope[CALL]
            try:
                return await operation(call)
            except Exception as error:
                return call.failed(error)

        schema = {"$ref": f"{_SCHEMAS}{body.__name__}"} if body else None
        content = {"application/json": {"schema": schema}}
        app.add_api_route(
            path,
            handle,
            methods=[method],
            name=operation.__name__,
            summary=(operation.__doc__ or "").splitlines()[0],
            response_class=Response,
            openapi_extra={"requestBody": {"content": content}} if schema else None,
        )

    route("POST", "/v1/chat/completions", api.chat, ChatBody)
    route("POST", "/v1/completions", api.complete, CompletionBody)
    route("POST", "/v1/responses", api.respond, ResponseBody)
    route("POST", "/tokenize", api.tokenize, TokenizeBody)
    route("POST", "/detokenize", api.detokenize, DetokenizeBody)
    route("GET", "/v1/models", api.models, None)
    route("GET", "/version", api.version, None)
    for method in ("GET", "HEAD"):
        route(method, "/health", api.health, None)

    @app.get("/v1/models/{name:path}", response_class=Response)
    async def model(request: Request, name: str) -> Response:
        """One model, by its name."""
        call: HttpCall = request.scope[CALL]
        try:
            return await api.model(call, name)
        except Exception as error:
            return call.failed(error)

    @app.exception_handler(HTTPException)
    async def no_route(request: Request, error: HTTPException) -> Response:
        call: HttpCall = request.scope[CALL]
        failure, _ = call.fail(UnknownPathError(request.method, request.url.path))
        status = error.status_code
        headers = {**error_headers(failure, status), **(error.headers or {})}
        return reply(error_reply(failure, status), status, headers)

    return app


@cache
def _schemas() -> dict[str, Any]:
    """Of the bodies and what they consist of, by name, for clients; making them takes time."""
    bodies = (ChatBody, CompletionBody, ResponseBody, TokenizeBody, DetokenizeBody)
    _, found = models_json_schema(
        [(body, "validation") for body in bodies], ref_template=_SCHEMAS + "{model}"
    )
    definitions: dict[str, Any] = found["$defs"]
    return definitions


class OpenAIRoutes:
    """What each route does with a call."""

    def __init__(self, contract: Contract, version: str) -> None:
        self._contract = contract
        self._version = version
        self._started_s = int(time.time())

    async def chat(self, call: HttpCall) -> Response:
        """Create a chat completion."""

        def parse(data: bytes) -> tuple[ChatBody, pb.GenerateRequest]:
            body = read_body(ChatBody, data)
            return body, body.to_contract(call.headers, call.request_id)

        body, request = await call.read(parse)
        with openai_names(body.renames):
            source = await self._begin(call, [request])
            if body.stream:
                return call.stream(source, chat_chunks(body, source), body.renames)
            (generated,), usage = await _replies(source, 1)
        return reply(chat_reply(body, generated, usage.final), headers=_kv_bytes(usage))

    async def complete(self, call: HttpCall) -> Response:
        """Create a completion of one prompt or several."""

        def parse(data: bytes) -> tuple[CompletionBody, list[pb.GenerateRequest]]:
            body = read_body(CompletionBody, data)
            return body, body.to_contract(call.headers, call.request_id)

        body, requests = await call.read(parse)
        with openai_names(body.renames):
            places = body.places(len(requests))
            echoes = [
                await self._echo(body, request, call.tenant, place)
                for request, place in zip(requests, places, strict=True)
            ]
            source = await self._begin(call, requests, places)
            if body.stream:
                chunks = CompletionChunks(body, call.request_id, echoes)
                return call.stream(source, chunks.read(source), body.renames)
            generated, usage = await _replies(source, len(requests))
        found = completion_reply(body, call.request_id, generated, echoes, usage.final)
        return reply(found, headers=_kv_bytes(usage))

    async def respond(self, call: HttpCall) -> Response:
        """Create a response, which is not stored."""

        def parse(data: bytes) -> tuple[ResponseBody, pb.GenerateRequest]:
            body = read_body(ResponseBody, data)
            return body, body.to_contract(call.headers, call.request_id)

        body, request = await call.read(parse)
        made = ResponseStream(body, call.request_id)
        with openai_names(body.renames):
            source = await self._begin(call, [request])
            if body.stream:
                return call.stream(source, made.read(source), body.renames)
            found, usage = await made.whole(source)
        return reply(found, headers=_kv_bytes(usage))

    async def tokenize(self, call: HttpCall) -> Response:
        """The token ids of a prompt or a chat."""

        def parse(data: bytes) -> pb.TokenizeRequest:
            return read_body(TokenizeBody, data).to_contract()

        with openai_names():
            found = await self._contract.questions.tokenize(await call.read(parse), call.tenant)
        ids = list(found.token_ids)
        return reply(Tokenized(ids, len(ids), found.max_model_len))

    async def detokenize(self, call: HttpCall) -> Response:
        """The text of token ids."""

        def parse(data: bytes) -> pb.DetokenizeRequest:
            return read_body(DetokenizeBody, data).to_contract()

        with openai_names(((r"^token_ids(\.ids)?", "tokens"),)):
            found = await self._contract.questions.detokenize(await call.read(parse), call.tenant)
        return reply(Detokenized(found.text))

    async def models(self, call: HttpCall) -> Response:
        """The served model."""
        info = await self._contract.questions.get_model_info(pb.GetModelInfoRequest(), call.tenant)
        return reply(ModelList([model_card(info, self._started_s)]))

    async def model(self, call: HttpCall, name: str) -> Response:
        info = await self._contract.questions.get_model_info(pb.GetModelInfoRequest(), call.tenant)
        if name != info.model:
            raise UnknownModelError(name, info.model)
        return reply(model_card(info, self._started_s))

    async def version(self, call: HttpCall) -> Response:
        """The server's version."""
        return reply(ServerVersion(self._version))

    async def health(self, call: HttpCall) -> Response:
        """Whether requests can be served; needs no key."""
        ready = self._contract.ready
        return reply(ServerHealth("ok" if ready else "not ready"), 200 if ready else 503)

    async def _echo(
        self, body: CompletionBody, request: pb.GenerateRequest, tenant: str, place: str
    ) -> Echo:
        """What the choices of a prompt begin with. place: of the prompt in the body"""
        if not body.echo:
            return Echo()
        prompt = request.prompt
        ids = list(prompt.token_ids.ids)
        with openai_names(prompt_names(place)):
            if prompt.text and body.logprobs is not None:
                wanted = pb.TokenizeRequest(prompt=prompt, model=request.model)
                ids = list((await self._contract.questions.tokenize(wanted, tenant)).token_ids)
            text, first = prompt.text, None
            if ids:
                # All of them only for their text.
                wanted_ids = ids[:1] if text else ids
                skip = body.skip_special_tokens is not False
                asked = pb.DetokenizeRequest(token_ids=wanted_ids, skip_special_tokens=skip)
                shown = await self._contract.questions.detokenize(asked, tenant)
                text = text or shown.text
                first = shown.token_bytes[0] if body.logprobs is not None else None
        return Echo(text, first)

    async def _begin(
        self, call: HttpCall, requests: Sequence[pb.GenerateRequest], places: Sequence[str] = ()
    ) -> EventSource:
        source = await call.events(self._contract, requests, places)
        await source.begin()
        return source


async def _replies(
    source: EventSource, number: int
) -> tuple[list[pb.GenerateResponse], RunningUsage]:
    """The whole output of each prompt, and what all have used."""
    wholes, usage = [WholeReply() for _ in range(number)], RunningUsage()
    async for index, event in source:
        wholes[index].add(event)
        usage.note(index, event)
    return [whole.reply() for whole in wholes], usage


def _kv_bytes(usage: RunningUsage) -> dict[str, str]:
    return {KV_BYTES: str(usage.kv_bytes)}
