"""What a request costs the router: 8 to 256 groups, many live leases, a full prefix index.

A decision is everything the router does for a request that is granted at once:
demand, prefix match, choice among all groups, lease, index and projections. The rest
is the engine's account of it: arrival, first token, end. Groups and leases grow
together, but for the last rows, where leases alone grow.

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
from collections import deque
from pathlib import Path

from kvmesh.cluster.routing.config import RouterConfig, RouterTuning
from kvmesh.cluster.routing.outcome import Granted, Placement
from kvmesh.cluster.routing.pace import Pace
from kvmesh.cluster.routing.request import PlaceRequest
from kvmesh.cluster.routing.router import Router
from kvmesh.workers.lease import AccountUpdate, LeaseEnd
from kvmesh.workers.loads import EngineInfo
from kvmesh.workers.sizes import PageGeometry, PageNeed

PAGE_SIZE = 64
INDEX_ENTRIES = 1_000_000
DECISIONS = 2_000
INFO = EngineInfo(
    epoch="1",
    model="model",
    model_revision="",
    kv_format="int4",
    dtype="bfloat16",
    tp=1,
    geometry=PageGeometry(PAGE_SIZE, 1, 2, 8 << 20, 2 << 20),
    capacity=PageNeed(hot=20_000, sealed=200_000),
    max_model_len=1 << 20,
    vocab_size=128_000,
    max_num_seqs=4096,
)


def make_router(num_groups: int) -> Router:
    """Groups that hold what is asked of them."""
    tuning = RouterTuning(pace=Pace(2e-5, 1e-10, 0.02), ahead_s=1e9, index_limit=INDEX_ENTRIES)
    router = Router(RouterConfig(lease_ttl_s=1e9, tuning=tuning), epoch=1, now=0.0)
    for index in range(num_groups):
        router.group_up(f"engine-{index}", INFO, (), 0.0)
    return router


class Requests:
    """Prompts of 2k to 24k tokens; one in three begins like an earlier one."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._count = 0
        self._chains: deque[tuple[bytes, ...]] = deque(maxlen=2048)

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


def place(router: Router, request: PlaceRequest, now: float) -> Placement:
    outcome = router.place(request, now)[0]
    assert isinstance(outcome, Granted)
    return outcome.placement


def fill(router: Router, requests: Requests, num_leases: int, seed: int) -> list[Placement]:
    """Leases that run, and an index with pages of others."""
    held = [place(router, requests(), 0.0) for _ in range(num_leases)]
    for placement in held:
        router.account(placement.group, AccountUpdate(arrived=(placement.lease,)), 0.0)
    names, chance = list(router.fleet.groups), random.Random(seed)
    while len(router.fleet.index) < INDEX_ENTRIES:
        pages = [chance.randbytes(16) for _ in range(10_000)]
        router.fleet.pages_changed(chance.choice(names), pages, ())
    return held


def measure(num_groups: int, num_leases: int, seed: int = 0) -> dict[str, float]:
    """Microseconds of CPU time: the decision, and what its lease costs afterwards.

    Each request runs while `num_leases` others hold leases, the oldest of which ends.
    CPU time, so that other work on the machine counts as little as possible.
    """
    router, requests = make_router(num_groups), Requests(seed)
    held = fill(router, requests, num_leases, seed)
    gc.collect()
    gc.freeze()  # as the router's process does; else collections walk the index
    placing, accounting = [], []
    for step in range(DECISIONS):
        request, now = requests(), step * 1e-3
        oldest = held[step % num_leases]
        begin = time.thread_time()
        placement = place(router, request, now)
        placed = time.thread_time()
        lease_id = placement.lease.lease_id
        router.account(placement.group, AccountUpdate(arrived=(placement.lease,)), now)
        router.account(placement.group, AccountUpdate(first_tokens=(lease_id,)), now)
        ended = AccountUpdate(ended=(LeaseEnd(oldest.lease.lease_id, 300),))
        router.account(oldest.group, ended, now)
        accounting.append(time.thread_time() - placed)
        placing.append(placed - begin)
        held[step % num_leases] = placement
    gc.unfreeze()
    return {
        "groups": num_groups,
        "leases": num_leases,
        "index_entries": len(router.fleet.index),
        "place_median_us": statistics.median(placing) * 1e6,
        "place_p99_us": statistics.quantiles(placing, n=100)[98] * 1e6,
        "account_median_us": statistics.median(accounting) * 1e6,
        "request_mean_us": (statistics.mean(placing) + statistics.mean(accounting)) * 1e6,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the figures there as well")
    parser.add_argument("--groups", type=int, help="this size alone, with 156 leases a group")
    arguments = parser.parse_args()
    sizes = [(groups, groups * 156) for groups in (8, 16, 32, 64, 128, 256)]
    sizes += [(64, 1_000), (64, 40_000)]
    if arguments.groups:
        sizes = [(arguments.groups, arguments.groups * 156)]
    rows = []
    for groups, leases in sizes:
        rows.append(measure(groups, leases))
        print("  ".join(f"{name}={value:,.0f}" for name, value in rows[-1].items()), flush=True)
    if arguments.json:
        about = {"python": platform.python_version(), "machine": platform.machine(), "rows": rows}
        arguments.json.write_text(json.dumps(about, indent=2) + "\n")


if __name__ == "__main__":
    main()
