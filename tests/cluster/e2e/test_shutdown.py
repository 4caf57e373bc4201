"""`kvmesh serve` in its own process: how it ends, and that it leaves nothing behind."""

from __future__ import annotations

import asyncio
import ctypes
import socket
import sys
from collections.abc import Iterator

import pytest

from kvmesh.client import Client, KVMeshError
from tests.cluster.e2e.harness import greedy_by_engine, small_config
from tests.cluster.e2e.server import Server, serving_process
from tests.cluster.e2e.streams import PROMPTS, Streams, check_complete

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(sys.platform != "linux", reason="finding its processes needs Linux"),
]

INTERRUPTED = 130
PR_SET_CHILD_SUBREAPER = 36


@pytest.fixture(scope="module", autouse=True)
def adopted() -> Iterator[None]:
    """Orphans of a dead server become children of this process, so that they are found."""
    libc = ctypes.CDLL(None)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    yield
    libc.prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


def check_gone(server: Server) -> None:
    assert server.left_behind() == []
    assert server.left_files() == []
    assert "Traceback" not in server.output


def test_sigterm_lets_a_stream_end_and_leaves_nothing() -> None:
    with serving_process() as serve, serve.client() as client:
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
    with serving_process() as serve, serve.client() as client:
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
    with serving_process() as serve:
        serve.wait_for_output("loading the model")
        serve.ctrl_c()
        assert serve.wait_ended() == INTERRUPTED
        check_gone(serve)


MANY = PROMPTS * 4  # more than the group holds at once, so that some wait
TOKENS = 24


@pytest.mark.parametrize("name", ["gcs_server", "raylet"])
async def test_streams_end_when_a_process_of_ray_dies_and_nothing_is_left(name: str) -> None:
    with serving_process() as serve:
        endpoint = await asyncio.to_thread(serve.endpoint)
        with Client(endpoint.target, api_key=endpoint.api_key) as client:
            ids = [client.tokenize(prompt).token_ids for prompt in PROMPTS]
        streams = Streams(endpoint, MANY, TOKENS)
        await streams.received(len(MANY) * TOKENS // 3)
        serve.kill(name)
        streamed = await streams.ends()
        assert await asyncio.to_thread(serve.wait_ended) == 1
        assert serve.output.count("error:") == 1
        assert f"error: {name}, a process of Ray, has died" in serve.output
        check_gone(serve)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", int(endpoint.target.rpartition(":")[2])))
    config = small_config()
    answers = await asyncio.to_thread(greedy_by_engine, config, ids, TOKENS)
    expected = dict(zip(PROMPTS, answers, strict=True))
    check_complete(streamed, MANY, expected)
