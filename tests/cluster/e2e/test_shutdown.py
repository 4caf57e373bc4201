"""`kvmesh serve` in its own process: how it ends, and that it leaves nothing behind."""

from __future__ import annotations

import asyncio
import ctypes
import os
import re
import signal
import socket
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

from kvmesh.client import NO_RETRY, Client, KVMeshError
from kvmesh.client.credentials import read_key_file
from kvmesh.cluster.config import build
from kvmesh.cluster.lifecycle import Endpoint
from tests.cluster.e2e.harness import SMALL_ENGINE, greedy_by_engine, wait_for
from tests.cluster.e2e.streams import PROMPTS, Streams, check_complete

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(240),
    pytest.mark.skipif(sys.platform != "linux", reason="finding its processes needs Linux"),
]

READY_WITHIN_S = 120.0
GONE_WITHIN_S = 60.0
INTERRUPTED = 130
MARK = "KVMESH_TEST_MARK"
PR_SET_CHILD_SUBREAPER = 36


@pytest.fixture(scope="module", autouse=True)
def adopted() -> Iterator[None]:
    """Orphans of a dead server become children of this process, so that they are found."""
    libc = ctypes.CDLL(None)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    yield
    libc.prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


class Server:
    """`kvmesh serve`, in its own process group, as in a terminal."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        config = directory / "kvmesh.yaml"
        # On a busy machine, thirty streams take longer than the default of drain_s.
        sections = {
            "engine": dict(SMALL_ENGINE),
            "ingress": {"port": 0},
            "timeouts": {"drain_s": 120},
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
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-c",
                "from kvmesh.cluster.cli import app; app()",
                "serve",
                "--config",
                str(config),
            ],
            env=environment,
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
            match = re.search(pattern, self.output)
            if match is not None:
                found.append(match)
            assert match or self.process.poll() is None, f"it ended:\n{self.output}"
            return match is not None

        wait_for(there, f"output {pattern!r}", READY_WITHIN_S)
        return found[0]

    def endpoint(self) -> Endpoint:
        target = self.wait_for_output(r"ready at (\S+)")[1]
        return Endpoint(target, read_key_file(self._directory / "kvmesh" / "api_key"), None)

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
            code = self.process.wait(GONE_WITHIN_S)
        except subprocess.TimeoutExpired:
            pytest.fail(f"it did not end:\n{self.output}")
        self._reader.join(timeout=10)
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
def server() -> Iterator[Server]:
    # A short path, because socket paths have a limit; a directory of its own, to find left files.
    with tempfile.TemporaryDirectory(prefix="", dir="/tmp") as directory:
        server = Server(Path(directory))
        try:
            yield server
        finally:
            if server.process.poll() is None:
                server.process.kill()
                server.process.wait(30)


def check_gone(server: Server) -> None:
    assert server.left_behind() == []
    assert server.left_files() == []
    assert "Traceback" not in server.output


def test_sigterm_lets_a_stream_end_and_leaves_nothing() -> None:
    with server() as serve, serve.client() as client:
        assert "kvmesh generate" in serve.output
        with client.generate_stream("Once upon", max_tokens=20, ignore_eos=True) as stream:
            deltas = iter(stream)
            seen = [next(deltas)]
            serve.terminate()
            seen.extend(deltas)
        assert sum(len(delta.token_ids) for delta in seen) == 20
        assert stream.resumes == 0
        assert serve.wait_ended() == 0
        assert "shutting down" in serve.output
        check_gone(serve)


def test_a_second_ctrl_c_does_not_wait_for_requests() -> None:
    with server() as serve, serve.client() as client:
        stream = client.generate_stream("Once upon", max_tokens=600, ignore_eos=True)
        with stream:
            deltas = iter(stream)
            next(deltas)
            serve.ctrl_c()
            serve.wait_for_output("Ctrl-C again")
            seen = [next(deltas) for _ in range(3)]
            assert seen, "the first Ctrl-C lets running requests continue"
            serve.ctrl_c()
            with pytest.raises(KVMeshError):
                list(deltas)
        assert serve.wait_ended() == 0
        check_gone(serve)


def test_ctrl_c_while_it_starts_leaves_nothing() -> None:
    with server() as serve:
        serve.wait_for_output("loading the model")
        serve.ctrl_c()
        assert serve.wait_ended() == INTERRUPTED
        check_gone(serve)


THIRTY = [PROMPTS[number % len(PROMPTS)] for number in range(30)]
TOKENS = 24


@pytest.mark.parametrize("name", ["gcs_server", "raylet"])
async def test_streams_end_when_a_process_of_ray_dies_and_nothing_is_left(name: str) -> None:
    with server() as serve:
        endpoint = await asyncio.to_thread(serve.endpoint)
        with Client(endpoint.target, api_key=endpoint.api_key) as client:
            ids = [client.tokenize(prompt).token_ids for prompt in PROMPTS]
        streams = Streams(endpoint, THIRTY, TOKENS)
        await streams.received(len(THIRTY) * TOKENS // 3)
        serve.kill(name)
        streamed = await streams.ends()
        assert await asyncio.to_thread(serve.wait_ended) == 1
        assert serve.output.count("error:") == 1
        assert f"error: {name}, a process of Ray, has died" in serve.output
        check_gone(serve)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", int(endpoint.target.rpartition(":")[2])))
    config = build({"engine": SMALL_ENGINE})
    answers = await asyncio.to_thread(greedy_by_engine, config, ids, TOKENS)
    expected = dict(zip(PROMPTS, answers, strict=True))
    check_complete(streamed, THIRTY, expected)
