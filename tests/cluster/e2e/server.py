"""`kvmesh serve` in its own process, as in a terminal."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import yaml

from kvmesh.client import NO_RETRY, Client
from kvmesh.client.credentials import read_key_file
from kvmesh.cluster.lifecycle import Endpoint
from tests.cluster.e2e.harness import PATIENCE_S, SMALL, START_ATTEMPTS, wait_for
from tests.model.shallow import make_shallow

MARK = "KVMESH_TEST_MARK"


class Server:
    """`kvmesh serve`, in its own process group, as in a terminal."""

    def __init__(self, directory: Path, host: str) -> None:
        make_shallow()
        self._directory = directory
        config = directory / "kvmesh.yaml"
        # On a busy machine, thirty streams take longer than the default of drain_s.
        sections = {
            **SMALL,
            "engine": dict(SMALL["engine"]),
            "ingress": {"host": host, "port": 0, "http_port": 0},
            "timeouts": {"drain_s": 600},
        }
        config.write_text(yaml.safe_dump(sections))
        self._mark = f"{os.getpid()}-{directory.name}"
        self._before = {child.pid for child in psutil.Process().children(recursive=True)}
        self._seen: set[tuple[int, float]] = set()
        environment = {**os.environ, "XDG_CONFIG_HOME": str(directory), MARK: self._mark}
        environment["PYTHONPATH"] = os.pathsep.join(sys.path)
        environment["COLUMNS"] = "200"
        environment["PYTHONUNBUFFERED"] = "1"
        environment["TMPDIR"] = str(directory)
        self._environment = environment
        self._attempts_left = START_ATTEMPTS
        self._start()

    def _start(self) -> None:
        self._attempts_left -= 1
        program = "from kvmesh.cluster.cli.commands import app; app()"
        self.process = subprocess.Popen(
            [sys.executable, "-c", program, "serve", "--config", self._directory / "kvmesh.yaml"],
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self._lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.append(line)

    @property
    def output(self) -> str:
        return "".join(self._lines)

    def wait_for_output(self, pattern: str) -> re.Match[str]:
        found: list[re.Match[str]] = []

        def there() -> bool:
            ended = self.process.poll() is not None
            if ended:
                self._reader.join()  # so that all its words are there
            match = re.search(pattern, self.output)
            if match is not None:
                found.append(match)
            elif ended:
                # Ray gives its node 30 s, too little on a busy machine; what is ours fails again.
                again = self._attempts_left and "Ray did not start" in self.output
                assert again, f"it ended:\n{self.output}"
                print(f"started again, because: {self.output}")
                self._start()
            return match is not None

        wait_for(there, f"output {pattern!r}")
        return found[0]

    def endpoint(self) -> Endpoint:
        target = self.wait_for_output(r"ready at (\S+)")[1]
        http_url = self.wait_for_output(r"OpenAI +(\S+)/v1")[1]
        key = read_key_file(self._directory / "kvmesh" / "api_key")
        return Endpoint(target, http_url, key, None)

    def client(self) -> Client:
        endpoint = self.endpoint()
        return Client(endpoint.target, api_key=endpoint.api_key, retry=NO_RETRY)

    def kill(self, name: str) -> None:
        """A process of Ray, as the kernel does when memory runs out."""
        self.note_processes()
        for process in psutil.Process(self.process.pid).children():
            if process.name() == name:
                process.kill()

    def ctrl_c(self) -> None:
        """Like a terminal: signal the whole foreground group, after recording its processes."""
        self.note_processes()
        os.killpg(self.process.pid, signal.SIGINT)

    def terminate(self) -> None:
        """Like a supervisor: signal only the main process."""
        self.note_processes()
        self.process.send_signal(signal.SIGTERM)

    def note_processes(self) -> None:
        for process in psutil.Process(self.process.pid).children(recursive=True):
            try:
                self._seen.add((process.pid, process.create_time()))
            except psutil.Error:
                continue
        assert self._seen

    def wait_ended(self) -> int:
        """The exit code."""
        try:
            code = self.process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            pytest.fail(f"it did not end:\n{self.output}")
        self._reader.join()
        return code

    def left_behind(self) -> list[str]:
        """Processes that are still running, found in three ways."""
        adopted = {
            child.pid
            for child in psutil.Process().children(recursive=True)
            if child.pid not in self._before
        }
        known = {pid for pid, _ in self._seen}
        left = []
        for process in psutil.process_iter():
            try:
                if process.status() == psutil.STATUS_ZOMBIE or process.pid == self.process.pid:
                    continue
                seen = process.pid in known and (process.pid, process.create_time()) in self._seen
                if seen or process.pid in adopted or self._is_marked(process):
                    left.append(f"{process.pid} {process.name()} {' '.join(process.cmdline())}")
            except psutil.Error:
                continue
        return left

    def _is_marked(self, process: psutil.Process) -> bool:
        try:
            return process.environ().get(MARK) == self._mark
        except psutil.Error:
            return False

    def left_files(self) -> list[str]:
        """Files of Ray and its proxy that are still on disk."""
        return [path.name for path in self._directory.glob("kvmesh-*")]


@contextmanager
def serving_process(host: str = "127.0.0.1") -> Iterator[Server]:
    """host: where clients may connect"""
    # A short path, because socket paths have a limit; a directory of its own, to find left files.
    with tempfile.TemporaryDirectory(prefix="", dir="/tmp") as directory:
        server = Server(Path(directory), host)
        try:
            yield server
        finally:
            if server.process.poll() is None:
                server.process.kill()
                server.process.wait(30)
