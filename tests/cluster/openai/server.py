"""The HTTP front over real connections, and a contract that follows a script."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx2
import openai
import uvicorn
from uvicorn.server import ServerState

from kvmesh.cluster.http_front import HttpFront
from kvmesh.cluster.ingress.authenticate import Authenticator, Caller, KnownKey, hash_key
from kvmesh.cluster.ingress.validate import Limits
from kvmesh.cluster.openai.call import Contract
from kvmesh.cluster.reception import Reception
from kvmesh.cluster.telemetry.meters import IngressMeters
from kvmesh.v1 import kvmesh_pb2 as pb
from tests.cluster.machine import SeenMeters

KEY = "the-key"
TENANT = "tenant"
MODEL = "tiny"
MAX_BYTES = 200_000
MAX_CALLS = 20

Event = pb.GenerateStreamResponse
Script = Callable[[pb.GenerateRequest], Iterable[Event | Exception | asyncio.Event]]


def started(request: pb.GenerateRequest, prompt_tokens: int = 5, kv_bytes: int = 4096) -> Event:
    return Event(
        started=pb.Started(
            request_id=request.request_id,
            model=MODEL,
            model_revision="r1",
            group="engine-0",
            kv_format="int8",
            seed=7,
            prompt_tokens=prompt_tokens,
            kv_reserved_bytes=kv_bytes,
        )
    )


def delta(text: str, index: int = 0, **fields: Any) -> Event:
    fields.setdefault("token_ids", [1] * max(len(text.split()), 1))
    return Event(delta=pb.Delta(index=index, text=text, **fields))


def finished(
    index: int = 0, reason: pb.FinishReason.ValueType = pb.FINISH_REASON_STOP, **fields: Any
) -> Event:
    return Event(choice_finished=pb.ChoiceFinished(index=index, finish_reason=reason, **fields))


def usage(prompt_tokens: int = 5, completion_tokens: int = 2) -> Event:
    return Event(
        usage=pb.Usage(
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            cached_tokens=3,
            kv_reserved_bytes=4096,
            kv_used_bytes=2048,
            group="engine-0",
            kv_format="int8",
            total_s=0.5,
            time_to_first_token_s=0.25,
        )
    )


def words(*texts: str) -> Script:
    """One choice for each of n, with these texts as deltas."""

    def play(request: pb.GenerateRequest) -> Iterable[Event]:
        n = request.sampling_params.n or 1
        yield started(request)
        for index in range(n):
            for text in texts:
                yield delta(text, index)
        for index in range(n):
            yield finished(index)
        yield usage(completion_tokens=n * len(texts))

    return play


@dataclass
class ScriptedContract:
    """Plays a script for every generation, and keeps the requests.

    An event of asyncio in a script is waited for. ended: generations that are over, however
    """

    script: Script = field(default_factory=lambda: words("Hello", " there."))
    requests: list[Any] = field(default_factory=list)
    ended: int = 0
    ready: bool = True

    @property
    def questions(self) -> ScriptedContract:
        return self

    async def generate_stream(
        self, request: pb.GenerateRequest, tenant: str
    ) -> AsyncGenerator[Event, None]:
        assert tenant == TENANT
        self.requests.append(request)
        try:
            for step in self.script(request):
                if isinstance(step, Exception):
                    raise step
                if isinstance(step, asyncio.Event):
                    await step.wait()
                else:
                    yield step
        finally:
            self.ended += 1

    async def tokenize(self, request: pb.TokenizeRequest, tenant: str) -> pb.TokenizeResponse:
        self.requests.append(request)
        return pb.TokenizeResponse(token_ids=[1, 2, 3], max_model_len=2048)

    async def detokenize(self, request: pb.DetokenizeRequest, tenant: str) -> pb.DetokenizeResponse:
        """Each id is a letter; 0 is a special token."""
        self.requests.append(request)
        special = b"" if request.skip_special_tokens else b"@"
        pieces = [bytes([64 + i]) if i else special for i in request.token_ids]
        return pb.DetokenizeResponse(text=b"".join(pieces).decode(), token_bytes=pieces)

    async def get_model_info(
        self, request: pb.GetModelInfoRequest, tenant: str
    ) -> pb.GetModelInfoResponse:
        groups = [pb.GroupInfo(group="engine-0", kv_format="int8")]
        return pb.GetModelInfoResponse(
            model=MODEL, model_revision="r1", max_model_len=2048, groups=groups
        )


@dataclass
class HttpServer:
    url: str
    front: HttpFront
    meters: SeenMeters
    http: httpx2.AsyncClient

    def client(self, key: str = KEY, **options: Any) -> Any:
        """OpenAI's own, without its types: requests here have fields that they do not know."""
        options.setdefault("max_retries", 0)
        options.setdefault("http_client", openai.DefaultAsyncHttpxClient(verify=False))
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key=key, **options)

    async def post(self, path: str, body: Any, **headers: str) -> httpx2.Response:
        """A request with the key. body: bytes, or what is sent as JSON"""
        content = {"content": body} if isinstance(body, bytes) else {"json": body}
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        return await self.http.post(path, headers=headers, **content)

    async def events(self, path: str, body: Any) -> list[str]:
        """The lines of a stream that are not empty."""
        async with self.http.stream("POST", path, json=body) as reply:
            assert reply.status_code == 200, await reply.aread()
            return [line async for line in reply.aiter_lines() if line]


@asynccontextmanager
async def http_server(
    contract: Contract,
    limits: Limits | None = None,
    tenants: Sequence[str] = (TENANT,),
    origins: Sequence[str] = (),
) -> AsyncIterator[HttpServer]:
    keys = [KnownKey(hash_key(KEY), Caller(tenant)) for tenant in tenants]
    meters = SeenMeters()
    front = HttpFront(
        contract,
        "1.2.3",
        Reception(Authenticator(keys).authenticate, MAX_CALLS),
        limits or Limits(max_request_bytes=MAX_BYTES),
        IngressMeters(meters, [TENANT]),
        origins,
    )
    # Uvicorn's protocol without its server, whose clock has a tenth of a second.
    config = uvicorn.Config(front, log_config=None, access_log=False, lifespan="off")
    config.load()
    state = ServerState()

    def connected() -> asyncio.Protocol:
        protocol: Any = config.http_protocol_class
        made: asyncio.Protocol = protocol(config=config, server_state=state, app_state={})
        return made

    listener = await asyncio.get_running_loop().create_server(connected, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
    headers = {"authorization": f"Bearer {KEY}"}
    try:
        # Without TLS; loading the certificates of all authorities takes longer than most tests.
        async with httpx2.AsyncClient(
            base_url=url, headers=headers, timeout=60.0, verify=False
        ) as http:
            yield HttpServer(url, front, meters, http)
    finally:
        listener.close()
        for task in state.tasks:
            task.cancel()
        await asyncio.gather(*state.tasks, return_exceptions=True)
