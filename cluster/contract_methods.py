"""The methods of the wire contract: what each takes, and what of the ingress serves it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from google.protobuf.message import Message

from kvmesh.cluster.ingress.questions import Questions
from kvmesh.cluster.ingress.service import IngressService
from kvmesh.v1 import kvmesh_pb2 as pb
from kvmesh.v1alpha import admin_pb2 as admin

SERVICE = "kvmesh.v1.KVMesh"
ADMIN_SERVICE = "kvmesh.v1alpha.Admin"


@dataclass(frozen=True, slots=True)
class ContractMethod:
    """A method of the contract.

    call: (service, request, tenant) -> the replies
    admin: needs an admin key
    """

    name: str
    request: type[Message]
    call: Callable[[IngressService, Any, str], AsyncGenerator[Message, None]]
    admin: bool = False


def _one(
    call: Callable[[IngressService, Any, str], Awaitable[Message]],
) -> Callable[[IngressService, Any, str], AsyncGenerator[Message, None]]:
    """A unary method as one with several replies."""

    async def replies(
        service: IngressService, request: Any, tenant: str
    ) -> AsyncGenerator[Message, None]:
        yield await call(service, request, tenant)

    return replies


def _asked(
    call: Callable[[Questions, Any, str], Awaitable[Message]],
) -> Callable[[IngressService, Any, str], AsyncGenerator[Message, None]]:
    """A unary method of the service's questions."""
    return _one(lambda service, request, tenant: call(service.questions, request, tenant))


METHODS: Mapping[str, tuple[ContractMethod, ...]] = {
    SERVICE: (
        ContractMethod("GenerateStream", pb.GenerateRequest, IngressService.generate_stream),
        ContractMethod("Generate", pb.GenerateRequest, _one(IngressService.generate)),
        ContractMethod("Tokenize", pb.TokenizeRequest, _asked(Questions.tokenize)),
        ContractMethod("Detokenize", pb.DetokenizeRequest, _asked(Questions.detokenize)),
        ContractMethod("Abort", pb.AbortRequest, _asked(Questions.abort)),
        ContractMethod(
            "EstimateBudget", pb.EstimateBudgetRequest, _asked(Questions.estimate_budget)
        ),
        ContractMethod("Explain", pb.ExplainRequest, _asked(Questions.explain)),
        ContractMethod("GetModelInfo", pb.GetModelInfoRequest, _asked(Questions.get_model_info)),
        ContractMethod(
            "GetTenantLoads", pb.GetTenantLoadsRequest, _asked(Questions.get_tenant_loads)
        ),
    ),
    ADMIN_SERVICE: (
        ContractMethod("GetLoads", admin.GetLoadsRequest, _asked(Questions.get_loads), admin=True),
        ContractMethod(
            "ListGroups", admin.ListGroupsRequest, _asked(Questions.list_groups), admin=True
        ),
    ),
}
