"""The benchmark of a service's memory, without a service."""

from __future__ import annotations

import mmap
import os
from collections import Counter
from pathlib import Path

import pytest

from benchmarks.service_memory import MIB, Round, alone_bytes, part_of, summary


@pytest.mark.parametrize(
    ("title", "part"),
    [
        ("ray::ServeReplica:kvmesh:engine-0", "leader"),
        ("ray::RankActor.run", "rank"),
        ("ray::HAProxyManager", "Serve's proxies"),
        ("ray::ServeController.listen_for_change", "Serve's controller"),
        ("ray::IDLE", "idle workers"),
        ("/lib/ray/core/src/ray/gcs/gcs_server --log_dir=/tmp/dashboard", "GCS"),
        ("/lib/ray/core/src/ray/raylet/raylet --agent=/lib/ray/dashboard/agent.py", "raylet"),
        ("ray::DashboardAgent", "Ray's agents"),
        ("python /lib/ray/dashboard/dashboard.py --host=127.0.0.1", "Ray's dashboard"),
        ("python -u /lib/ray/_private/log_monitor.py --session-dir=/tmp", "Ray's monitors"),
        ("python -c from kvmesh.workers.model.template_process import main", "chat templates"),
        ("sh -c true", "others"),
    ],
)
def test_parts_are_recognised_by_their_titles(title: str, part: str) -> None:
    assert part_of(title) == part


def test_the_summary_has_medians_and_the_largest_part_first() -> None:
    rounds = [
        Round(
            pss=Counter(router=100 * MIB, rank=rank * MIB),
            uss=Counter(router=80 * MIB, rank=rank * MIB),
            processes=Counter(router=1, rank=2),
            alone=(rank + 50) * MIB,
            start_cpu_s=start_cpu_s,
        )
        for rank, start_cpu_s in ((500, 30.0), (300, 10.0), (400, 20.0))
    ]
    found = summary(rounds)
    assert list(found["parts"]) == ["rank", "router"]
    assert found["parts"]["rank"] == {"pss_mib": 400.0, "uss_mib": 400.0, "processes": 2}
    assert found["parts"]["router"]["uss_mib"] == 80.0
    assert (found["pss_mib"], found["alone_mib"], found["start_cpu_s"]) == (500.0, 450.0, 20.0)
    assert found["pss_mib_of_rounds"] == [600.0, 400.0, 500.0]


def test_a_page_of_a_file_counts_once(tmp_path: Path) -> None:
    size, mine = 32 * MIB, [os.getpid()]
    file = tmp_path / "file"
    file.touch()
    os.truncate(file, size)
    before = alone_bytes(mine)
    with file.open("r+b") as opened, mmap.mmap(opened.fileno(), size) as first:
        for start in range(0, size, mmap.PAGESIZE):
            first[start] = 1
        once = alone_bytes(mine)
        with mmap.mmap(opened.fileno(), size, access=mmap.ACCESS_READ) as second:
            assert sum(second[start] for start in range(0, size, mmap.PAGESIZE)) > 0
            again = alone_bytes(mine)
    # Within what a test's process may allocate meanwhile.
    assert abs(once - before - size) < size // 4
    assert abs(again - once) < size // 4
