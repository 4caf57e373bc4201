"""The calls of the wire contract that generate nothing: everything but the transport.

Each takes a parsed request and the tenant that it is from.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AbstractContextManager

from kvmesh.cluster.ingress import admin_wire, served, validate, wire
from kvmesh.cluster.ingress.codec import TextCodec
from kvmesh.cluster.ingress.estimate import estimate_reply, explain_reply
from kvmesh.cluster.ingress.model_checks import default_max_tokens
from kvmesh.cluster.ingress.prompts import Prompts
from kvmesh.cluster.ingress.quality import accepted_formats
from kvmesh.cluster.ingress.refuse import refuse
from kvmesh.cluster.ingress.router_link import RouterLink
from kvmesh.cluster.ingress.served import Served
from kvmesh.cluster.reports import ClusterStatus
from kvmesh.cluster.routing.request import PlaceRequest
from kvmesh.v1 import kvmesh_pb2 as pb
from kvmesh.v1alpha import admin_pb2 as admin
from kvmesh.workers.model.generation_defaults import DefaultSampling
from kvmesh.workers.sampling_params import RANGES

IDS_AT_ONCE = 1 << 15  # that a reply gets before other calls have their turn


class Questions:
    """Of one ingress process, whose parts these are.

    call: counts an open call; raises DrainingError while the ingress or the cluster drains
    version: of the server
    layout_reason: why the groups have their layout, "" if it was given
    """

    def __init__(
        self,
        served: Served,
        router: RouterLink,
        prompts: Prompts,
        codec: TextCodec,
        limits: validate.Limits,
        call: Callable[[], AbstractContextManager[None]],
        *,
        version: str,
        defaults: DefaultSampling,
        layout_reason: str,
    ) -> None:
        self._served = served
        self._router = router
        self._prompts = prompts
        self._codec = codec
        self._limits = limits
        self._call = call
        self._version = version
        self._defaults = defaults
        self._layout_reason = layout_reason

    async def tokenize(self, request: pb.TokenizeRequest, tenant: str) -> pb.TokenizeResponse:
        with self._call():
            status = self._served.status_for(request.model)
            ids = await self._prompts.of(request.prompt, tenant, status)
            reply = pb.TokenizeResponse(max_model_len=served.max_model_len(status))
            for start in range(0, len(ids), IDS_AT_ONCE):
                reply.token_ids.extend(ids[start : start + IDS_AT_ONCE].tolist())
                await asyncio.sleep(0)  # a million ids take a quarter of a second
            return reply

    async def detokenize(self, request: pb.DetokenizeRequest, tenant: str) -> pb.DetokenizeResponse:
        """The text of token ids, as a generation would have sent it."""
        with self._call():
            status = self._served.status_for(request.model)
            return await self._prompts.decode(request, tenant, status)

    async def abort(self, request: pb.AbortRequest, tenant: str) -> pb.AbortResponse:
        """Abort, by a request id of the caller's own tenant; also while the cluster drains."""
        if not request.request_id:
            refuse("request_id", "must not be empty")
        aborted = await self._router.abort(f"{tenant}/{request.request_id}")
        return pb.AbortResponse(aborted=aborted)

    async def estimate_budget(
        self, request: pb.EstimateBudgetRequest, tenant: str
    ) -> pb.EstimateBudgetResponse:
        with self._call():
            status = self._served.status_for(request.model)
            accepts = accepted_formats(request)
            accepted = served.accepting(status, accepts)
            prompt_tokens, hashes = await self._size(request, tenant, accepted)
            max_tokens = (
                request.max_tokens
                if request.HasField("max_tokens")
                else default_max_tokens(
                    self._limits.default_max_tokens, prompt_tokens, served.max_model_len(accepted)
                )
            )
            n = validate.number_of_choices("n", request, self._limits)
            if max_tokens:
                RANGES["max_tokens"].check("max_tokens", max_tokens)
            else:
                validate.check_no_output("n", n)
            RANGES["prompt_tokens"].check("prompt_tokens", prompt_tokens)
            place = PlaceRequest(
                request_id="estimate",
                prompt_tokens=prompt_tokens,
                max_tokens=max(max_tokens, 1),  # as that of a generation
                tenant=tenant,
                priority=request.priority,
                page_hashes=hashes,
                accepts=accepts,
                sequences=n,
            )
            reply = estimate_reply(place, await self._router.estimate(place), status)
            reply.max_tokens = max_tokens
            return reply

    async def explain(self, request: pb.ExplainRequest, tenant: str) -> pb.ExplainResponse:
        """Explain, by a request id of the caller's own tenant."""
        with self._call():
            if not request.request_id:
                refuse("request_id", "must not be empty")
            explained = await self._router.explain(f"{tenant}/{request.request_id}")
            return explain_reply(request.request_id, explained, self._served.status)

    async def get_model_info(
        self, request: pb.GetModelInfoRequest, tenant: str
    ) -> pb.GetModelInfoResponse:
        with self._call():
            wire_defaults = pb.SamplingDefaults(
                max_tokens=self._limits.default_max_tokens, **self._defaults.given()
            )
            return wire.model_info(self._served.status, self._codec, self._version, wire_defaults)

    async def get_tenant_loads(
        self, request: pb.GetTenantLoadsRequest, tenant: str
    ) -> pb.GetTenantLoadsResponse:
        return wire.tenant_loads(tenant, await self._router.tenant(tenant))

    # Of operators, who may make them while the cluster drains

    async def get_loads(
        self, request: admin.GetLoadsRequest, tenant: str
    ) -> admin.GetLoadsResponse:
        return admin_wire.loads(await self._served.fresh())

    async def list_groups(
        self, request: admin.ListGroupsRequest, tenant: str
    ) -> admin.ListGroupsResponse:
        return admin_wire.groups(self._served.status, self._layout_reason)

    async def _size(
        self, request: pb.EstimateBudgetRequest, tenant: str, status: ClusterStatus
    ) -> tuple[int, tuple[bytes, ...]]:
        """The prompt's length, and its pages' hashes if the prompt itself is given."""
        if request.WhichOneof("size") == "prompt_tokens":
            return request.prompt_tokens, ()
        ids = await self._prompts.of(request.prompt, tenant, status)
        info = served.any_info(status)
        return len(ids), await self._prompts.page_hashes(ids, tenant, "", info)
