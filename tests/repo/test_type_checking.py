"""mypy reads everything but what it cannot: the patterns it excludes match those files alone."""

from __future__ import annotations

import re
import tomllib

from tests.repo.imports import LAYERS, ROOT

GENERATED = re.compile(r"_pb2(_grpc)?\.pyi?$")


def test_mypy_leaves_out_only_stubs_and_triton_kernels() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    excluded = [re.compile(pattern) for pattern in project["tool"]["mypy"]["exclude"]]
    left_out, untypable = set(), set()
    for layer in LAYERS:
        for path in (ROOT / layer).rglob("*.py*"):
            if path.suffix not in {".py", ".pyi"}:
                continue
            name = f"kvmesh/{path.relative_to(ROOT).as_posix()}"
            if any(pattern.search(name) for pattern in excluded):
                left_out.add(name)
            if GENERATED.search(name) or "@triton.jit" in path.read_text("utf-8"):
                untypable.add(name)
    assert left_out - untypable == set(), "mypy could read these: narrow its `exclude`"
    assert untypable - left_out == set(), "Triton kernels have no types: extend mypy's `exclude`"
