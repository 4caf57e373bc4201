"""Models on the Hugging Face hub: names, revisions, and what is fetched."""

from __future__ import annotations

import errno
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils._paths import filter_repo_objects

from kvmesh.workers.errors import ConfigError
from kvmesh.workers.model.hub import HubModel, pinned
from kvmesh.workers.model.source import resolve_model, resolve_tokenizer
from tests.model.small import make_small_model, make_small_tokenizer

COMMIT = "5" * 40
OLDER = "4" * 40


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hub") / "tiny-llama"
    vocab_size = make_small_tokenizer(path)
    return make_small_model("LlamaForCausalLM", path, vocab_size=vocab_size, num_hidden_layers=2)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub's files."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    return tmp_path


def answer_with(monkeypatch: pytest.MonkeyPatch, commits: dict[str | None, str]) -> list[str]:
    """The hub, which has these commits by revision. Returns the repositories asked for."""
    asked: list[str] = []

    def repo_info(_: HfApi, repo_id: str, *, revision: str | None = None, **__: Any) -> Any:
        asked.append(repo_id)
        return SimpleNamespace(sha=commits[revision])

    monkeypatch.setattr(HfApi, "repo_info", repo_info)
    return asked


def fail_with(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def repo_info(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(HfApi, "repo_info", repo_info)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("owner/name", HubModel("owner/name")),
        ("owner/na.me-1_b", HubModel("owner/na.me-1_b")),
        ("owner/name@main", HubModel("owner/name", "main")),
        ("owner/name@v1.2", HubModel("owner/name", "v1.2")),
        ("owner/name@refs/pr/3", HubModel("owner/name", "refs/pr/3")),
        (f"owner/name@{COMMIT}", HubModel("owner/name", COMMIT)),
        ("owner/name@", None),
        ("owner/name@../../x", None),
        ("owner/name@a@b", None),
        ("owner/name/more", None),
        ("name@main", None),
        ("/owner/name", None),
    ],
)
def test_names(text: str, named: HubModel | None) -> None:
    assert HubModel.parse(text) == named
    assert named is None or str(named) == text


def test_a_revision_is_what_is_downloaded(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str | None]] = []

    def download(repo: str, *, revision: str | None, **_: Any) -> str:
        asked.append((repo, revision))
        return str(llama)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert resolve_model("owner/name@v1").name == "owner/name"
    assert resolve_tokenizer(f"owner/name@{COMMIT}") == (llama, "owner/name")
    resolve_tokenizer("owner/name")
    assert asked == [("owner/name", "v1"), ("owner/name", COMMIT), ("owner/name", None)]


def test_a_pinned_name_says_which_commit(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = answer_with(monkeypatch, {None: COMMIT, "v1": OLDER})
    assert pinned("owner/name") == f"owner/name@{COMMIT}"
    assert pinned("owner/name@v1") == f"owner/name@{OLDER}"
    assert asked == ["owner/name"] * 2
    assert pinned(f"owner/name@{OLDER}") == f"owner/name@{OLDER}"
    assert len(asked) == 2


def test_only_names_on_the_hub_are_pinned(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A directory may be called as a model on the hub is."""
    asked = answer_with(monkeypatch, {None: COMMIT})
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    for model in ("owner/name", str(tmp_path), "SmolLM2-135M-Instruct", "missing.gguf"):
        assert pinned(model) == model
    assert asked == []


@pytest.mark.parametrize(
    "error",
    [
        httpx2.ConnectError("no route"),
        HfHubHTTPError("down", response=httpx2.Response(503, request=httpx2.Request("GET", "h"))),
    ],
)
def test_without_the_hub_the_cache_says_which_commit(
    cache: Path, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_with(monkeypatch, error)
    refs = cache / "models--owner--name" / "refs"
    refs.mkdir(parents=True)
    (refs / "main").write_text(COMMIT)
    assert pinned("owner/name") == f"owner/name@{COMMIT}"


@pytest.mark.parametrize(
    "error",
    [
        httpx2.ConnectError("no route"),
        httpx2.ProxyError("bad proxy"),
        HfHubHTTPError("gone", response=httpx2.Response(404, request=httpx2.Request("GET", "h"))),
        HfHubHTTPError("slow", response=httpx2.Response(429, request=httpx2.Request("GET", "h"))),
    ],
)
def test_a_commit_that_nobody_knows_is_not_pinned(
    cache: Path,
    error: Exception,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Those that load the model may have it, or a token for it."""
    fail_with(monkeypatch, error)
    with caplog.at_level(logging.WARNING):
        assert pinned("owner/name") == "owner/name"
    assert "owner/name" in caplog.text


def test_offline_without_a_cache_nothing_is_pinned(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on the head, which has no volume: those that load the model know its commit."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(
        httpx2.HTTPTransport, "handle_request", lambda *_: pytest.fail("the hub is asked")
    )
    assert pinned("owner/name") == "owner/name"


def test_weights_that_are_not_read_are_not_fetched(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GPT-OSS has its weights a second time in original/, Mistral in consolidated files."""
    read = ["config.json", "model-00001-of-00002.safetensors", "model.safetensors"]
    read += ["additional_chat_templates/tool_use.jinja"]
    copies = ["original/model.safetensors", "consolidated.safetensors"]
    copies += ["original/a/model.safetensors", "consolidated-00001-of-00002.safetensors"]
    fetched: list[str] = []

    def download(
        name: str, *, allow_patterns: list[str], ignore_patterns: list[str], **_: Any
    ) -> str:
        fetched.extend(
            filter_repo_objects(
                [*read, *copies], allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
            )
        )
        return str(llama)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    resolve_model("owner/name")
    assert fetched == read


def test_the_hub_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="hub cannot be reached"):
        resolve_model("nobody/made-this", root=tmp_path)


@pytest.mark.parametrize(
    ("error", "named"),
    [
        (httpx2.ReadError("reset by peer"), "reset by peer"),
        (httpx2.RemoteProtocolError(""), "RemoteProtocolError"),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left"),
        (RuntimeError("Network error: timed out"), "timed out"),
    ],
)
def test_a_download_that_breaks_off_can_continue(
    error: Exception, named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(ConfigError, match=f"owner/name .*{named}.*start again"):
        resolve_model("owner/name", root=tmp_path)
