"""The replies to EstimateBudget and Explain, and how the command line shows them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kvmesh.client import GroupFacts, TenantLoads
from kvmesh.client.responses import mirror
from kvmesh.client.types import Estimate, Explanation, Loads, ModelInfo
from kvmesh.cluster.cli import console, status_view
from kvmesh.cluster.ingress.estimate import estimate_reply
from kvmesh.cluster.messages import Release
from kvmesh.cluster.reports import ClusterStatus, EngineReport
from kvmesh.cluster.routing.config import RouterConfig
from kvmesh.cluster.routing.errors import ExceedsEveryGroupError
from kvmesh.cluster.routing.fairness import TenantPolicy
from kvmesh.cluster.routing.outcome import BudgetEstimate, RouterStatus
from kvmesh.cluster.routing.request import PlaceRequest
from kvmesh.cluster.routing.verdict import Reason, Verdict
from kvmesh.v1 import kvmesh_pb2 as pb
from kvmesh.v1alpha import admin_pb2 as admin
from kvmesh.workers.errors import InvalidFieldError
from kvmesh.workers.loads import EngineLoads
from tests.cluster.machine import TENANT, Machine, machine, scripted_ingress
from tests.cluster.test_generation import make_request, read
from tests.routing.groups import make_info
from tests.workers.test_engine import PAGE
from tests.workers.test_leader import MANY


async def estimate(built: Machine, prompt_tokens: int, n: int = 1) -> pb.EstimateBudgetResponse:
    request = pb.EstimateBudgetRequest(prompt_tokens=prompt_tokens, max_tokens=10, n=n)
    return await built.ingress.questions.estimate_budget(request, TENANT)


async def explain(built: Machine, request_id: str) -> pb.ExplainResponse:
    return await built.ingress.questions.explain(pb.ExplainRequest(request_id=request_id), TENANT)


@pytest.mark.parametrize("n", [1, 3])
async def test_bytes_and_pages_agree_and_count_every_choice(n: int) -> None:
    async with machine(groups=2) as built:
        reply = await estimate(built, 100, n)
        assert reply.feasible_ever and reply.group in ("g0", "g1")
        for group in reply.groups:
            geometry = built.leaders[group.group].account.info.geometry
            need = geometry.peak_need(110)
            assert (group.hot_pages, group.sealed_pages) == (need.hot * n, need.sealed * n)
            assert group.needed_bytes == n * geometry.bytes_of(need) <= group.capacity_bytes


async def test_an_estimate_beyond_the_context_counts_all_tokens() -> None:
    async with machine() as built:
        small, large = await estimate(built, 5_000), await estimate(built, 1_000_000)
        assert not small.feasible_ever and not large.feasible_ever
        assert large.groups[0].needed_bytes > 100 * small.groups[0].needed_bytes


async def test_a_prompt_without_output_is_estimated() -> None:
    async with machine() as built:
        questions = built.ingress.questions
        request = pb.EstimateBudgetRequest(prompt_tokens=100, max_tokens=0)
        reply = await questions.estimate_budget(request, TENANT)
        assert (reply.max_tokens, reply.feasible_now) == (0, True)
        with pytest.raises(InvalidFieldError, match="must be 1 with max_tokens 0"):
            request.n = 2
            await questions.estimate_budget(request, TENANT)
        with pytest.raises(InvalidFieldError, match="max_tokens"):
            await questions.estimate_budget(
                pb.EstimateBudgetRequest(prompt_tokens=100, max_tokens=-1), TENANT
            )


async def test_groups_are_listed_by_their_numbers() -> None:
    names = [f"g{number}" for number in range(11)]
    async with machine(groups=len(names)) as built:
        questions = built.ingress.questions
        loads = await questions.get_loads(admin.GetLoadsRequest(), TENANT)
        info = await questions.get_model_info(pb.GetModelInfoRequest(), TENANT)
        listed = await questions.list_groups(admin.ListGroupsRequest(), TENANT)
        estimated = await estimate(built, 100)
        for groups in (
            loads.groups,
            loads.router.ledger,
            info.groups,
            listed.groups,
            estimated.groups,
        ):
            assert [group.group for group in groups] == names


async def test_a_group_counts_leases_not_sequences() -> None:
    async with machine(groups=2) as built:
        other = await scripted_ingress(built)
        requests = [PlaceRequest(name, 10, 10, sequences=3) for name in "ab"]
        placed = [await other.place(request) for request in requests]
        router = (await built.ingress.questions.get_loads(admin.GetLoadsRequest(), TENANT)).router
        assert router.leases == sum(group.leases for group in router.ledger) == 2
        for each in placed:
            other.router.send(Release(each.lease.lease_id))


async def test_an_estimate_beyond_the_quota_never_fits() -> None:
    config = RouterConfig(tenants={TENANT: TenantPolicy(quota_bytes=1)})
    async with machine(config=config) as built:
        reply = await estimate(built, 100)
        assert not reply.feasible_ever and not reply.feasible_now
        assert not reply.HasField("projected_wait_s")
        (group,) = reply.groups
        assert group.reason == Reason.QUOTA.value
        assert not group.feasible_ever and not group.feasible_now


async def test_the_views_fit_eighty_columns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(console.out, "_width", 80)
    async with machine(groups=2) as built:
        info = await built.ingress.questions.get_model_info(pb.GetModelInfoRequest(), TENANT)
        loads = await built.ingress.questions.get_loads(admin.GetLoadsRequest(), TENANT)
        listed = await built.ingress.questions.list_groups(admin.ListGroupsRequest(), TENANT)
        own = await built.ingress.questions.get_tenant_loads(pb.GetTenantLoadsRequest(), TENANT)
        status_view.show_model(mirror(ModelInfo, info))
        status_view.show_groups(mirror(ModelInfo, info))
        groups = [mirror(GroupFacts, group) for group in listed.groups]
        status_view.show_cluster(groups, mirror(Loads, loads))
        status_view.show_tenant(mirror(TenantLoads, own))
        status_view.show_estimate(mirror(Estimate, await estimate(built, 1_000_000)))
        built.allow(MANY)
        await read(built.stream(make_request(5)))
        for request_id in ("r", "missing"):
            status_view.show_explanation(mirror(Explanation, await explain(built, request_id)))
    shown = capsys.readouterr().out
    assert "placed after" in shown
    assert "never fits" in shown and "g0" in shown and "g1" in shown and "0 leases" in shown
    assert "…" not in shown
    assert max(len(line) for line in shown.splitlines()) <= 80


async def test_a_request_is_explained_by_its_id_to_its_own_tenant() -> None:
    async with machine(groups=2) as built:
        built.allow(MANY)
        received = await read(built.stream(make_request(5)))
        assert received.started is not None
        reply = await explain(built, "r")
        (decision,) = reply.decisions
        assert decision.group == received.started.group
        assert decision.age_s >= 0.0
        reasons = {group.group: group.reason for group in decision.groups}
        assert reasons[decision.group] == "chosen"
        assert len(reasons) == 2 and set(reasons.values()) > {"chosen"}
        assert all(group.HasField("cost_s") for group in decision.groups)
        with pytest.raises(ExceedsEveryGroupError):
            await read(built.stream(make_request(600, prompt=[3] * 150, request_id="n", n=16)))
        (refused,) = (await explain(built, "n")).decisions
        assert refused.outcome.startswith("refused: no group can hold")
        assert not refused.group
        other = await scripted_ingress(built)
        placed = await other.place(PlaceRequest("other/r", 10, 10))
        other.router.send(Release(placed.lease.lease_id))
        assert len((await explain(built, "r")).decisions) == 1


async def test_an_estimate_of_a_prompt_counts_its_cached_prefix() -> None:
    async with machine() as built:
        built.allow(MANY)
        prompt = [(7 * i) % 50 for i in range(18 * PAGE)]
        await read(built.stream(make_request(3, prompt=prompt)))
        size = pb.Prompt(token_ids=pb.TokenIds(ids=prompt))
        request = pb.EstimateBudgetRequest(prompt=size, max_tokens=10)
        reply = await built.ingress.questions.estimate_budget(request, TENANT)
        assert reply.groups[0].cached_tokens == 16 * PAGE


def test_groups_wait_as_long_as_what_stands_in_their_way() -> None:
    info = make_info()
    verdicts = [
        Verdict("now", Reason.WORSE, 1, 2, 3, cached_pages=2, cost_s=0.5),
        Verdict("later", Reason.FULL, 1, 2, 3),
        Verdict("never", Reason.PAGES, 9, 8, 3),
        Verdict("another format", Reason.FORMAT, 1, 2, 3),
        Verdict("unknown", Reason.DOWN, 1, 2, 3),
    ]
    reports = {
        verdict.group: EngineReport(info, EngineLoads())
        for verdict in verdicts
        if verdict.group != "unknown"
    }
    known = ClusterStatus(RouterStatus(1, True, 0, 1, 0, 0, (), 0, 0, 0, {}), reports, frozenset())
    request = PlaceRequest("estimate", 40, 8, sequences=3)
    found = BudgetEstimate(True, True, None, 7.0, tuple(verdicts))
    reply = estimate_reply(request, found, known)
    assert (reply.prompt_tokens, reply.max_tokens, reply.group) == (40, 8, "")
    assert (reply.feasible_now, reply.feasible_ever, reply.projected_wait_s) == (True, True, 7.0)
    groups = {group.group: group for group in reply.groups}
    waits = {
        name: group.projected_wait_s
        for name, group in groups.items()
        if group.HasField("projected_wait_s")
    }
    assert waits == {"now": 0.0, "later": 7.0, "unknown": 7.0}
    assert [name for name, group in groups.items() if group.feasible_now] == ["now"]
    possible = [name for name, group in groups.items() if group.feasible_ever]
    assert possible == ["now", "later", "unknown"]
    assert groups["now"].cached_tokens == 2 * info.geometry.page_size
    assert groups["now"].cost_s == 0.5
    assert not groups["later"].HasField("cost_s")
    assert (groups["unknown"].kv_format, groups["unknown"].needed_bytes) == ("", 1)
    assert groups["now"].needed_bytes == 3 * info.geometry.bytes_of(info.geometry.peak_need(48))
    queued = estimate_reply(request, replace(found, fits_now=False), known).groups[0]
    assert (queued.feasible_now, queued.feasible_ever, queued.projected_wait_s) == (False, True, 7)
    assert queued.reason == "it has room, but the request waits for its turn"
    unknown = estimate_reply(request, replace(found, projected_start_s=None), known)
    assert not unknown.HasField("projected_wait_s")
    assert not any(group.HasField("projected_wait_s") for group in unknown.groups)
