"""Processes that a cluster depends on."""

from __future__ import annotations

import os
import subprocess
import sys

import psutil

from kvmesh.cluster.processes import children_named, is_dead


def test_a_child_is_dead_before_anyone_has_waited_for_it_and_after() -> None:
    code = "import sys; sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE) as child:
        process = psutil.Process(child.pid)
        name = process.name()
        others = frozenset(x.pid for x in psutil.Process().children()) - {child.pid}
        assert children_named({name}, others) == {name: process}
        assert children_named({"no such name"}, others) == {}
        assert children_named({name}, others | {child.pid}) == {}, "it was there before"
        assert not is_dead(process)
        child.kill()
        process_ended(child.pid)
        assert is_dead(process)
        child.wait()
        assert is_dead(process)


def process_ended(pid: int) -> None:
    """Wait until the process has ended, without reaping it."""
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)


SETTLED = """
import asyncio, gc, weakref
from kvmesh.cluster.processes import settle

class Cycle:
    def __init__(self): self.me = self

async def main():
    settle(0.01)
    assert gc.get_threshold()[2] > 1_000_000, "full collections come by time alone"
    cycle = Cycle()
    gc.collect(1)  # it is old
    left = weakref.ref(cycle)
    del cycle
    async with asyncio.timeout(60):
        while left() is not None:
            await asyncio.sleep(0.01)

asyncio.run(main())
"""


def test_a_settled_process_collects_old_garbage_at_regular_times() -> None:
    done = subprocess.run([sys.executable, "-c", SETTLED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
