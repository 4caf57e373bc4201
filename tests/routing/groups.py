"""Groups and reports for the tests of routing."""

from __future__ import annotations

from collections.abc import Iterable

from kvmesh.cluster.routing.group import GroupSpec
from kvmesh.workers.request import EngineLoads, LeaseTerms, PoolLoads
from kvmesh.workers.sizes import PageGeometry, PageNeed

POOL = PoolLoads(0, 0, 0, 0, 0, 0, 0, 0, 0, 0)


def make_spec(
    group: str = "g0",
    *,
    hot: int = 64,
    sealed: int = 100,
    epoch: str = "e0",
    max_sequences: int = 16,
    max_model_len: int = 100_000,
    quality: float = 4.5,
    page_size: int = 16,
) -> GroupSpec:
    return GroupSpec(
        group=group,
        engine_epoch=epoch,
        capacity=PageNeed(hot, sealed),
        geometry=PageGeometry(
            page_size=page_size,
            sink_pages=1,
            recent_pages=2,
            hot_page_bytes=1000,
            sealed_page_bytes=300,
        ),
        max_model_len=max_model_len,
        max_sequences=max_sequences,
        kv_format="int4",
        quality=quality,
    )


def make_loads(leases: Iterable[LeaseTerms] = (), epoch: str = "e0") -> EngineLoads:
    return EngineLoads(
        epoch=epoch,
        running=0,
        waiting=0,
        pool=POOL,
        leases=tuple(leases),
        prompt_tokens_total=0,
        completion_tokens_total=0,
        cached_tokens_total=0,
        preemptions_total=0,
        steps_total=0,
    )
