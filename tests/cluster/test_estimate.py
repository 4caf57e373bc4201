"""What EstimateBudget answers, and how the command line shows it and the loads."""

from __future__ import annotations

import pytest

from kvmesh.client.responses import mirror
from kvmesh.client.types import Estimate, Loads, ModelInfo
from kvmesh.cluster.cli import console, status_view
from kvmesh.cluster.ingress.estimate import geometry_of
from kvmesh.protos.kvmesh.v1 import kvmesh_pb2 as pb
from tests.cluster.machine import METADATA, Machine, machine


async def estimate(built: Machine, prompt_tokens: int, n: int = 1) -> pb.EstimateBudgetResponse:
    request = pb.EstimateBudgetRequest(prompt_tokens=prompt_tokens, max_tokens=10, n=n)
    return await built.ingress.estimate_budget(request, METADATA)


@pytest.mark.parametrize("n", [1, 3])
async def test_bytes_and_pages_agree_and_count_every_choice(n: int) -> None:
    async with machine(groups=2) as built:
        reply = await estimate(built, 100, n)
        assert reply.feasible_ever and reply.group in ("g0", "g1")
        for group in reply.groups:
            geometry = geometry_of(built.leaders[group.group].info())
            need = geometry.peak_need(110)
            assert (group.hot_pages, group.sealed_pages) == (need.hot * n, need.sealed * n)
            assert group.needed_bytes == n * geometry.bytes_of(need) <= group.capacity_bytes


async def test_what_exceeds_the_context_is_weighed_in_full() -> None:
    async with machine() as built:
        small, large = await estimate(built, 5_000), await estimate(built, 1_000_000)
        assert not small.feasible_ever and not large.feasible_ever
        assert large.groups[0].needed_bytes > 100 * small.groups[0].needed_bytes


async def test_the_views_fit_eighty_columns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(console.out, "_width", 80)
    async with machine(groups=2) as built:
        info = await built.ingress.get_model_info(pb.GetModelInfoRequest(), METADATA)
        loads = await built.ingress.get_loads(pb.GetLoadsRequest(), METADATA)
        status_view.show_status(mirror(ModelInfo, info), mirror(Loads, loads))
        status_view.show_estimate(mirror(Estimate, await estimate(built, 1_000_000)))
    shown = capsys.readouterr().out
    assert "never fits" in shown and "g0" in shown and "g1" in shown and "0 leases" in shown
    assert "…" not in shown
    assert max(len(line) for line in shown.splitlines()) <= 80
