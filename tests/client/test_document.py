"""docs/sdk.md and examples/: all code runs, with each of the errors that it handles."""

from __future__ import annotations

import ast
import re
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import kvmesh
from kvmesh import (
    FakeServer,
    GroupVerdict,
    KVMeshError,
    NeverFitsError,
    OverCapacityError,
    Prefilling,
    Queued,
    RetryPolicy,
)
from kvmesh.client.core import DEFAULT_TIMEOUT_S
from tests.client.fronts import fronted, openai_server

ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "docs/sdk.md").read_text("utf-8")
# Of a client; the one with an engine has its own test, in tests/cluster/offline.
EXAMPLES = sorted(set((ROOT / "examples").glob("*.py")) - {ROOT / "examples/ray_data_batch.py"})
BLOCKS = re.findall(r"^```python\n(.*?)^```$", DOCUMENT, re.MULTILINE | re.DOTALL)
OF_OPENAI = [block for block in BLOCKS if "openai" in block]
OURS = [block for block in BLOCKS if "openai" not in block]
STATUSES = {"BadRequestError": 400, "RateLimitError": 429}  # no other is answered
DETAILS: dict[type[KVMeshError], Any] = {
    NeverFitsError: {"needed_bytes": 200, "available_bytes": 100},
    OverCapacityError: {"retry_after_s": 2.0, "groups": (GroupVerdict("g0", 2, 1, "is full"),)},
}


def title(block: str) -> str:
    return next(line for line in block.splitlines() if "import" not in line and line)[:40]


def handled(block: str) -> list[str]:
    """The names of the errors that a block handles."""
    handlers = (node for node in ast.walk(ast.parse(block)) if isinstance(node, ast.ExceptHandler))
    return [ast.unparse(handler.type).rpartition(".")[2] for handler in handlers if handler.type]


def run(block: str) -> None:
    exec(compile(block, "docs/sdk.md", "exec"), {"__name__": "__main__"})


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Any:
    server = FakeServer(["Hello there."])
    server.wait(Queued(2, 1.5), Prefilling(512, 0, 1024))
    with fronted(server) as target:
        monkeypatch.setenv("KVMESH_TARGET", target)
        monkeypatch.setenv("KVMESH_API_KEY", "a-key")
        yield server


@pytest.mark.parametrize("block", OURS, ids=title)
def test_a_block_runs(block: str, server: FakeServer) -> None:
    run(block)
    assert server.requests or "FakeTransport" in block


def test_the_events_are_shown(server: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = (block for block in OURS if "events()" in block)
    run(block)
    assert capsys.readouterr().out.splitlines() == [
        "2 requests ahead, about 1.5 s",
        "on fake with exact",
        "512 of 1024 tokens of the prompt",
        "Hello there.",
        "2 tokens",
    ]


def handlers(blocks: list[str]) -> list[tuple[str, str]]:
    return [(block, name) for block in blocks for name in handled(block)]


@pytest.mark.parametrize(("block", "name"), handlers(OURS))
def test_a_block_handles_its_errors(
    block: str, name: str, server: FakeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    cls = getattr(kvmesh, name)
    server.fail(cls("refused", **DETAILS.get(cls, {})))
    run(block)
    assert capsys.readouterr().out.strip()
    assert len(server.requests) == 1


@pytest.mark.parametrize("block", OF_OPENAI, ids=title)
def test_a_block_of_openai_runs(block: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with openai_server() as url:
        run_openai(block, url, monkeypatch)


@pytest.mark.parametrize(("block", "name"), handlers(OF_OPENAI))
def test_a_block_of_openai_handles_its_errors(
    block: str, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    impatient = block.replace("max_retries=0", "max_retries=0, timeout=0.2")
    with openai_server(STATUSES.get(name)) as url:
        run_openai(block if name in STATUSES else impatient, url, monkeypatch)
    assert capsys.readouterr().out.strip()


def run_openai(block: str, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", url)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("OPENAI_API_KEY", "a-key")
    run(block)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs(
    path: Path,
    server: FakeServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(path), run_name="__main__")
    assert server.requests
    assert capsys.readouterr().out


def test_a_story_is_continued_by_the_next_run(
    server: FakeServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    server._answers[0] = " ".join(map(str, range(45)))
    outputs = []
    for _ in range(3):
        runpy.run_path(str(ROOT / "examples/continue_elsewhere.py"), run_name="__main__")
        outputs.append(capsys.readouterr().out.split("\n")[0])
    assert "".join(outputs) == server._answers[0]
    assert [len(request.resume.choices) for request in server.requests] == [0, 1, 1]


def test_every_block_is_found() -> None:
    assert len(BLOCKS) == DOCUMENT.count("```python")
    assert DOCUMENT.count("```") == 2 * len(BLOCKS)
    assert len(OF_OPENAI) == 5 and len(OURS) >= 9


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((f"`{name}` ({{}} s)", lambda n=name: getattr(RetryPolicy(), n))
          for name in ("max_outage_s", "max_connect_s", "max_retry_after_s")),
        ("`max_attempts` ({})", lambda: RetryPolicy().max_attempts),
        ("have {} s", lambda: DEFAULT_TIMEOUT_S),
    ],
)  # fmt: skip
def test_the_defaults_are_current(name: str, value: Callable[[], float]) -> None:
    assert name.format(f"{value():g}") in DOCUMENT
