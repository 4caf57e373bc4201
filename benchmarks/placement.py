"""The time of a placement decision: 8 to 512 groups, many live leases, a full prefix index.

A decision is everything the router does for a request that is granted at once: demand,
prefix match, choice among all groups, lease, index and projections. The later release is
timed separately. Groups and leases grow together, except in the last rows, where only
leases grow.

    python benchmarks/placement.py [--json FILE]
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import random
import statistics
import time
from pathlib import Path

from kvmesh.cluster.routing.config import RouterConfig
from kvmesh.cluster.routing.group import GroupSpec
from kvmesh.cluster.routing.pace import Pace
from kvmesh.cluster.routing.request import Granted, PlaceRequest
from kvmesh.cluster.routing.router import Router
from kvmesh.workers.request import EngineLoads, PoolLoads
from kvmesh.workers.sizes import PageGeometry, PageNeed

PAGE_SIZE = 64
INDEX_ENTRIES = 1_000_000
DECISIONS = 2_000
NO_POOL = PoolLoads(0, 0, 0, 0, 0, 0, 0, 0, 0, 0)


def make_router(num_groups: int) -> Router:
    """Groups that can hold every request, and have reported."""
    router = Router(RouterConfig(ahead_s=1e9, index_limit=INDEX_ENTRIES), epoch=1, now=0.0)
    for index in range(num_groups):
        spec = GroupSpec(
            group=f"engine-{index}",
            engine_epoch="1",
            capacity=PageNeed(hot=20_000, sealed=200_000),
            geometry=PageGeometry(PAGE_SIZE, 1, 2, 8 << 20, 2 << 20),
            max_model_len=1 << 20,
            max_sequences=4096,
            kv_format="int4",
            quality=4.5,
            pace=Pace(2e-5, 1e-10, 0.02),
        )
        router.group_up(spec, 0.0)
        loads = EngineLoads("1", 0, 0, NO_POOL, (), 0, 0, 0, 0, 0)
        router.report(spec.group, loads, 0.0)
    return router


class Requests:
    """Prompts of 2k to 24k tokens; one in three shares a prefix with an earlier one."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._count = 0
        self._chains: list[tuple[bytes, ...]] = []

    def __call__(self) -> PlaceRequest:
        self._count += 1
        pages = self._random.randint(32, 384)
        shared: tuple[bytes, ...] = ()
        if self._chains and self._random.random() < 1 / 3:
            earlier = self._random.choice(self._chains)
            shared = earlier[: min(len(earlier), pages) // 2]
        own = tuple(self._random.randbytes(16) for _ in range(pages - len(shared)))
        hashes = shared + own
        self._chains.append(hashes)
        return PlaceRequest(f"r{self._count}", pages * PAGE_SIZE, 512, page_hashes=hashes)


def measure(num_groups: int, num_leases: int, seed: int = 0) -> dict[str, float]:
    """Median and p99 of decision and release, in microseconds."""
    router, requests = make_router(num_groups), Requests(seed)
    fill = random.Random(seed)
    held: list[str] = []
    while len(held) < num_leases:
        decision, _ = router.submit(requests(), 0.0)
        assert isinstance(decision, Granted)
        held.append(decision.placement.lease.lease_id)
    while len(router.page_index) < INDEX_ENTRIES:
        group = f"engine-{fill.randrange(num_groups)}"
        router.pages_changed(group, [fill.randbytes(16) for _ in range(10_000)], (), 0.0)
    gc.collect()
    gc.freeze()  # like the router's process; otherwise collections traverse the index
    placing, releasing = [], []
    for step in range(DECISIONS):
        request, now = requests(), step * 1e-3
        begin = time.perf_counter()
        decision, _ = router.submit(request, now)
        placing.append(time.perf_counter() - begin)
        assert isinstance(decision, Granted)
        begin = time.perf_counter()
        router.release(held[step % num_leases], now, 300)
        releasing.append(time.perf_counter() - begin)
        held[step % num_leases] = decision.placement.lease.lease_id
    gc.unfreeze()
    return {
        "groups": num_groups,
        "leases": num_leases,
        "index_entries": len(router.page_index),
        "place_median_us": statistics.median(placing) * 1e6,
        "place_p99_us": statistics.quantiles(placing, n=100)[98] * 1e6,
        "release_median_us": statistics.median(releasing) * 1e6,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    sizes = [(groups, groups * 156) for groups in (8, 16, 32, 64, 128, 256, 512)]
    sizes += [(64, 1_000), (64, 40_000)]
    rows = []
    for groups, leases in sizes:
        rows.append(measure(groups, leases))
        print("  ".join(f"{name}={value:,.0f}" for name, value in rows[-1].items()), flush=True)
    if arguments.json:
        about = {"python": platform.python_version(), "machine": platform.machine(), "rows": rows}
        arguments.json.write_text(json.dumps(about, indent=2) + "\n")


if __name__ == "__main__":
    main()
