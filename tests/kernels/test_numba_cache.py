"""Compiled loops on disk: loaded by another process, ignored when damaged, never in the way."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

numba = pytest.importorskip("numba")

from kvmesh.kernels import numba_cache  # noqa: E402
from kvmesh.kernels.source_digest import source_digest  # noqa: E402

# Decode from one page; how often a loop was loaded and how often compiled, and what came out.
DECODE = """
import torch
from kvmesh.kernels.attention import AttentionBatch, paged_attention
from kvmesh.kernels.attention.numba_loop import decode_loop
from kvmesh.kernels.formats.registry import get_format

exact = get_format("exact")
torch.manual_seed(0)
hot = torch.randn(1, 2, 1, 16, 16)
ids = torch.zeros(1, 1, dtype=torch.int32)
batch = AttentionBatch(
    query_starts=torch.tensor([0, 1], dtype=torch.int32),
    seq_lens=torch.tensor([16], dtype=torch.int32),
    rows=ids[0],
    hot_tables=ids,
    sealed_tables=ids,
    page_size=16,
    sink_pages=0,
    recent_pages=0,
    max_query_len=1,
    max_seq_len=16,
)
sealed = torch.zeros(1, 1, exact.page_bytes(16, 16, 4), dtype=torch.uint8)
q = torch.randn(1, 2, 16)
out, _ = paged_attention(q, hot, sealed, batch, fmt=exact, scale=0.25, backend="numba")
stats = decode_loop(exact, 16, 16, "float32").attend.stats
print(sum(stats.cache_hits.values()), sum(stats.cache_misses.values()), out.numpy().tobytes().hex())
"""


def decode(cache: Path) -> list[str]:
    environ = {**os.environ, "NUMBA_CACHE_DIR": str(cache)}
    run = subprocess.run(
        [sys.executable, "-c", DECODE], env=environ, capture_output=True, text=True, check=True
    )
    return run.stdout.split()


@pytest.mark.slow
def test_a_second_process_loads_what_the_first_compiled(tmp_path: Path) -> None:
    hits, misses, compiled = decode(tmp_path)
    assert (hits, misses) == ("0", "1")
    hits, misses, loaded = decode(tmp_path)
    assert (hits, misses) == ("1", "0")
    assert loaded == compiled


# Loops that are compiled or loaded one after the other, made of a function that is not inlined.
NAMESAKES = """
import sys, numba
from kvmesh.kernels.numba_cache import keep_on_disk

def make(factor):
    @numba.njit
    def inner(x):
        return factor if x < 2 else inner(x - 1) + inner(x - 2)

    @numba.njit
    def outer(x):
        return inner(x)

    keep_on_disk(outer, str(factor))
    return outer

for loop in map(make, map(int, sys.argv[1:])):
    print(loop(10), bool(loop.stats.cache_hits))
"""


@pytest.mark.slow
def test_a_loaded_loop_does_not_call_a_namesake_of_its_functions(tmp_path: Path) -> None:
    environ = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}

    def run(*factors: str) -> str:
        command = [sys.executable, "-c", NAMESAKES, *factors]
        done = subprocess.run(command, env=environ, capture_output=True, text=True, check=True)
        return done.stdout

    assert run("2") == "178 False\n"
    assert run("5", "2") == "445 False\n178 True\n"


def make_loop(factor: int, name: str = "loop") -> Any:
    @numba.njit
    def times(x):  # type: ignore[no-untyped-def]
        return x * factor

    numba_cache.keep_on_disk(times, name)
    return times


def was_loaded(loop: Any) -> bool:
    return bool(loop.stats.cache_hits)


@contextmanager
def kept_in(directory: Path | str) -> Iterator[None]:
    """By Numba's variable: it reads them again whenever one has changed since it last looked."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NUMBA_CACHE_DIR", str(directory))
        numba.config.reload_config()
        yield
    numba.config.reload_config()


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[Path]:
    with kept_in(tmp_path):
        yield tmp_path / "kvmesh-loops"


def test_loops_are_distinguished_by_name_types_and_sources(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert make_loop(2)(3) == 6
    same, other, floats = make_loop(2), make_loop(5, "other"), make_loop(2)
    assert (same(3), other(3), floats(0.5)) == (6, 15, 1.0)
    assert was_loaded(same) and not was_loaded(other) and not was_loaded(floats)
    monkeypatch.setattr(numba_cache, "source_digest", lambda directory: "changed")
    changed = make_loop(7)
    assert changed(3) == 21 and not was_loaded(changed)


@pytest.mark.parametrize("content", [b"", b"\0" * 500, None])
def test_a_damaged_file_is_compiled_again(cache: Path, content: bytes | None) -> None:
    assert make_loop(2)(3) == 6
    (file,) = cache.iterdir()
    file.write_bytes(file.read_bytes()[:-1] if content is None else content)
    again = make_loop(2)
    assert again(3) == 6 and not was_loaded(again)
    repaired = make_loop(2)
    assert repaired(3) == 6 and was_loaded(repaired)
    assert list(cache.iterdir()) == [file]


def test_a_directory_that_cannot_be_written_does_no_harm(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    with kept_in(file):
        loop = make_loop(2)
        assert loop(np.float32(1.5)) == 3.0
    assert file.read_bytes() == b""


def test_without_a_directory_nothing_is_kept() -> None:
    with kept_in(""):
        loop = make_loop(2)
        assert loop(3) == 6 and loop.stats.cache_path is None


def test_a_digest_follows_names_and_contents(tmp_path: Path) -> None:
    def digest_of(files: dict[str, str]) -> str:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        for name, content in files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
        return source_digest(folder)

    first = digest_of({"a.py": "1", "b/c.py": "2"})
    assert digest_of({"a.py": "1", "b/c.py": "2", "notes.txt": "3"}) == first
    for changed in ({"a.py": "1", "b/c.py": "3"}, {"a.py": "1", "b/d.py": "2"}, {"a.py": "1"}):
        assert digest_of(changed) != first
