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
        assert children_named({process.name()})[process.name()].pid in {
            x.pid for x in psutil.Process().children()
        }
        assert children_named({"no such name"}) == {}
        assert not is_dead(process)
        child.kill()
        process_ended(child.pid)
        assert is_dead(process)
        child.wait()
        assert is_dead(process)


def process_ended(pid: int) -> None:
    """Wait until the process has ended, without reaping it."""
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
