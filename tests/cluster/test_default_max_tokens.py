"""Without `max_tokens`, an estimate is of the output that a generation may have."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from kvmesh.cluster.ingress.validate import Limits
from kvmesh.cluster.reports import ClusterStatus, EngineReport
from kvmesh.v1 import kvmesh_pb2 as pb
from tests.cluster.machine import TENANT, Machine, machine

SHORT, LONG = 100, 1000
DEFAULT = Limits().default_max_tokens


@pytest.mark.parametrize(
    ("prompt_tokens", "formats", "expected"),
    [
        (LONG - DEFAULT, [], DEFAULT),
        (LONG - 7, [], 7),
        (LONG - 1, [], 1),
        (SHORT - 7, [], DEFAULT),
        (SHORT - 7, ["int8"], DEFAULT),
        (SHORT - 7, ["int4"], 7),
    ],
)
async def test_a_default_is_lowered_to_the_context_of_the_groups_that_are_accepted(
    prompt_tokens: int, formats: list[str], expected: int
) -> None:
    async with machine(groups=2) as built:
        know(built, lambda status: with_contexts(status, {"g0": SHORT, "g1": LONG}))
        fields: dict[str, Any] = {
            "prompt": pb.Prompt(token_ids=pb.TokenIds(ids=[3] * prompt_tokens)),
            "allowed_kv_formats": formats,
        }
        prepared = await built.ingress._preparation.prepare(pb.GenerateRequest(**fields), TENANT)
        assert prepared.params.max_tokens == expected
        request = pb.EstimateBudgetRequest(**fields)
        estimate = await built.ingress.questions.estimate_budget(request, TENANT)
        assert estimate.max_tokens == expected
        del fields["prompt"]
        request = pb.EstimateBudgetRequest(prompt_tokens=prompt_tokens, **fields)
        estimate = await built.ingress.questions.estimate_budget(request, TENANT)
        assert estimate.max_tokens == expected


async def test_what_is_served_up_to_the_end_of_the_context_is_estimated_to_fit() -> None:
    async with machine() as built:
        longest = built.leaders["g0"].account.info.max_model_len
        request = pb.EstimateBudgetRequest(prompt_tokens=longest - 1)
        estimate = await built.ingress.questions.estimate_budget(request, TENANT)
        assert estimate.feasible_ever and estimate.max_tokens == 1
        request.prompt_tokens = longest
        estimate = await built.ingress.questions.estimate_budget(request, TENANT)
        assert not estimate.feasible_ever


def know(built: Machine, change: Callable[[ClusterStatus], ClusterStatus]) -> None:
    """From now on, the ingress's parts have another status than the router says."""
    status = change(built.ingress._served.status)
    served: Any = SimpleNamespace(status=status, status_for=lambda model: status)
    built.ingress._preparation._served = built.ingress.questions._served = served


def with_contexts(status: ClusterStatus, contexts: dict[str, int]) -> ClusterStatus:
    """Groups with these contexts; the first in int4, the others in int8."""
    reports = {}
    for at, (name, max_model_len) in enumerate(contexts.items()):
        report = status.reports[name]
        kv_format = "int8" if at else "int4"
        info = replace(report.info, max_model_len=max_model_len, kv_format=kv_format)
        reports[name] = EngineReport(info, report.loads)
    return replace(status, reports=reports)
